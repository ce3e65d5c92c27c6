"""Atomic file writes, checksums, and safe reading of untrusted files."""
