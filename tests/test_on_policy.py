"""Collections inside a real run: their length, their resume, and when nothing is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.datamodules import PromptCollections
from lit_prefopt.errors import InputError
from lit_prefopt.methods import SPO, DenseRewardDPO
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.files import PromptFile
from tests.helpers.batches import image_pairs
from tests.helpers.judges import Brightness
from tests.helpers.ragged import RaggedBackbone

HOW = Sampling(steps=4, guidance=2.0, eta=1.0)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(7)))
    return PromptFile(str(tmp_path / "prompts.txt"))


def module(folder: str, **changes: object) -> SPO:
    torch.manual_seed(0)  # the adapter's first weights
    backbone = StableDiffusion(folder, lora=LoRA(4))
    settings = {"judge": Brightness(), "sampling": HOW, "beta": 10.0, "eps": 0.1}
    settings |= {"candidates": 2, "first": 1, "inner": 0, "threshold": 0.0} | changes
    return SPO(backbone, AdamW(1e-2), **settings)


class Seen(Callback):
    """Notes the seeds of all batches."""

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: SPO, batch, batch_idx) -> None:
        self.seeds.append(batch.seeds.tolist())


def dense(folder: str) -> DenseRewardDPO:
    torch.manual_seed(0)
    backbone = StableDiffusion(folder, lora=LoRA(4))
    settings = {"judge": Brightness(), "sampling": HOW, "beta": 10.0, "delta": 0.5, "gamma": 0.9}
    settings |= {"drawn_steps": 2, "trajectories": 3, "kept": 3}
    return DenseRewardDPO(backbone, AdamW(1e-2), **settings)


def fit(
    trained: OnPolicyModule,
    prompts: PromptFile,
    root: Path,
    steps: int,
    resume: bool = False,
    **options: int,
) -> tuple[OnPolicyModule, Seen, PromptCollections]:
    """Train so many steps, with a checkpoint at each."""
    seen, data = Seen(), PromptCollections(prompts, 2, batches=5, round_size=2, **options)
    saving = ModelCheckpoint(root, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving, seen],
    )
    last = str(root / "last.ckpt") if resume else None
    trainer.fit(trained, data, ckpt_path=last, weights_only=True)
    return trained, seen, data


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["amid", "at the end", "amid the second"])
def test_a_stopped_run_goes_on_with_what_it_had_collected(
    tiny_folder: str, prompts: PromptFile, tmp_path: Path, stop: int
) -> None:
    whole, seen, data = fit(module(tiny_folder), prompts, tmp_path / "whole", 12)
    _, first, _ = fit(module(tiny_folder), prompts, tmp_path / "parts", stop)
    parts, second, again = fit(module(tiny_folder), prompts, tmp_path / "parts", 12, resume=True)
    assert first.seeds + second.seeds == seen.seeds
    assert again.used == data.used
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len({tuple(batch) for batch in seen.seeds}) > 6


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["amid", "at the end", "amid the second"])
def test_a_stopped_run_goes_on_with_what_it_kept_of_earlier_collections(
    tiny_folder: str, prompts: PromptFile, tmp_path: Path, stop: int
) -> None:
    kept = {"collection": 2, "keep": 5}
    whole, seen, data = fit(dense(tiny_folder), prompts, tmp_path / "whole", 14, **kept)
    assert data.used == 3 * 2
    assert [len(one.seeds) for one in data.buffer.rounds] == [1, 2, 2]
    parts = tmp_path / "parts"
    _, first, _ = fit(dense(tiny_folder), prompts, parts, stop, **kept)
    ended, second, again = fit(dense(tiny_folder), prompts, parts, 14, resume=True, **kept)
    assert first.seeds + second.seeds == seen.seeds
    assert again.used == data.used
    for (name, a), (_, b) in zip(whole.named_parameters(), ended.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len({tuple(batch) for batch in seen.seeds}) == 14


@pytest.mark.parametrize("method", [SPO, DenseRewardDPO])
def test_a_stopped_run_goes_on_with_prompts_of_unequal_lengths(
    method: type[OnPolicyModule], tmp_path: Path
) -> None:
    texts = [
        "a",
        "the sea at night",
        "two red cats",
        "rain",
        "a house on a hill",
        "snow",
        "old ice",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    prompts = PromptFile(str(tmp_path / "prompts.txt"))

    def made() -> OnPolicyModule:
        settings = {"judge": Brightness(), "sampling": HOW, "beta": 10.0}
        if method is SPO:
            settings |= {"eps": 0.1, "candidates": 2, "first": 1, "inner": 0, "threshold": 0.0}
        else:
            settings |= {"delta": 0.5, "gamma": 0.9, "drawn_steps": 2, "trajectories": 3, "kept": 3}
        return method(RaggedBackbone(), AdamW(1e-2), **settings)

    kept = {"collection": 2, "keep": 18}
    whole, seen, data = fit(made(), prompts, tmp_path / "whole", 12, **kept)
    _, first, _ = fit(made(), prompts, tmp_path / "parts", 7, **kept)
    ended, second, again = fit(made(), prompts, tmp_path / "parts", 12, resume=True, **kept)
    assert first.seeds + second.seeds == seen.seeds
    rounds = zip(data.buffer.rounds, again.buffer.rounds, strict=True)
    for own, other in [(a.prompt.tensors(), b.prompt.tensors()) for a, b in rounds]:
        assert all(torch.equal(own[name], other[name]) for name in own)
    lengths = {n for one in data.buffer.rounds for n in one.prompt.ragged("caption").lengths}
    assert len(lengths) > 2
    for (name, a), (_, b) in zip(whole.named_parameters(), ended.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moved = zip(made().parameters(), ended.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_a_buffer_from_a_run_that_was_left_behind_gives_way(
    tiny_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    """Of other weights it has the same name: `used` is the same."""
    fit(module(tiny_folder), prompts, tmp_path, 8)
    buffers = {path: path.stat().st_mtime_ns for path in (tmp_path / "buffers").iterdir()}
    fit(module(tiny_folder), prompts, tmp_path, 2)
    later = {path: path.stat().st_mtime_ns for path in (tmp_path / "buffers").iterdir()}
    assert {path for path, time in later.items() if time != buffers[path]} == {min(buffers)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"collection": 4, "keep": 3}, "keep is 3, less than the 4 of one collection"),
        ({"collection": 0}, "collection is 0; give a number from 1"),
        ({"patience": 0}, "patience is 0; give a number from 1"),
    ],
)
def test_bad_numbers(prompts: PromptFile, change: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        PromptCollections(prompts, 2, batches=5, round_size=2, **change)


def test_collections_are_made_by_the_weights_as_they_stand(
    tiny_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    trained, _, data = fit(module(tiny_folder), prompts, tmp_path, 5)
    texts, seeds = data.texts[:2], torch.tensor([1, 2])
    later = trained.collect(texts, seeds)
    before = module(tiny_folder).collect(texts, seeds)
    assert not torch.equal(later.children, before.children)
    assert torch.equal(trained.collect(texts, seeds).children, later.children)


def test_a_threshold_that_accepts_nothing(
    tiny_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    data = PromptCollections(prompts, batch_size=2, batches=5, round_size=2, patience=3)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with pytest.raises(InputError, match="3 rounds of 2 prompts gave no pair.*`threshold`"):
        trainer.fit(module(tiny_folder, threshold=0.9999), data)


def test_every_prompt_comes_once_in_a_pass(prompts: PromptFile) -> None:
    data = PromptCollections(prompts, batch_size=1, batches=1, round_size=7)
    data.setup()
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (first, one), (second, two) = data._next_round(), data._next_round()
    assert sorted(first) == sorted(second) == sorted(data.texts)
    assert first != second
    assert not set(one.tolist()) & set(two.tolist())


def test_fewer_prompts_than_ranks(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    data = PromptCollections(PromptFile(str(tmp_path / "prompts.txt")), 2, batches=1, round_size=1)
    data.trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    with pytest.raises(InputError, match="1 prompts are too few for 2 ranks: give more"):
        data.setup("fit")


def test_stored_pairs_are_refused(tiny_folder: str) -> None:
    with pytest.raises(InputError, match="SPO trains on its own roll-outs.*PromptCollections"):
        module(tiny_folder).training_step(image_pairs(), 0)


def test_a_collection_without_a_trainer(prompts: PromptFile) -> None:
    data = PromptCollections(prompts, batch_size=1, batches=1, round_size=1)
    data.setup()
    with pytest.raises(InputError, match="no Trainer yet: give the data module to `Trainer.fit"):
        data.collect()
    with pytest.raises(InputError, match="no roll-outs yet: call `collect` first"):
        data.batch(0)
