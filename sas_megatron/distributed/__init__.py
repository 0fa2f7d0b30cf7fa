"""Process groups, collectives with their gradients, and the exchanges of heads and context."""
