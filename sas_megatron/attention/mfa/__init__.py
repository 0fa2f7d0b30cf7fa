"""Multi-matrix factorization attention (MFA)."""
