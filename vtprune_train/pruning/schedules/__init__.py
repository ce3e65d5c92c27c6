"""Drop schedules: stages and budgets."""
