"""Comparison of methods at equal budgets, calibration, cost estimates, and timing of a decoder."""
