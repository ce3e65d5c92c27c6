"""Training loop, callbacks and run setup."""
