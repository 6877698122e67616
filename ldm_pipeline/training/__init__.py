"""Training: the configuration, the one loop, its checkpoints, and what each run optimises."""
