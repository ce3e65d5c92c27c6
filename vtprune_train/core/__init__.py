"""Packed batches, stage plans and FLOP counts: model-independent arithmetic on sequence lengths."""
