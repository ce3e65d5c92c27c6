"""The settings of a run: their types, descriptions and loading."""
