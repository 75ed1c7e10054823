"""The paper's tables and figures as plans: which runs each needs, and what it makes of them."""
