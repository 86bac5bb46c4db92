"""The comparison of methods: its plans parse, finished runs are used again, figures by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.compare_methods import plan as plans
from experiments.compare_methods import runs
from experiments.compare_methods.figure import curve
from experiments.compare_methods.plan import PLANS, Comparison, Data, Method, load
from experiments.compare_methods.runs import command
from experiments.compare_methods.table import best_settings, table, total
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError

NAMES = sorted(path.stem for path in PLANS.glob("*.yaml"))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Two methods and a second round; rows and other plans lie in a folder of the test's own."""
    monkeypatch.setattr(plans, "REPORTS", tmp_path)
    monkeypatch.setattr(plans, "PLANS", tmp_path)
    return Comparison(
        name="two",
        title="",
        common=["--a"],
        evaluations=100,
        seeds=[0, 1],
        methods={
            "first": Method(["--x"], data=Data(judge_calls=4096)),
            "second": Method(["--y"], after="first", against="first", seeds=[0]),
        },
    )


def row(arguments: list[str], seed: int, before: list[float], after: list[float]) -> dict[str, Any]:
    """A row of before other limits were known."""
    return {
        "method": "as it was called there",
        "seed": seed,
        "arguments": arguments,
        "budget": 100,
        "evaluations": 104,
        "steps": 3,
        "attributes": {"colour": 0.1},
        "attributes_before": {"colour": 0.5},
        "before": before,
        "after": after,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_says_what_is_compared(name: str) -> None:
    plan = load(PLANS / f"{name}.yaml")
    assert plan.name == name
    assert all(plan.limits(method) for method in plan.methods)
    runs = plan.runs()
    assert {method for method, _ in runs} == {*plan.methods}
    assert {(row["method"], row["seed"]) for row in plan.finished()} <= {*runs}
    settings = [one for method in plan.methods if (one := plan.method(method).setting_of)]
    assert all(settings.count(of) <= 4 for of in settings)  # what each method may try
    for method in plan.methods:
        for other in (plan.method(method).after, plan.method(method).against):
            assert other is None or other in plan.methods
        needed = {Path(output) for output in plan.needed(method)}
        learned_from = [
            Path(one.partition("=")[2]) for one in plan.method(method).arguments if "=runs/" in one
        ]
        assert all({path, *path.parents} & needed for path in learned_from)


@pytest.mark.parametrize(
    "name",
    ["toy", "toy-tuned", "toy-tuning", "toy-equal-pairs", "toy-fixed-draws", "toy-curves"],
)
def test_what_the_pages_tell_of_is_committed(name: str) -> None:
    assert not load(PLANS / f"{name}.yaml").missing()


@pytest.mark.slow
def test_the_settings_that_tuning_found_best_are_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def setting(plan: Comparison, method: str) -> tuple[float, float | None]:
        parses(plan, method)
        told = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
        return told["optimizer"]["init_args"]["lr"], told.get("beta")

    tuning, tuned = (load(PLANS / f"{name}.yaml") for name in ("toy-tuning", "toy-tuned"))
    gained = {row["method"]: np.subtract(row["after"], row["before"]) for row in tuning.finished()}
    best: dict[str, str] = {}
    for name in sorted(tuning.methods, key=lambda name: gained[name].mean()):
        best[str(tuning.method(name).setting_of)] = name
    named = {"SPO": "SPO, exact judge", "SPO with a learned judge": "SPO, step-aware judge"}
    named |= {"SPIN": "SPIN, round 1", "Curriculum DPO": "Curriculum DPO, 5 stages"}
    named |= {"Dense reward": "Dense reward 0.9"}
    named |= {name: name for name in ("Diffusion-DPO", "SFT", "D3PO", "Di3PO")}
    assert {*best} == {*named, "SPIN in one round"}  # which is not compared
    for method, name in named.items():
        assert setting(tuned, name) == setting(tuning, best[method]), method


@pytest.mark.parametrize("method", load(PLANS / "sd15-pickscore.yaml").methods)
def test_the_same_runs_on_stable_diffusion(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be run here; its arguments are understood."""
    parses(load(PLANS / "sd15-pickscore.yaml"), method)
    assert "class_path: lit_prefopt.judges.PickScore" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("toy")])
def test_arguments_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load(PLANS / f"{name}.yaml")
    for method in plan.methods:
        parses(plan, method)
        assert "class_path" in capsys.readouterr().out


def parses(plan: Comparison, method: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command(plan, method, 0), "--print_config"])
    assert stop.value.code == 0, method


def test_runs_of_others_count_where_they_are_the_same(two: Comparison, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("comparison: {common: [--a]}")
    other = [
        row(["--x"], 0, [0.5], [0.6]),
        row(["--x"], 7, [0.5], [0.6]),
        row(["--x", "--z"], 1, [0.5], [0.6]),
        row(["--x"], 1, [0.5], [0.6]) | {"limits": {"pairs": 100}},
    ]
    write(tmp_path / "other.jsonl", other)
    two.also = ["other"]
    assert two.ready() == [("second", 0), ("first", 1)]
    own = row(["--x"], 0, [0.5], [0.9]) | {"limits": {"evaluations": 100}}
    write(tmp_path / "two.jsonl", [own])
    [found] = two.finished()
    assert (found["method"], found["after"]) == ("first", [0.9])


def test_a_second_round_waits_for_its_first_alone(
    two: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 1 goes on until the second round of seed 0 has begun; what fails keeps nobody."""
    second_began = Event()

    def run(what: Comparison, name: str, seed: int, threads: int) -> dict[str, Any]:
        if name == "second":
            second_began.set()
        if name == "third":
            raise ValueError("a run that fails")
        if seed == 1:
            assert second_began.wait(60)
        return row(what.method(name).arguments, seed, [0.5], [0.6]) | {"seconds": 1.0}

    monkeypatch.setattr(runs, "run", run)
    two.methods |= {"third": Method(["--z"], seeds=[0]), "fourth": Method([], after="third")}
    with pytest.raises(ValueError, match="a run that fails"):
        runs.make(two, jobs=3)
    done = {(name["method"], name["seed"]) for name in two.finished()}
    assert done == {("first", 0), ("second", 0), ("first", 1)}


def test_a_run_with_other_arguments_is_not_taken_for_this_one(
    two: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.claim(two, "first", 0)
    two.folder("first", 0).mkdir(parents=True)
    runs.claim(two, "first", 0)  # goes on
    two.methods["first"] = Method(["--x", "--z"])
    with pytest.raises(InputError, match="first-seed0 was made with other arguments"):
        runs.claim(two, "first", 0)
    two.folder("first", 1).mkdir()  # of before arguments were noted
    with pytest.raises(InputError, match="first-seed1 was made with other arguments"):
        runs.claim(two, "first", 1)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Every command that `prepare` starts, in a folder of the test's own; each makes its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "PREPARED", tmp_path / "prepared.yaml")
    (tmp_path / "prepared.yaml").write_text(
        """outputs:
          runs/base: {command: [fit, --output=runs/base], run: runs/training}
          runs/pairs: {command: [predict, --output=runs/pairs], needs: [runs/base]}
          '{runs}/stages-{seed}':
            command: [shards, --from=runs/pairs, '--output={runs}/stages-{seed}']
        """
    )
    plans.prepared.cache_clear()
    begun: list[list[str]] = []

    def made(arguments: list[str], log: Path, threads: int) -> None:
        begun.append(arguments)
        if "fails" in arguments:
            raise ValueError("a command that fails")
        time.sleep(0.05)  # as long as another thread needs to begin as well
        Path(arguments[-1].removeprefix("--output=")).mkdir(parents=True)

    monkeypatch.setattr(runs, "lit_prefopt", made)
    yield begun
    plans.prepared.cache_clear()


def test_what_a_run_needs_is_made_once_and_in_order(
    two: Comparison, commands: list[list[str]]
) -> None:
    two.methods["first"] = Method(["--x", "--stages={runs}/stages-{seed}"])
    two.methods["third"] = Method(["--weights=runs/base/unet", "--other=runs/pairs-2"])
    assert two.needed("first") == ["runs/base", "runs/pairs", "{runs}/stages-{seed}"]
    assert two.needed("third") == ["runs/base"]
    assert two.needed("second") == []
    with ThreadPoolExecutor(3) as pool:
        runs_of = [("first", 0), ("first", 1), ("third", 0)]
        for one in [pool.submit(runs.prepare, two, name, seed, 1) for name, seed in runs_of]:
            one.result()
    assert [one[0] for one in commands] == ["fit", "predict", "shards", "shards"]
    assert {one[-1] for one in commands[2:]} == {
        "--output=runs/two/stages-0",
        "--output=runs/two/stages-1",
    }
    runs.prepare(two, "first", 0, 1)
    assert len(commands) == 4  # it is there


def test_what_was_begun_is_finished_and_what_was_made_by_hand_is_taken(
    two: Comparison, commands: list[list[str]], tmp_path: Path
) -> None:
    two.methods["third"] = Method(["--data=runs/pairs"])
    pairs = plans.prepared()["runs/pairs"].command
    (tmp_path / "runs" / "base").mkdir(parents=True)  # by hand
    pairs.insert(1, "fails")
    for _ in range(2):
        with pytest.raises(ValueError, match="a command that fails"):
            runs.prepare(two, "third", 0, 1)
        (tmp_path / "runs" / "pairs").mkdir(exist_ok=True)  # half of it
    assert [one[0] for one in commands] == ["predict", "predict"]
    pairs.remove("fails")
    with pytest.raises(InputError, match="runs/pairs was made by another command"):
        runs.prepare(two, "third", 0, 1)
    (tmp_path / "runs" / "pairs").rmdir()
    runs.prepare(two, "third", 0, 1)
    runs.prepare(two, "third", 0, 1)
    assert len(commands) == 3


def test_a_training_that_was_stopped_goes_on(
    two: Comparison, commands: list[list[str]], tmp_path: Path
) -> None:
    two.methods["third"] = Method([], needs=["runs/base"])
    plans.prepared()["runs/base"].command.insert(1, "fails")
    with pytest.raises(ValueError, match="a command that fails"):
        runs.prepare(two, "third", 0, 1)
    checkpoints = tmp_path / "runs" / "training" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    with pytest.raises(ValueError, match="a command that fails"):
        runs.prepare(two, "third", 0, 1)
    assert commands[1] == [*commands[0], "--ckpt_path", "last"]


def test_what_nobody_says_how_to_make_is_refused(
    two: Comparison, commands: list[list[str]]
) -> None:
    two.methods["third"] = Method([], needs=["runs/nowhere"])
    with pytest.raises(InputError, match=r"prepared.yaml does not say how runs/nowhere is made"):
        runs.make(two, jobs=1)
    assert commands == []


def test_runs_on_other_terms_are_refused(two: Comparison, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("comparison: {common: [--a, --b]}")
    two.also = ["other"]
    with pytest.raises(InputError, match="judged on other terms"):
        two.missing()


def test_a_run_that_nothing_ends_is_refused(two: Comparison) -> None:
    two.evaluations = None
    with pytest.raises(InputError, match="nothing ends a run of first"):
        two.limits("first")


def test_a_method_of_its_own_length_has_no_other_limit(two: Comparison) -> None:
    two.evaluations, two.pairs = None, 64
    two.methods["on policy"] = Method(["--z"], evaluations=100)
    assert two.limits("first") == {"pairs": 64}
    assert two.limits("on policy") == {"evaluations": 100}


def test_the_table_by_hand(two: Comparison, tmp_path: Path) -> None:
    """The second round is told against the start of the first: 0.9 - 0.5, and not 0.9 - 0.6."""
    rows = [
        row(["--x"], 0, [0.5, 0.5], [0.6, 0.48]),
        row(["--x"], 1, [0.5, 0.5], [0.5, 0.7]) | {"limits": {"evaluations": 100}, "pairs": 12},
        row(["--y"], 0, [0.6, 0.48], [0.9, 0.9]) | {"attributes_before": {"colour": 0.6}},
    ]
    write(tmp_path / "two.jsonl", rows)
    _, _, first, second = (line.split(" | ") for line in table(two, two.finished()).splitlines())
    assert first[0] == "| first"
    assert first[1:3] == ["2", "0.500"]
    assert first[3] == "0.570 (0.540, 0.600)"
    assert first[4].startswith("+0.0700 (")
    assert first[5].startswith("0.625 (")  # two wins, a tie, a loss
    assert first[6:12] == ["25%", "3", "12", "4,096 + —", "0 + 104", "—"]
    assert second[4].startswith("+0.4000 (")
    assert second[12] == "+0.200 |"  # 0.1 of its own and 0.1 of the round before
    timed = [one | {"seconds": 1800.0} for one in two.finished()]
    assert total(timed) == "3 runs took 1.5 hours, one after the other."


def test_the_best_setting_stands_first(two: Comparison, tmp_path: Path) -> None:
    two.methods = {
        "lr 1": Method(["--x"], setting_of="DPO"),
        "lr 2": Method(["--y"], setting_of="DPO"),
    }
    write(
        tmp_path / "two.jsonl",
        [row(["--x"], 0, [0.5], [0.6]), row(["--y"], 0, [0.5], [0.8])],
    )
    assert "- DPO: lr 2 (+0.3000), lr 1 (+0.1000)" in best_settings(two, two.finished())


def test_some_seeds_alone_may_have_a_curve(two: Comparison) -> None:
    two.curve, two.curve_seeds = [50], [1]
    judged = ["RewardCurve" in " ".join(command(two, "first", seed)) for seed in (0, 1)]
    assert judged == [False, True]


def test_the_curve_by_hand(two: Comparison, tmp_path: Path) -> None:
    """Only runs that were judged on their way count, and a round begins where the last ended."""
    point = {"evaluations": 52, "pairs": 6, "judge_calls": 0, "step": 1, "rewards": [0.7]}
    rows = [
        row(["--x"], 0, [0.5, 0.1], [0.9, 0.1]) | {"curve": [point]},
        row(["--x"], 1, [0.5, 0.1], [0.6, 0.1]),
        row(["--y"], 0, [0.9, 0.1], [1.0, 0.1]) | {"curve": [point]},
    ]
    write(tmp_path / "two.jsonl", rows)
    found = curve(two, two.finished(), "first")
    assert found is not None
    spent, gained = found
    assert spent == [0, 52, 104]
    np.testing.assert_allclose(np.concatenate(gained), [[0.0], [0.2], [0.4]])
    later = curve(two, two.finished(), "second")
    assert later is not None
    assert later[0] == [100, 152, 204]
    np.testing.assert_allclose(np.concatenate(later[1]), [[0.4], [0.2], [0.5]])
