"""The policy judged in mid-run: on the evaluation's curve, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_prefopt.callbacks import RewardCurve
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from tests.helpers.comparing import budget, evaluation

STEP = 4 * 8  # evaluations of a step of four pairs


def curve(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "curve.jsonl").open()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_points_lie_on_the_evaluations_curve_and_leave_the_training_alone(
    recipe: list[str], tmp_path: Path
) -> None:
    """The last point is at the budget, where the policy is what the evaluation sees.

    The run that is judged on its way is also stopped and resumed on its way.
    """
    (tmp_path / "prompts.txt").write_text("a blue house\nthe sea\n")
    beside = [*evaluation(tmp_path), *budget(3 * STEP)]
    main(["fit", *recipe, *beside])
    judged = [*recipe, "--trainer.default_root_dir", str(tmp_path / "judged"), *beside]
    judged += [
        "--trainer.callbacks+=RewardCurve",
        f"--trainer.callbacks.at=[1,{2 * STEP},{3 * STEP}]",
    ]
    main(["fit", *judged, "--trainer.max_steps", "1"])
    main(["fit", *judged, "--ckpt_path", "last"])

    points = curve(tmp_path / "judged")
    assert [point["step"] for point in points] == [1, 2, 3]
    assert [point["evaluations"] for point in points] == [STEP, 2 * STEP, 3 * STEP]
    assert [point["pairs"] for point in points] == [4, 8, 12]
    rows = (tmp_path / "judged" / "evaluation" / "per_prompt.jsonl").open()
    ends = [json.loads(row)["reward_policy"] for row in rows]
    assert points[-1]["rewards"] == pytest.approx(ends, abs=1e-5)
    assert points[0]["rewards"] != points[-1]["rewards"]

    alone, looked_at = weights(tmp_path / "run"), weights(tmp_path / "judged")
    assert all(torch.equal(alone[name], looked_at[name]) for name in alone)


def test_it_refuses_to_be_alone_and_points_out_of_order(recipe: list[str], tmp_path: Path) -> None:
    alone = ["--trainer.callbacks+", "RewardCurve", "--trainer.callbacks.at", "[1]"]
    with pytest.raises(SystemExit, match="add both before it"):
        main(["fit", *recipe, *alone])
    with pytest.raises(InputError, match="ascending"):
        RewardCurve([2, 1])
    with pytest.raises(InputError, match="at is 0"):
        RewardCurve([0])
