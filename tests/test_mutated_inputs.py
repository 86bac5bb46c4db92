"""Mutated inputs end in a whole result or in one sentence: no trace, no hang, nothing wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import mutated_inputs
from tests.mutated_inputs import GOOD, KINDS, attempt, run, try_convert


@pytest.mark.parametrize(
    ("first", "inputs"), [(0, 40), pytest.param(0, 1000, marks=pytest.mark.slow)]
)
def test_no_mutated_input_ends_in_anything_else(first: int, inputs: int):
    counts = run(first, inputs)
    assert {outcome for _, outcome in counts} <= set(GOOD), counts
    assert {kind for kind, _ in counts} == set(KINDS)
    assert sum(number for (_, outcome), number in counts.items() if outcome == "results") > 9
    assert sum(number for (_, outcome), number in counts.items() if outcome == "sentences") > 9


def test_a_lost_pair_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = mutated_inputs.read_all
    monkeypatch.setattr(mutated_inputs, "read_all", lambda folder: whole(folder)[1:])
    outcomes = set()
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        monkeypatch.setattr(mutated_inputs, "KINDS", {"convert": try_convert})
        monkeypatch.setattr(mutated_inputs, "SHARES", [1])
        outcomes.add(attempt(seed, tmp_path / str(seed))[1])
    assert "wrong acceptances" in outcomes


def test_traces_and_hangs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wait(folder: Path, draws: random.Random) -> str:
        while True:
            pass

    def fail(folder: Path, draws: random.Random) -> str:
        raise KeyError("MPO")

    monkeypatch.setattr(mutated_inputs, "PATIENCE", 1)
    monkeypatch.setattr(mutated_inputs, "SHARES", [1])
    for function, outcome in ((wait, "hangs"), (fail, "traces")):
        monkeypatch.setattr(mutated_inputs, "KINDS", {"only": function})
        assert attempt(0, tmp_path)[:2] == ("only", outcome)
