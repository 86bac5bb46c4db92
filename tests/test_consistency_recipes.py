"""The recipes of latent consistency models, from images to weights, at a very small size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from safetensors.torch import load_file

from lit_prefopt.cli import main
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.toy import ToyConsistency
from lit_prefopt.toy.backbone import TOY_LCM_SAMPLING
from tests.helpers.runs import same, scalars

UNET = "diffusion_pytorch_model.safetensors"

SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]


@pytest.mark.parametrize("name", ["toy", "sd15"])
def test_from_pairs_to_weights(
    name: str, tiny_lcm_folder: str, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    size = ["--backbone.dtype", "float32", "--trainer.precision", "32-true"]
    main(
        [
            *("fit", "--config", f"{name}-lcm-curriculum-dpo", *SHORT),
            *("--backbone", "LatentConsistency", "--backbone.pretrained", tiny_lcm_folder),
            *("--backbone.teacher", tiny_folder, *(size if name == "sd15" else [])),
            *("--data", "PairShards", "--data.shards", shards, "--data.validation", shards),
            *("--data.batch_size", "4", "--data.resolution", "32", "--data.workers", "0"),
            *("--trainer.max_steps", "3", "--batch.pairs", "4", "--batch.validate_every", "3"),
            *("--trainer.default_root_dir", str(tmp_path / "run")),
        ]
    )
    logged = scalars(tmp_path / "run")
    anchor = {"toy": 100, "sd15": 0}[name] * logged["train/chosen_error"][0]
    assert logged["train/loss"][0] == pytest.approx(math.log(2) + anchor, rel=1e-5)
    assert logged["train/margin"][0] == 0
    assert logged["train/margin"][-1] != 0
    assert logged["train/error"][0] == logged["train/reference_error"][0]
    assert len(logged["val/accuracy"]) == 1
    lora = tmp_path / "run" / "weights" / "pytorch_lora_weights.safetensors"
    assert lora.is_file() == (name == "sd15")
    if name == "sd15":
        layers = {key.split(".lora")[0].split(".")[-1] for key in load_file(lora)}
        assert {"to_q", "0", "proj_in", "proj", "2", "conv1", "time_emb_proj"} <= layers
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not any("teacher" in key for key in state)


def test_from_the_toy_to_its_lcm(tmp_path: Path) -> None:
    run = tmp_path / "lcm"
    main(
        [
            *("fit", "--config", "configs/toy/lcm.yaml", *SHORT, "--data.batch_size", "4"),
            *("--trainer.max_steps", "2", "--data.steps", "2", "--data.val_steps", "1"),
            *("--trainer.val_check_interval", "2", "--trainer.default_root_dir", str(run)),
        ]
    )
    logged = scalars(run)
    assert all(math.isfinite(loss) for loss in logged["train/loss"])
    assert len(logged["val/error"]) == 1
    pipeline, again = str(tmp_path / "pipeline"), str(tmp_path / "again")
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    main(["export", "--source", str(run), "--to", "pipeline", "--output", pipeline])
    main(["export", "--source", checkpoint, "--to", "pipeline", "--output", again])
    stock = DiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    assert isinstance(stock, LatentConsistencyModelPipeline)
    assert isinstance(stock.scheduler, LCMScheduler)
    unets = (load_file(Path(x) / "unet" / UNET) for x in (pipeline, again))
    assert same(*unets)
    stock.set_progress_bar_config(disable=True)
    text, start = "a large red circle on the left of a black background", torch.randn(1, 4, 8, 8)
    images = stock(text, num_inference_steps=1, guidance_scale=2.0, latents=start, output_type="pt")
    assert images.images.shape == (1, 3, 32, 32)
    backbone = ToyConsistency(pipeline, reference="none")
    ours = sample(backbone, [text], torch.tensor([0]), TOY_LCM_SAMPLING)
    assert torch.isfinite(ours).all()
    assert ours.std() > 0.05


def test_the_toys_lcm_is_made_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make toy-lcm"):
        main(
            [
                *("fit", "--config", "toy-lcm-curriculum-dpo", *SHORT),
                *("--backbone.pretrained", str(tmp_path / "lcm")),
                *("--trainer.default_root_dir", str(tmp_path / "run")),
            ]
        )
