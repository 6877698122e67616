"""Several processes at one task: how they start, speak to each other, and keep others out."""
