"""Which samples each rank trains on in a global step."""
