"""What a run may cost: rows of the denoisers are counted, and the run stops in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lit_prefopt.callbacks import Budget
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError


def spent(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    [state] = [s for name, s in checkpoint["callbacks"].items() if name.startswith("Budget")]
    return {"steps": checkpoint["global_step"], **state}


def budget(evaluations: int) -> list[str]:
    more = ["--trainer.callbacks+", "Budget", "--trainer.callbacks.evaluations", str(evaluations)]
    return [*more, "--trainer.max_steps", "100"]


def test_diffusion_dpo_costs_eight_a_pair(recipe: list[str], tmp_path: Path) -> None:
    """Two sides, forward and backward of the policy (3) and a forward of the reference (1).

    Validation at every second step is not counted.
    """
    main(["fit", *recipe, *budget(4 * 8 * 3)])
    assert spent(tmp_path / "run") == {"steps": 3, "spent": 4 * 8 * 3}


def test_one_more_evaluation_is_one_more_step_and_a_resumed_run_goes_on(
    recipe: list[str], tmp_path: Path
) -> None:
    main(["fit", *recipe, *budget(4 * 8 * 2 + 1)])
    assert spent(tmp_path / "run") == {"steps": 3, "spent": 4 * 8 * 3}
    main(["fit", *recipe, *budget(4 * 8 * 5), "--ckpt_path", "last"])
    assert spent(tmp_path / "run") == {"steps": 5, "spent": 4 * 8 * 5}


def test_it_counts_collections(tiny_folder: str, tmp_path: Path) -> None:
    """Two prompts, two guided roll-outs of two steps; then pairs of one step each, guided."""
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs")
    recipe = {
        "model": {
            "class_path": "D3PO",
            "init_args": {
                "judge": "tests.methods.test_spo.Brightness",
                "beta": 0.1,
                "eps": 0.1,
                "drawn_steps": 1,
                "trajectories": 2,
                "sampling": {"steps": 2, "guidance": 2.0, "eta": 1.0},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": tiny_folder}},
        "data": {
            "class_path": "PromptCollections",
            "init_args": {
                "prompts": {
                    "class_path": "PromptFile",
                    "init_args": {"path": str(tmp_path / "prompts.txt")},
                },
                "batch_size": 2,
                "batches": 3,
                "round_size": 2,
                "collection": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    collection, step = 2 * 2 * 2 * 2, 2 * 2 * 2 * 4
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--trainer.callbacks+", "Budget"]
    main(["fit", *arguments, "--trainer.max_steps", "4"])
    assert spent(tmp_path / "run") == {"steps": 4, "spent": 2 * collection + 4 * step}


def test_no_budget_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="evaluations is 0"):
        Budget(0)
