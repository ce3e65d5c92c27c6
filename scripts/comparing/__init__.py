"""Parts of ``scripts/compare_methods.py`` and ``scripts/budget_curve.py``."""
