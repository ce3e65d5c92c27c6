"""The forward pass of unmodified Hugging Face models on packed and padded batches."""
