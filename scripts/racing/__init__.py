"""The parts of ``scripts/race.py``."""
