"""GPU memory, predicted and counted."""
