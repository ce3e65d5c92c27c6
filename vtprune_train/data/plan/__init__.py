"""Plans which samples each rank trains on in each global step."""
