"""Collates samples into packed batches and loads them with worker processes."""
