"""The atom: matrices as low-rank factors."""
