"""Process groups, the exchange of heads, gradient sums, and the ledger of bytes sent."""
