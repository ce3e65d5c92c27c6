"""Collates samples to packed batches and loads them with worker processes."""
