"""Packed batches, the plan of their stages, and FLOPs: arithmetic on lengths that knows no model."""
