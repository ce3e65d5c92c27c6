"""A run's checkpoints on disk: folders, manifests, resume."""
