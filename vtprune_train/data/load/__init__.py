"""Packed batches from samples: collating and loading."""
