"""Methods on equal terms: same base, same budget, same held-out prompts.

    python -m experiments.compare_methods --config experiments/compare/toy.yaml --jobs 2

A finished run is a line of `experiments/reports/NAME.jsonl`, written as soon as it ends, and is not
repeated; one that was stopped goes on from its last checkpoint. So the whole may take several
sittings, and the lines are the record that table and figure are made of. What a run learns from is
made by the first run that needs it; `experiments/prepared.yaml` says how.
"""
