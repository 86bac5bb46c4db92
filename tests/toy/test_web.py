from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_prefopt.batches import ImagePairs
from lit_prefopt.toy.judge import ToyJudge
from lit_prefopt.toy.scenes import split
from lit_prefopt.toy.web import ToyWeb, web_pictures


class Reader(LightningModule):
    """Writes down the seeds of the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.validated: list[str] = []

    def training_step(self, batch: ImagePairs) -> Tensor:
        self.seen.append(int(batch.seeds[0]))
        return self.weight * batch.images.mean()

    def validation_step(self, batch: ImagePairs) -> None:
        self.validated += batch.texts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: object) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, same = (web_pictures(3, 16, 5, 0.3, 0.5, caption_dropout=0.1) for _ in range(2))
    assert torch.equal(one.images, same.images)
    assert one.texts == same.texts
    assert one.images.shape == (16, 1, 3, 32, 32)
    assert one.images.dtype == torch.float32
    assert len(set(one.seeds.tolist())) == len(set(one.keys)) == 16
    for other in (web_pictures(4, 16, 5), web_pictures(3, 16, 6)):
        assert not torch.equal(one.images, other.images)


def test_the_clean_world_is_clean_and_the_web_is_not() -> None:
    judge = ToyJudge()
    means = {}
    for name, shares in {
        "clean": {},
        "wrong": {"wrong_caption": 1.0},
        "flawed": {"flawed_picture": 1.0},
    }.items():
        batch = web_pictures(0, 256, 0, **shares)
        means[name] = judge.score(batch.images[:, 0], batch.texts).mean().item()
    assert means["clean"] > 0.99
    assert means["wrong"] < 0.9
    assert means["flawed"] < 0.95


def test_the_shares_are_kept_and_held_out_captions_stay_out() -> None:
    batch = web_pictures(0, 2000, 1, two_objects=0.3, caption_dropout=0.2)
    empty = [text == "" for text in batch.texts]
    assert 0.16 < sum(empty) / 2000 < 0.24
    texts = [text for text in batch.texts if text]
    assert {split(text) for text in texts} == {"train"}
    single = sum("small" in text or "large" in text for text in texts) / len(texts)
    assert 0.66 < single < 0.74


def test_validation_reads_clean_held_out_captions(tmp_path: Path) -> None:
    model = Reader()
    web = ToyWeb(batch_size=8, steps=2, val_steps=3)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False).fit(
        model, web
    )
    assert len(model.validated) == 24
    assert {split(text) for text in model.validated} == {"held-out"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_on_where_it_stopped(tmp_path: Path, workers: int) -> None:
    def web() -> ToyWeb:
        return ToyWeb(batch_size=2, steps=4, workers=workers)

    whole = Reader()
    trainer(tmp_path / "a", max_steps=10, max_epochs=-1).fit(whole, web())
    assert len(set(whole.seen)) == 10
    for stop in (3, 4):  # within an epoch and at its end
        first, second = Reader(), Reader()
        begun = trainer(tmp_path / f"b{stop}", max_steps=stop, max_epochs=-1)
        begun.fit(first, web())
        begun.save_checkpoint(tmp_path / f"{stop}.ckpt")
        trainer(tmp_path / f"c{stop}", max_steps=10, max_epochs=-1).fit(
            second, web(), ckpt_path=tmp_path / f"{stop}.ckpt", weights_only=True
        )
        assert first.seen + second.seen == whole.seen


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ToyWeb(wrong_caption=33)
    with pytest.raises(ValueError, match="at least 1"):
        ToyWeb(steps=0)
