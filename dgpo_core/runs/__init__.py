"""A run: its folder, its checkpoints, and what is assembled from its settings."""
