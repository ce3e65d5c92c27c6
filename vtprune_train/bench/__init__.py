"""Methods compared at equal budgets, calibration, and the time of a decoder."""
