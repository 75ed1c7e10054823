"""Experiments: recipes, and the runs that they describe put together and compared."""
