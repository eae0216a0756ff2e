"""Sparse upcycling: a dense run becomes a Mixture-of-Experts run (arXiv 2212.05055)."""
