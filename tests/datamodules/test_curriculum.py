"""A curriculum: which pairs are open when, and that stops, workers and ranks change nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_prefopt.batches import ImagePairs
from lit_prefopt.data.order.plan import Plan, RankSplit
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import CurriculumPairs, PairShards
from lit_prefopt.datamodules.curriculum import CurriculumOrder
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import data, equal, train
from tests.helpers.shards import picture

COUNTS = (3, 5, 9)  # pairs of each stage's own; a batch of 4 does not fill the first
OPTIONS = {"crop": "random", "flip": True, "caption_dropout": 0.3}


@pytest.fixture
def stages(tmp_path: Path) -> str:
    """Return a folder of three stages, whose texts tell stage and pair."""
    for stage, count in enumerate(COUNTS, 1):
        with ShardWriter(tmp_path / f"stages/stage-{stage}", max_count=4) as writer:
            for n in range(count):
                writer.add(f"{stage} {n}", picture(50 * stage + n), picture(n))
    return str(tmp_path / "stages")


def curriculum(stages: str | list[str], **more) -> CurriculumPairs:
    """Return a data module of stages that last three steps."""
    defaults = {"batch_size": 4, "resolution": 8, "workers": 0, "seed": 1, "stage_steps": 3}
    return CurriculumPairs(stages, **{**defaults, **more})


def stage_of(batch: ImagePairs) -> set[str]:
    """Return the stages whose own pairs are in a batch."""
    return {text.split()[0] for text in batch.texts}


def test_a_stage_goes_through_the_epochs_of_its_plan():
    plans = [Plan(counts, 5, 2) for counts in ([3], [3, 4], [3, 4, 2])]
    order = CurriculumOrder(plans, 10)
    for epoch, plan in enumerate(plans[:2]):
        stream = [place for inner in range(4) for place in plan.slice(inner, 0, plan.samples)]
        assert order.slice(epoch, 0, 10) == stream[:10]
        assert order.slice(epoch, 2, 9) == stream[2:9]
    # the last one goes on from one epoch of the run to the next
    stream = [place for inner in range(5) for place in plans[2].slice(inner, 0, 9)]
    assert [p for epoch in range(2, 6) for p in order.slice(epoch, 0, 10)] == stream[:40]
    assert all(count == 4 for count in Counter(stream[:36]).values())
    with pytest.raises(IndexError, match="10 samples of a stage"):
        order.slice(0, 5, 11)


def test_fingerprints_tell_curricula_apart():
    plans = [Plan([3], 5), Plan([3, 4], 5)]
    others = [
        CurriculumOrder(plans, 8),
        CurriculumOrder(plans, 10, "other shards"),
        CurriculumOrder([Plan([4], 5), Plan([4, 3], 5)], 10),
        CurriculumOrder([Plan([3], 6), Plan([3, 4], 6)], 10),
    ]
    prints = {order.fingerprint() for order in [CurriculumOrder(plans, 10), *others]}
    assert len(prints) == 5
    assert CurriculumOrder(plans, 10).fingerprint() in prints


def test_stages_open_one_after_the_other_and_stay_open(stages, tmp_path):
    module = curriculum(stages)
    recorder = train(module, tmp_path / "run", max_epochs=5)
    assert [epoch for epoch, _ in recorder.seen] == [e for e in range(5) for _ in range(6)]
    for stage, epochs in enumerate([(0,), (1,), (2, 3, 4)], 1):
        batches = [batch for epoch, batch in recorder.seen if epoch in epochs]
        seen = Counter(text for batch in batches for text in batch.texts)
        assert set(seen) == {f"{s} {n}" for s in range(1, stage + 1) for n in range(COUNTS[s - 1])}
        # 24 of 3, of 8, and 72 of 17 pairs: none is dropped where an epoch of the plan ends
        assert max(seen.values()) - min(seen.values()) <= 1
    assert len({seed for _, b in recorder.seen for seed in b.seeds.tolist()}) == 120
    assert module.stage == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_any_step_the_following_batches_are_the_same(stages, tmp_path, workers):
    options = {**OPTIONS, "workers": workers}
    whole = train(curriculum(stages, **options), tmp_path / "whole", max_epochs=4)
    assert len(whole.seen) == 24
    # inside of the first stage, at its end, inside of the second, in the epoch after the last
    for step in (1, 2, 3, 4, 6, 7, 9, 10, 11) if workers == 0 else (3, 5):
        saved = tmp_path / f"whole/step={step}.ckpt"
        module = curriculum(stages, **options)
        resumed = train(module, tmp_path / f"{step}", saved, max_epochs=4)
        expected = whole.seen[2 * step :]
        assert [epoch for epoch, _ in resumed.seen] == [epoch for epoch, _ in expected]
        assert all(equal(a[1], b[1]) for a, b in zip(resumed.seen, expected, strict=True))
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 1)])
def test_ranks_share_a_stage_out(stages, monkeypatch, world: int, size: int):
    alone = curriculum(stages, **OPTIONS, stage_steps=4)
    alone.setup("fit")
    whole = list(alone.train_dataloader())
    read = []
    for rank in range(world):
        monkeypatch.setattr(PairShards, "_ranks", lambda _, s, r=rank: RankSplit(r, world, s))
        module = curriculum(stages, **OPTIONS, stage_steps=4, batch_size=size)
        module.setup("fit")
        read.append(list(module.train_dataloader()))
        assert module.order.fingerprint() == alone.order.fingerprint()
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in read]
        assert [text for part in parts for text in part.texts] == batch.texts
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert {len(batches) for batches in read} == {4}


def test_with_as_large_a_step_of_other_batches_the_run_goes_on_at_the_same_pair(stages, tmp_path):
    # another batch size is, for the plan, the same as another number of ranks
    whole = train(curriculum(stages), tmp_path / "a", max_epochs=3)
    texts = [text for _, batch in whole.seen for text in batch.texts]
    for step in (2, 3, 5):
        module = curriculum(stages, batch_size=2)
        saved = tmp_path / f"a/step={step}.ckpt"
        on = train(module, tmp_path / f"{step}", saved, max_epochs=3, accumulate_grad_batches=4)
        assert [text for _, batch in on.seen for text in batch.texts] == texts[8 * step :]
        assert torch.allclose(on.layer.weight, whole.layer.weight, atol=1e-6)


def test_another_length_of_the_stages_is_refused_at_resume(stages, tmp_path):
    train(curriculum(stages), tmp_path / "a", max_steps=1)
    saved = tmp_path / "a/step=1.ckpt"
    for module in (curriculum(stages, batch_size=2), curriculum(stages, stage_steps=6)):
        with pytest.raises(ValueError, match="stages of 24 pairs, not of .*`stage_steps`.*batch"):
            train(module, tmp_path / "b", saved)
    turned = [f"{stages}/stage-{n}" for n in (3, 2, 1)]
    with pytest.raises(ValueError, match="another order of the data"):
        train(curriculum(turned), tmp_path / "c", saved)


def test_one_stage_is_the_plain_order(stages):
    module = curriculum([f"{stages}/stage-3"], stage_steps=1)
    module.setup("fit")
    plain = data(f"{stages}/stage-3")
    assert module.order.fingerprint() == plain.order.fingerprint()
    loaders = module.train_dataloader(), plain.train_dataloader()
    assert all(equal(*both) for both in zip(*loaders, strict=True))
    assert len(loaders[0]) == 2


def test_stages_are_named_in_three_ways(stages, monkeypatch):
    named = [f"{stages}/stage-{n}" for n in (1, 2, 3)]
    orders = []
    monkeypatch.chdir(Path(stages).parent)
    for way in (named, stages, stages + "/", "stages", stages + "/stage-{1..3}"):
        module = curriculum(way)
        module.setup("fit")
        orders.append(module.order.fingerprint())
    assert len(set(orders)) == 1
    reverse = curriculum(stages + "/stage-{3..1}")
    reverse.setup("fit")
    [batch, *_] = reverse.train_dataloader()
    assert stage_of(batch) == {"3"}


def test_a_stage_may_hold_several_folders(stages):
    first = f"{stages}/stage-{{1,2}}"
    module = curriculum([first, f"{stages}/stage-3"])
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert set().union(*map(stage_of, batches)) == {"1", "2"}


def test_a_broken_pair_is_replaced_by_one_of_the_same_stage(stages):
    [tar] = Path(stages, "stage-1").glob("*.tar")
    content = tar.read_bytes()
    at = content.find(b"000000001.chosen.png") + 512
    tar.write_bytes(content[:at] + b"broken" + content[at + 6 :])
    module = curriculum(stages)
    module.setup("fit")
    batches = list(module.train_dataloader())
    texts = Counter(text for batch in batches for text in batch.texts)
    assert (set(texts), texts.total()) == ({"1 0", "1 2"}, 12)
    assert len(module.broken) == 1


def test_what_cannot_be_a_curriculum_is_refused(stages, tmp_path):
    with ShardWriter(tmp_path / "empty"):
        pass
    for wrong, sentence in {
        (f"{stages}/stage-1", str(tmp_path / "empty")): "empty has no pairs; leave it out",
        (f"{stages}/stage-1", f"{stages}/stage-1"): "pairs-000000.tar is in two stages",
        (str(tmp_path / "nowhere"),): "no folder .*nowhere",
        str(tmp_path): "has no stage-1 with an index.json; name a folder that",
        f"{stages}/stage-{{1..": "unbalanced braces",
    }.items():
        module = curriculum(wrong if isinstance(wrong, str) else list(wrong))
        with pytest.raises(InputError, match=sentence):
            module.setup("fit")
    with pytest.raises(InputError, match="stage_steps is 0; give a number from 1"):
        curriculum(stages, stage_steps=0)
    with pytest.raises(InputError, match="No stages are named"):
        curriculum([])


def test_a_run_that_ends_before_the_last_stage_says_so(stages, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(curriculum(stages), tmp_path / "run", max_epochs=-1, max_steps=4)
    said = [record.message for record in caplog.records if "stage" in record.message]
    assert "3 stages of 3 steps with 3, 8, 17 pairs; training then continues with all." in said
    assert "max_steps 4 ends the run in stage 2 of 3." in said


def test_stages_have_no_fixed_draws(stages: str) -> None:
    with pytest.raises(InputError, match="have no fixed draws: leave `--data.draws` out"):
        CurriculumPairs(stages, 2, batch_size=4, resolution=8, draws=2)
