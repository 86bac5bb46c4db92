"""What a sharding strategy cannot do is said in a sentence, at the start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.callbacks import Guard, PolicyAveraging
from lit_prefopt.cli import main
from lit_prefopt.configs import CONFIGS
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import Adafactor, AdamW, AdamW8bit, Lion8bit, OptimizerConfig
from lit_prefopt.strategies import FullySharded, ZeRO
from lit_prefopt.strategies.full_state import check_adamw
from tests.helpers.strategies_cpu import CPUZeRO

FILES = ["ddp", "zero2", "zero3", "zero3-offload", "fsdp", "two-nodes"]


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the sentence that ends a command."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code != 0
    return f"{stop.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize("name", FILES)
def test_trainer_files_leave_the_recipe_its_numbers(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = []
    for more in ([], ["--trainer", f"hardware/{name}.yaml"]):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "sd15-diffusion-dpo", *more, "--print_config"])
        resolved.append(yaml.safe_load(capsys.readouterr().out))
    before, after = resolved
    stated = yaml.safe_load((CONFIGS / "hardware" / f"{name}.yaml").read_text())
    changed = {key for key in after["trainer"] if after["trainer"][key] != before["trainer"][key]}
    assert "strategy" in changed
    assert changed == set(stated)
    assert after["trainer"]["strategy"]["init_args"]["timeout"] == "0:10:00"
    assert {**after, "trainer": None} == {**before, "trainer": None}


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_2", "DeepSpeedStrategy"])
def test_lightnings_deepspeed(
    name: str, recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`--trainer hardware/zero2.yaml`" in says(capsys, *recipe, "--trainer.strategy", name)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "FSDPStrategy"])
def test_the_first_fsdp(name: str, recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = says(capsys, *recipe, "--trainer.strategy", name)
    assert "frozen and trained weights are mixed" in said
    assert "`--trainer hardware/fsdp.yaml`" in said


def test_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[deepspeed\]"):
        ZeRO()


def test_no_gpu(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "ZeRO needs CUDA GPUs" in says(capsys, *recipe, "--trainer", "hardware/zero2.yaml")


def test_parameters_of_stage_2_stay() -> None:
    with pytest.raises(InputError, match="offload_parameters needs stage 3"):
        ZeRO(stage=2, offload_parameters=True)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "16-true"])
def test_precisions_that_zero_has_not(precision: Any) -> None:
    with pytest.raises(InputError, match="bf16-mixed or 32-true, not"):
        Trainer(accelerator="cpu", strategy=CPUZeRO(), precision=precision)


@pytest.mark.parametrize("config", [AdamW8bit(1e-3), Lion8bit(1e-3), Adafactor(1e-3)])
def test_optimizers_that_cannot_be_sharded(config: OptimizerConfig) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(InputError, match="cannot be sharded, only AdamW"):
        check_adamw(config.build(parameters))
    check_adamw(AdamW(1e-3, fused=True).build(parameters))


@pytest.mark.parametrize(
    ("callback", "stages"),
    [(PolicyAveraging(), {3}), (Guard(), {1, 2, 3})],
    ids=["average", "guard"],
)
def test_callbacks_that_zero_has_nothing_for(
    callback: Any, stages: set[int], backbone: StableDiffusion
) -> None:
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=1.0)
    for stage in (1, 2, 3):
        trainer = Trainer(
            accelerator="cpu", strategy=CPUZeRO(stage), logger=False, enable_checkpointing=False
        )
        if stage not in stages:
            callback.on_fit_start(trainer, module)
            continue
        with pytest.raises(InputError, match="`--trainer hardware/fsdp.yaml`"):
            callback.on_fit_start(trainer, module)


@pytest.mark.parametrize("strategy", [CPUZeRO(), FullySharded()])
def test_sharding_is_for_training(strategy: Any) -> None:
    trainer = Trainer(accelerator="cpu", strategy=strategy, logger=False)
    trainer.state.fn = TrainerFn.TESTING
    with pytest.raises(InputError, match="is only for `fit`: omit it here"):
        strategy.setup(trainer)


def test_a_checkpoint_of_another_optimizer(
    recipe: list[str], tmp_path: Path, backbone: StableDiffusion
) -> None:
    """As an unsharded run with Adafactor leaves it."""
    main(["fit", *recipe, "--model.optimizer", "Adafactor", "--trainer.max_steps", "1"])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=1.0)
    strategy = FullySharded()
    strategy._lightning_module = module
    strategy.optimizers = [module.optimizer.build(module.backbone.policy.denoiser.parameters())]
    with pytest.raises(InputError, match="not AdamW"):
        strategy.load_optimizer_state_dict(last)
