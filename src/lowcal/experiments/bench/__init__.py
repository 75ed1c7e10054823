"""`lowcal bench`: what a training step costs at each boundary, beside the least that it can cost."""
