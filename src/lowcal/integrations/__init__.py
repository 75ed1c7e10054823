"""LoCal in training tools that own the loop: one module per tool, which needs that tool installed."""
