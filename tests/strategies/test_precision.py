"""Every combination of precision, trained weights and optimizer trains truly or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, trained
from lit_prefopt.batches import ImagePairs, LogRatios
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.losses import Comparisons
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import Adafactor, AdamW, AdamW8bit, Lion8bit, OptimizerConfig
from tests.helpers.batches import image_pairs
from tests.helpers.collecting import spo, write_prompts
from tests.helpers.quantized import COARSE
from tests.helpers.runs import folder_of, same

LR = 1e-6
LABEL = 0.7001  # no number of bfloat16 or float16

WEIGHTS: dict[str, dict[str, Any]] = {
    "full float32": {},
    "full float32, others float16": {"dtype": "float16"},
    "full bfloat16": {"policy_dtype": "bfloat16"},
    "LoRA on float32": {"lora": LoRA(4)},
    "LoRA on bfloat16": {"lora": LoRA(4), "dtype": "bfloat16"},
    "LoRA on float16": {"lora": LoRA(4), "dtype": "float16"},
}

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "AdamW": AdamW(LR),
    "not fused": AdamW(LR, fused=False),
    "Adafactor": Adafactor(LR),
    "AdamW8bit": AdamW8bit(LR, least_size=0),
    "AdamW8bit, rounded": AdamW8bit(LR, least_size=0, stochastic_rounding=True),
    "AdamW8bit, rounded and released": AdamW8bit(
        LR, least_size=0, stochastic_rounding=True, release_gradients=True
    ),
    "Lion8bit": Lion8bit(LR, least_size=0),
    "Lion8bit, rounded": Lion8bit(LR, least_size=0, stochastic_rounding=True),
}

FITTING = {
    "32-true": set(WEIGHTS),
    "bf16-mixed": set(WEIGHTS) - {"LoRA on float16"},
    "16-mixed": set(WEIGHTS) - {"LoRA on float16"},  # on CPU, Lightning turns it into bf16-mixed
    "bf16-true": {"full bfloat16", "LoRA on bfloat16"},
    "16-true": {"LoRA on float16"},
}
"""Weights that fit each precision."""


class Watched(DiffusionDPO):
    """Notes the precision of all that a step has besides its network."""

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        fields = (ratios.values, ratios.policy_error, ratios.reference_error)
        self.seen = {x.dtype for x in (*fields, pairs.labels, pairs.weights) if x is not None}
        self.seen.add(torch.get_default_dtype())
        self.integers = {ratios.t.dtype, pairs.seeds.dtype}
        self.label = pairs.labels[0].item()
        return super().losses(ratios, pairs)


class Batches:
    """One batch of pairs."""

    def __iter__(self) -> Iterator[ImagePairs]:
        yield image_pairs(2)._replace(labels=torch.full((2,), LABEL))

    def __len__(self) -> int:
        return 1


def moved(folder: str, precision: Any, weights: dict[str, Any], config: OptimizerConfig) -> float:
    """Train one step, and return the mean distance of a weight, in learning rates."""
    torch.manual_seed(0)
    module = Watched(StableDiffusion(folder, **weights), config, beta=2000.0)
    before = {name: p.detach().clone() for name, p in trained(module).items()}
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches())
    assert module.seen == {torch.float32}
    assert module.integers == {torch.int64}
    assert module.label == torch.tensor(LABEL).item()
    lora = {p.dtype for name, p in trained(module).items() if "lora_" in name}
    assert lora <= {torch.float32}
    steps = [
        # the first factor of a LoRA has no gradient while the second is zero
        (p.detach().float() - before[name].float()).abs().flatten()
        for name, p in trained(module).items()
        if "lora_A" not in name
    ]
    return torch.cat(steps).mean().item() / LR


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", FITTING)
def test_every_combination_trains_truly_or_is_refused(precision: str, tiny_folder: str) -> None:
    """A first step moves a weight by about a learning rate, in bfloat16 on average."""
    for name, weights in WEIGHTS.items():
        for kind, config in OPTIMIZERS.items():
            rounded = config.supports_bf16_weights or name != "full bfloat16"
            if name in FITTING[precision] and rounded:
                distance = moved(tiny_folder, precision, weights, config)
                assert 0.3 < distance < 1.5, (precision, name, kind, distance)
                continue
            match = "bfloat16" if name in FITTING[precision] else f"--trainer.precision {precision}"
            if precision == "16-mixed":
                match = "bf16"
            with pytest.raises(InputError, match=match):
                moved(tiny_folder, precision, weights, config)


@pytest.mark.parametrize(
    ("precision", "weights", "message"),
    [
        ("bf16-true", "full float32", "are float32.*keep them in float32.*bf16-mixed"),
        ("bf16-true", "LoRA on float32", "set `--backbone.dtype bfloat16`"),
        ("bf16-mixed", "LoRA on float16", "computes in bfloat16 and the weights are float16"),
        ("16-true", "full bfloat16", "needs weights in float16 and they are bfloat16"),
        ("64-true", "full float32", "64-true` is not supported: choose 32-true"),
    ],
)
def test_weights_that_do_not_fit_the_precision_are_refused(
    precision: str, weights: str, message: str, tiny_folder: str
) -> None:
    with pytest.raises(InputError, match=message):
        moved(tiny_folder, precision, WEIGHTS[weights], AdamW(LR))


@pytest.mark.parametrize(
    ("precision", "weights", "optimizer"),
    [
        ("bf16-true", "full bfloat16", "AdamW8bit, rounded"),
        ("bf16-true", "LoRA on bfloat16", "Adafactor"),
        ("16-true", "LoRA on float16", "AdamW"),
        ("bf16-mixed", "full bfloat16", "Lion8bit, rounded"),
    ],
)
def test_half_precision_trains_truly(
    precision: str, weights: str, optimizer: str, tiny_folder: str
) -> None:
    distance = moved(tiny_folder, precision, WEIGHTS[weights], OPTIMIZERS[optimizer])
    assert 0.3 < distance < 1.5


def test_roll_outs_keep_scores_and_noise_levels_in_float32(
    tiny_folder: str, tmp_path: Path
) -> None:
    """With weights in bfloat16, bf16-true and 32-true learn the same, to the last bit."""
    prompts = write_prompts(tmp_path / "prompts.txt", 4, 1)
    states = []
    for precision in ("32-true", "bf16-true"):
        (tmp_path / precision).mkdir()
        arguments = spo(tiny_folder, prompts, tmp_path / precision / "run")
        arguments += ["--backbone.dtype", "bfloat16", "--trainer.precision", precision]
        main(["fit", *arguments, "--trainer.max_steps", "4"])
        last = folder_of(arguments) / "checkpoints" / "last.ckpt"
        states.append(torch.load(last, weights_only=True)["state_dict"])
    assert states[0]
    assert same(*states)


def test_generators_are_checked_as_well(
    tiny_folder: str, tmp_path: Path, shards: str, recipe: list[str]
) -> None:
    """Validation of bfloat16 weights runs under bf16-true, and `predict` names what is wrong."""
    main(["validate", *recipe, *COARSE, "--trainer.precision", "bf16-true"])
    output = ["--model.output", str(tmp_path / "cache"), "--data.shards", shards]
    with pytest.raises(SystemExit, match="bf16-true` needs weights in bfloat16"):
        main(
            [
                *("predict", "--config", "sd15-cache", "--backbone.pretrained", tiny_folder),
                *("--backbone.dtype", "float32", "--trainer.precision", "bf16-true"),
                *("--model.resolution", "32", "--trainer.accelerator", "cpu", *output),
            ]
        )
