"""What a run may cost: rows of the denoisers are counted, and the run stops in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lit_prefopt.callbacks import Budget
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from tests.helpers.comparing import budget


def spent(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    [state] = [s for name, s in checkpoint["callbacks"].items() if name.startswith("Budget")]
    return {"steps": checkpoint["global_step"], **state}


def test_diffusion_dpo_costs_eight_a_pair(recipe: list[str], tmp_path: Path) -> None:
    """Two sides, forward and backward of the policy (3) and a forward of the reference (1).

    Validation at every second step is not counted.
    """
    main(["fit", *recipe, *budget(4 * 8 * 3)])
    wanted = {"steps": 3, "spent": 4 * 8 * 3, "pairs": 12, "judge_calls": 0}
    assert spent(tmp_path / "run") == wanted


def test_a_flow_transformer_costs_as_much(
    recipe: list[str], tiny_sd35_folder: str, tmp_path: Path
) -> None:
    family = ["--backbone", "StableDiffusion3", "--backbone.pretrained", tiny_sd35_folder]
    main(["fit", *recipe, *family, *budget(4 * 8 * 2)])
    assert {"steps": 2, "spent": 4 * 8 * 2, "pairs": 8}.items() <= spent(tmp_path / "run").items()


def test_one_more_evaluation_is_one_more_step_and_a_resumed_run_goes_on(
    recipe: list[str], tmp_path: Path
) -> None:
    main(["fit", *recipe, *budget(4 * 8 * 2 + 1)])
    first = {"steps": 3, "spent": 4 * 8 * 3, "pairs": 12, "judge_calls": 0}
    assert spent(tmp_path / "run") == first
    main(["fit", *recipe, *budget(4 * 8 * 5), "--ckpt_path", "last"])
    whole = {"steps": 5, "spent": 4 * 8 * 5, "pairs": 20, "judge_calls": 0}
    assert spent(tmp_path / "run") == whole


def test_pairs_end_a_run_as_well(recipe: list[str], tmp_path: Path) -> None:
    more = ["--trainer.callbacks+", "Budget", "--trainer.callbacks.pairs", "5"]
    main(["fit", *recipe, *more, "--trainer.max_steps", "100"])
    assert {"steps": 2, "pairs": 8}.items() <= spent(tmp_path / "run").items()


def test_it_counts_collections(tiny_folder: str, tmp_path: Path) -> None:
    """Two prompts, two guided roll-outs of two steps; then pairs of one step each, guided.

    Of every roll-out the judge sees one image, and a limit on these ends the run, resumed or not.
    """
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs")
    recipe = {
        "model": {
            "class_path": "D3PO",
            "init_args": {
                "judge": "tests.helpers.judges.Brightness",
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
    cost = {"spent": 2 * collection + 4 * step, "pairs": 8, "judge_calls": 2 * 2 * 2}
    assert spent(tmp_path / "run") == {"steps": 4, **cost}
    limit = ["--trainer.callbacks.judge_calls", "12", "--trainer.max_steps", "100"]
    main(["fit", *arguments, *limit, "--ckpt_path", "last"])
    after = spent(tmp_path / "run")
    assert (after["steps"], after["judge_calls"]) == (7, 12)


def test_no_budget_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="evaluations is 0"):
        Budget(0)
    with pytest.raises(InputError, match="pairs is 0"):
        Budget(pairs=0)


def test_a_forward_counts_its_rows_however_it_is_called() -> None:
    """Flow transformers are called by keywords, and one takes a list of images."""
    counter, net = Budget(1000), torch.nn.Identity()
    rows = torch.zeros(5, 16, 8, 8)
    with torch.no_grad():
        counter._count(net, (rows, torch.zeros(5)), {})
        counter._count(net, (), {"hidden_states": rows, "timestep": torch.zeros(5)})
        counter._count(net, ([*rows],), {})
    assert counter.spent == 15
    counter._count(net, (), {"hidden_states": rows})
    assert counter.spent == 15 + 3 * 5
