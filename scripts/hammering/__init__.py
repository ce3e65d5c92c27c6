"""Parts of ``scripts/hammer.py``."""
