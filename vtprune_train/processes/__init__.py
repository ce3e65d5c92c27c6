"""Signals, launchers and standard output of a process, importable before PyTorch."""
