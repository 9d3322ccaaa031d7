"""Training: settings, mesh, the pure steps, checkpoints, metrics, and the loop that joins them."""
