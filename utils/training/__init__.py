"""Training: losses, rows, the trainer, and the folder of a run."""
