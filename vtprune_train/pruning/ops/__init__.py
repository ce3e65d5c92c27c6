"""Pure functions on tensors that methods share: scoring, selection, grids, diversity, recycling."""
