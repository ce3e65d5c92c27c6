"""Hangs, failed ranks, non-finite steps, and checks before the first step."""
