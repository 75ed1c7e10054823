"""Removing channels from a network: which belong together, and how they are cut out."""
