"""Bytes by part against what is really there, and what is said when they do not suffice."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.autograd.graph import saved_tensors_hooks

from lit_prefopt.backbones import LoRA, StableDiffusion, trained
from lit_prefopt.batches import ImagePairs
from lit_prefopt.cli import main
from lit_prefopt.estimate.memory import advice, first_row, footprint, savings
from lit_prefopt.estimate.step_cost import checkpointing, step_cost
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW, AdamW8bit
from tests.helpers.batches import images
from tests.helpers.runs import ROOT


def dpo(folder: str, **options: Any) -> DiffusionDPO:
    module = DiffusionDPO(StableDiffusion(folder, **options), AdamW(1e-3), beta=5000.0)
    module.train()
    return module


def size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def kept_for_backward(module: DiffusionDPO, batch: ImagePairs) -> int:
    """Return the bytes that a real forward keeps, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module.training_step(batch, 0)
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_by_shapes_are_those_that_are_kept(tiny_folder: str) -> None:
    """What is alive at the most is what backward needs and the little that comes and goes."""
    module, batch = dpo(tiny_folder), images(4)
    foretold = step_cost(module, batch).activations
    assert module.measured == {}  # a dry step leaves no trace
    assert not module.window.sums
    assert all(p.grad is None for p in trained(module).values())
    kept = kept_for_backward(module, batch)
    assert kept <= foretold <= 1.25 * kept
    with checkpointing(module, True):
        twice = step_cost(module, batch)
    assert twice.activations < 0.75 * foretold
    assert twice.flops > 1.1 * step_cost(module, batch).flops
    one = step_cost(module, first_row(batch)).activations
    assert one == pytest.approx(foretold / 4, rel=0.1)  # and what no pair has to itself


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_a_footprint_is_what_is_there(tiny_folder: str, lora: LoRA | None) -> None:
    module = dpo(tiny_folder, lora=lora)
    optimizer = module.optimizer.build(trained(module).values())
    module.training_step(images(2), 0).backward()
    optimizer.step()
    parts, policy = footprint(module, activations=7), module.backbone.policy
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert (parts.gradients, parts.states) == (size(gradients), size(states))
    assert parts.trained == size(trained(module).values())
    assert parts.trained + parts.frozen == size(policy.denoiser.parameters())
    assert parts.reference == (0 if lora else size(policy.denoiser.parameters()))
    encoders = {n: size(getattr(module.backbone, n).parameters()) for n in ("vae", "text_encoder")}
    assert abs(sum(parts.others.values()) - sum(encoders.values())) < 1000  # buffers
    assert parts.total == sum(parts.named().values())
    assert ("reference copy" in parts.named()) == (lora is None)


def test_each_saving_is_what_following_it_saves(tiny_folder: str) -> None:
    """The recipe is changed as it says, and the bytes of the changed one are counted anew."""
    module, batch = dpo(tiny_folder), images(4)
    module.optimizer.least_size = 0  # type: ignore[attr-defined]
    before, now = footprint(module), step_cost(module, batch).activations
    found = {saving.how.split()[0]: saving for saving in savings(module, batch, 3)}
    sizes = [saving.size for saving in found.values()]
    assert sizes == sorted(sizes, reverse=True)

    lora = footprint(dpo(tiny_folder, lora=LoRA(2), dtype="bfloat16"))
    below = before.others["vae"] // 2 + before.others["text encoder"] // 2  # a line of its own
    adapter = lora.trained + lora.gradients + lora.states
    expected = before.total - lora.total + adapter - below
    assert found["--backbone.lora.rank"].size == pytest.approx(expected, rel=0.01)
    none = footprint(dpo(tiny_folder, reference="none"))
    assert found["--backbone.reference"].size == before.total - none.total
    half = footprint(dpo(tiny_folder, dtype="bfloat16"))
    assert found["--backbone.dtype"].size == pytest.approx(before.total - half.total, rel=0.01)
    one = step_cost(module, first_row(batch)).activations
    assert found["--data.batch_size"].size == pytest.approx(now - one, rel=0.02)
    assert found["--data.batch_size"].how.endswith("--batch.pairs 12")
    with checkpointing(module, True):
        twice = step_cost(module, batch).activations
    assert found["--backbone.gradient_checkpointing"].size == pytest.approx(now - twice, rel=0.02)
    assert len(advice([*found.values()]).splitlines()) == len(found)


def test_what_is_done_already_is_not_advised(tiny_folder: str) -> None:
    backbone = StableDiffusion(
        tiny_folder,
        lora=LoRA(4),
        gradient_checkpointing=True,
        dtype="bfloat16",
        quantization="int8",
    )
    module = DiffusionDPO(backbone, AdamW8bit(1e-3), beta=5000.0)
    assert savings(module, first_row(images(2))) == []


class TooMuch(Callback):
    """Asks for a tensor that no machine holds, in the midst of a step."""

    def on_before_backward(self, *_: Any) -> None:
        torch.empty(2**50)


def test_out_of_memory_is_told_in_a_sentence_with_what_would_help(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ["--trainer.callbacks+", "tests.estimate.test_memory.TooMuch"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *recipe, *callback])
    first, *lines = str(stop.value.code).splitlines()
    wanted = f"for {4 * 2**50} bytes more: by tensor shapes the recipe needs 0.0"
    assert first.startswith(f"lit-prefopt: Out of memory {wanted}")
    assert "trained weights 0.00" in first
    named = [line.split("`")[1].split()[0] for line in lines]
    assert set(named) >= {
        "--backbone.lora.rank",
        "--backbone.gradient_checkpointing",
        "--data.batch_size",
        "--backbone.reference",
    }
    assert all("GiB" in line for line in lines)


class Limited(Callback):
    """Leaves the process little more than it has when training begins."""

    def on_train_start(self, *_: Any) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))


@pytest.mark.slow
def test_a_real_shortage_ends_with_the_same_sentence(recipe: list[str]) -> None:
    arguments = ["--data.resolution", "512", "--data.batch_size", "16"]
    arguments += ["--trainer.callbacks+", "tests.estimate.test_memory.Limited"]
    command = [sys.executable, "-m", "lit_prefopt.cli", "fit", *recipe, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lit-prefopt: Out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--backbone.gradient_checkpointing true" in done.stderr
