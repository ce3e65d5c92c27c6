"""Building models, reading and writing their checkpoints, tokenizers and processors."""
