"""The pruning methods, one file each."""
