"""Compare models: sample, score, compute intervals, write results and report."""
