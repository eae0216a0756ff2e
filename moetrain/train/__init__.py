"""Training: the composition root, one step, and the loop around it."""
