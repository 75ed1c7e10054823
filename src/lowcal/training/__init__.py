"""The thin training loop: step, exact resume, run folders."""
