"""Multi-head, grouped-query and multi-query attention."""
