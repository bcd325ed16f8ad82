"""The training loop, shared by all tasks, and what it is made of."""
