"""Estimate a run's time, FLOPs and memory from a few dry steps and from tensor shapes."""
