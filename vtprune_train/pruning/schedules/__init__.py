"""How many tokens each stage keeps: stages, budgets, and phases of training."""
