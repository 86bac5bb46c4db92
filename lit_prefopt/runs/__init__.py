"""Run directories and checkpoints: create, check, load and resume."""
