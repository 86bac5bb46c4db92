"""Methods on equal terms: same base, same budget, same held-out prompts.

    python -m benchmarks.compare_methods --config benchmarks/compare/toy.yaml --jobs 2

A run that is finished is a line of `benchmarks/reports/NAME.jsonl`, written as soon as it ends, and
is not made again; one that was stopped goes on from its last checkpoint. So the whole may take
several sittings, and the lines are the record that table and figure are made of. What a run learns
from is made by the first run that needs it; `benchmarks/prepared.yaml` says how.
"""
