"""DiffusionNFT: its images, its moving average, its loss on stored and on sampled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3, trained
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import Pairs
from lit_prefopt.callbacks import PolicyAveraging
from lit_prefopt.datamodules import PromptCollections
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionNFT, OfflineNFT, PolicyGradient
from lit_prefopt.moving_average import AverageSchedule, SamplingAverage
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.files import PromptFile
from tests.helpers.batches import image_pairs
from tests.helpers.judges import SEEDS, TEXTS, Brightness
from tests.helpers.step_zero import moved

HOW = Sampling(steps=3, guidance=1.0, batch_size=3)


@pytest.fixture(params=["unet", "flow"])
def network(request: pytest.FixtureRequest, tiny_folder: str, tiny_sd35_folder: str) -> Backbone:
    torch.manual_seed(0)
    if request.param == "unet":
        return StableDiffusion(tiny_folder, lora=LoRA(4))
    return StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))


def online(backbone: Backbone, **changes: Any) -> DiffusionNFT:
    settings = {"judge": Brightness(), "sampling": HOW, "beta": 0.5, "drift": 0.1}
    return DiffusionNFT(backbone, AdamW(1e-3), **settings | {"trajectories": 3} | changes).train()


def offline(backbone: Backbone, **changes: Any) -> OfflineNFT:
    return OfflineNFT(backbone, AdamW(1e-3), **{"beta": 0.5, "drift": 0.1} | changes).train()


def scored(backbone: Backbone, scores: list[list[float]]) -> Pairs:
    """Return latents of random pictures with these scores."""
    plain = offline(backbone).eval().form_pairs(image_pairs(len(scores), sides=len(scores[0])))
    return plain._replace(scores=torch.tensor(scores))


def test_images_are_those_of_the_plain_sampler(network: Backbone) -> None:
    module = online(network)
    made = module.collect(TEXTS, SEEDS)
    own = draws.subseeds(SEEDS, 3, "trajectory").flatten()
    texts = [text for text in TEXTS for _ in range(3)]
    images = sample(network, texts, own, HOW)
    assert torch.equal(network.decode(made.latents[:, 0]), images)
    torch.testing.assert_close(made.scores[:, 0], images.mean((1, 2, 3)))
    assert [t for _, times in module.judge.asked for t in times] == [0] * 6
    grouped = made.scores.view(2, 3).double()
    deviation = grouped.std(1, correction=0, keepdim=True) + 1e-4
    expected = (grouped - grouped.mean(1, keepdim=True)) / deviation
    torch.testing.assert_close(made.advantages.view(2, 3).double(), expected, atol=1e-5, rtol=1e-4)
    drawn = module.draw(made, torch.tensor([4, 4]), torch.tensor([1, 2]))
    assert torch.equal(drawn.latents[0], drawn.latents[1])
    first, second = module.add_noise(drawn).t.tolist()
    assert first != second


def test_step_zero(network: Backbone) -> None:
    """Policy, sampling policy and reference agree: the same error on both sides, no drift."""
    module = online(network)
    pairs = module.draw(module.collect(TEXTS, SEEDS), torch.arange(6), torch.arange(6))
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    assert ratios.terms is not None
    assert torch.equal(ratios.terms["positive"], ratios.terms["negative"])
    assert (ratios.terms["drift"] == 0).all()
    losses = module.losses(ratios, pairs)
    torch.testing.assert_close(losses, 10 * ratios.terms["positive"][:, 0])
    module.weighted_loss(ratios, pairs).backward()
    weights = trained(network).values()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)
    assert any(w.grad.abs().max() > 0 for w in weights)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_loss_against_double_precision(network: Backbone, beta: float) -> None:
    """From the three networks' predictions at the noised latents, in double precision."""
    module = offline(network, beta=beta, drift=0.2)
    pairs = scored(network, [[0.1, 0.9, 0.4], [0.5, 0.2, 0.8]])
    module.average.average = {n: p.detach().clone() for n, p in trained(module).items()}
    old = {name: 1.5 * value + 0.1 for name, value in module.average.average.items()}
    module.average.average = {name: value.clone() for name, value in old.items()}
    moved(network, 0.05)
    pairs = module.groups.weigh(pairs, lambda value: value)
    found = module.losses(module.log_ratios(pairs), pairs)
    noised = module.add_noise(pairs)
    t = noised.t_per_side

    def predicted() -> Tensor:
        with torch.no_grad():
            return network.predict(noised.latents, t, noised.prompt)

    policy = predicted()
    with network.as_reference():
        base = predicted()
    running = {name: p.detach().clone() for name, p in trained(module).items()}
    for name, parameter in trained(module).items():
        parameter.data.copy_(old[name])
    before = predicted()
    for name, parameter in trained(module).items():
        parameter.data.copy_(running[name])
    x, x0 = noised.latents.double(), pairs.latents.flatten(0, 1).double()
    if isinstance(network, StableDiffusion3):
        sigma = t.double().view(-1, 1, 1, 1)
        clean, late = x - sigma * policy.double(), x - sigma * before.double()
        velocity = (policy.double() - base.double()).square().mean((1, 2, 3))
    else:
        signal = network.process.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        clean, late = (
            (x - (1 - signal).sqrt() * p.double()) / signal.sqrt() for p in (policy, before)
        )
        noise = (policy.double() - base.double()).square().mean((1, 2, 3))
        velocity = noise / signal.flatten()  # of v = sqrt(a) noise - sqrt(1 - a) x0
    a = pairs.advantages.double().flatten()
    good = (a.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)
    sides = []
    for mixed in (beta * clean + (1 - beta) * late, (1 + beta) * late - beta * clean):
        residual = mixed - x0
        sides.append(residual.square().mean((1, 2, 3)) / residual.abs().mean((1, 2, 3)))
    expected = 5 / beta * (good * sides[0] + (1 - good) * sides[1]) + 0.2 * velocity
    assert (sides[0] - sides[1]).abs().max() > 1e-3
    torch.testing.assert_close(found.double(), expected.view(2, 3).mean(1), atol=1e-3, rtol=1e-3)


def test_stored_scores_become_advantages(network: Backbone) -> None:
    """A sample whose scores are all equal gets weight 0; held-out samples get no advantages."""
    module = offline(network)
    pairs = scored(network, [[0.1, 0.9], [0.5, 0.5]])
    formed = module.form_pairs(pairs)
    torch.testing.assert_close(formed.advantages[0], torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)
    assert formed.advantages[1].tolist() == [0, 0]
    assert formed.weights.tolist() == [1, 0]
    held_out = module.eval().form_pairs(pairs)
    assert held_out.advantages is None
    with torch.no_grad():
        module.validation_step(pairs, 0)
    means = module.held_out.compute()
    assert means["margin"] == 0
    assert "loss" not in means
    both = offline(network, deviation="global").form_pairs(pairs)
    deviation = float(torch.tensor([0.1, 0.9, 0.5, 0.5]).double().std(correction=0)) + 1e-4
    assert both.advantages[0].tolist() == pytest.approx([-0.4 / deviation, 0.4 / deviation])


def test_stored_images_without_scores_are_refused(network: Backbone) -> None:
    with pytest.raises(InputError, match="two or more images of each prompt with a score"):
        offline(network).form_pairs(image_pairs())


def test_stored_pairs_are_no_collection(network: Backbone) -> None:
    with pytest.raises(InputError, match="DiffusionNFT trains on its own roll-outs"):
        online(network).training_step(image_pairs(), 0)


def test_without_a_drift_it_needs_no_reference(tiny_folder: str) -> None:
    bare = StableDiffusion(tiny_folder, reference="none")
    module = offline(bare, drift=0.0)
    assert not module.needs_reference
    pairs = module.form_pairs(scored(bare, [[0.1, 0.9], [0.5, 0.2]]))
    module.losses(module.log_ratios(pairs), pairs).mean().backward()
    assert offline(StableDiffusion(tiny_folder)).needs_reference


def test_a_consistency_model_is_refused(tiny_lcm_folder: str) -> None:
    from lit_prefopt.backbones import LatentConsistency

    with pytest.raises(InputError, match="consistency model has no denoising target"):
        offline(LatentConsistency(tiny_lcm_folder))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"beta": 0.0}, "beta is 0.0; give a number above 0"),
        ({"drift": -0.1}, "drift is -0.1; give a number from 0"),
        ({"trajectories": 1}, "trajectories is 1; give a number from 2"),
    ],
)
def test_bad_settings(backbone: StableDiffusion, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        online(backbone, **change)


@pytest.mark.parametrize(
    ("schedule", "step", "decay"),
    [
        (AverageSchedule(), 0, 0.0),
        (AverageSchedule(), 200, 0.2),
        (AverageSchedule(), 900, 0.5),
        (AverageSchedule(0.0075, 0.999, 75), 75, 0.0),
        (AverageSchedule(0.0075, 0.999, 75), 175, 0.75),
        (AverageSchedule(0.0075, 0.999, 75), 500, 0.999),
    ],
)
def test_the_weight_of_the_old_average(schedule: AverageSchedule, step: int, decay: float) -> None:
    assert schedule.decay(step) == pytest.approx(decay)


@pytest.mark.parametrize("name", ["rate", "limit", "start"])
def test_a_bad_schedule(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is -1; give a number from 0"):
        AverageSchedule(**{name: -1})


class Followed(Callback):
    """Notes weights and average after every batch, and the seeds of the batches."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.seeds: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: OnPolicyModule, *rest: Any) -> None:
        average = next((c for c in trainer.callbacks if isinstance(c, SamplingAverage)), None)
        [name, *_] = sorted(n for n in trained(pl_module) if "lora_B" in n)
        self.weights.append(trained(pl_module)[name].detach().clone())
        if average is not None:
            self.averages.append(average.average[name].clone())
        self.seeds.append(rest[1].seeds.tolist())


def run(
    method: OnPolicyModule, prompts: PromptFile, root: Path, steps: int, resume: bool = False
) -> Followed:
    """Train so many steps in collections of four batches, with a checkpoint at each step."""
    followed = Followed()
    data = PromptCollections(prompts, 3, batches=4, round_size=2)
    saving = ModelCheckpoint(root, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving, followed, PolicyAveraging(0.5)],
    )
    last = str(root / "last.ckpt") if resume else None
    trainer.fit(method, data, ckpt_path=last, weights_only=True)
    return followed


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(7)))
    return PromptFile(str(tmp_path / "prompts.txt"))


def made(name: str, folder: str) -> OnPolicyModule:
    torch.manual_seed(0)
    backbone = StableDiffusion3(folder, lora=LoRA(4))
    if name == "nft":
        schedule = AverageSchedule(rate=0.05, limit=0.6)
        return DiffusionNFT(
            backbone, AdamW(1e-2), judge=Brightness(), sampling=HOW, beta=1.0, drift=1e-4,
            trajectories=3, average=schedule, check_base=False,
        )  # fmt: skip
    how = Sampling(steps=3, guidance=2.0, eta=0.7)
    return PolicyGradient(
        backbone, AdamW(1e-2), judge=Brightness(), sampling=how, eps=0.1, kl=0.01, trajectories=3,
        deviation="global", noisy_steps=2, latest_start=1, trust_region=1e-3, check_base=False,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["amid", "at the end", "amid the second"])
@pytest.mark.parametrize("name", ["nft", "policy gradient"])
def test_a_stopped_run_goes_on_exactly(
    name: str, stop: int, tiny_sd35_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    method = made(name, tiny_sd35_folder)
    whole = run(method, prompts, tmp_path / "whole", 10)
    first = run(made(name, tiny_sd35_folder), prompts, tmp_path / "parts", stop)
    again = made(name, tiny_sd35_folder)
    second = run(again, prompts, tmp_path / "parts", 10, resume=True)
    assert first.seeds + second.seeds == whole.seeds
    for (key, a), (_, b) in zip(method.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    pairs = zip(whole.averages, first.averages + second.averages, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(whole.weights[0], whole.weights[-1])


def test_the_average_follows_when_a_collection_ends(
    tiny_sd35_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    """Still within a collection; then decay times the old average plus the rest of the weights."""
    seen = run(made("nft", tiny_sd35_folder), prompts, tmp_path, 9)
    start = torch.zeros_like(seen.weights[0])  # LoRA's up matrices start at zero
    assert all(torch.equal(average, start) for average in seen.averages[:4])
    fourth = 0.2 * start + 0.8 * seen.weights[3]  # noted before the batch's own update
    assert fourth.abs().max() > 0
    assert all(torch.equal(average, seen.averages[4]) for average in seen.averages[4:8])
    torch.testing.assert_close(seen.averages[4], fourth)
    torch.testing.assert_close(seen.averages[8], 0.4 * fourth + 0.6 * seen.weights[7])


def test_the_average_samples(tiny_sd35_folder: str, prompts: PromptFile, tmp_path: Path) -> None:
    """Images after a training are those of the average, and the weights are untouched."""
    method = made("nft", tiny_sd35_folder)
    assert isinstance(method, DiffusionNFT)
    run(method, prompts, tmp_path, 8)
    weights = {name: p.detach().clone() for name, p in trained(method).items()}
    found = method.collect(TEXTS, SEEDS)
    assert all(torch.equal(p, weights[name]) for name, p in trained(method).items())
    average = {name: value.clone() for name, value in method.average.average.items()}
    method.average.average = {}
    own = method.collect(TEXTS, SEEDS)
    assert not torch.equal(own.latents, found.latents)
    for name, parameter in trained(method).items():
        parameter.data.copy_(average[name])
    assert torch.equal(method.collect(TEXTS, SEEDS).latents, found.latents)


def test_a_checkpoint_without_the_average_is_refused(
    tiny_sd35_folder: str, prompts: PromptFile, tmp_path: Path
) -> None:
    run(made("policy gradient", tiny_sd35_folder), prompts, tmp_path, 4)
    with pytest.raises(InputError, match="no average of its weights"):
        run(made("nft", tiny_sd35_folder), prompts, tmp_path, 8, resume=True)


def test_autocast_uses_no_copies_of_other_weights(tiny_sd35_folder: str) -> None:
    """Half-precision copies that autocast keeps of the average do not reach the policy."""
    torch.manual_seed(0)
    backbone = StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))
    module = online(backbone)
    made_pairs = module.collect(TEXTS, SEEDS)
    pairs = module.draw(made_pairs, torch.arange(3), torch.arange(3))
    module.average.average = {name: p.detach() + 0.1 for name, p in trained(module).items()}
    moved(backbone, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        ratios = module.log_ratios(pairs)
        loss = module.losses(ratios, pairs).mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained(module).values())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        noised = module.add_noise(pairs)
        alone = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
        error = (alone.float() - noised.target.flatten(0, 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(ratios.policy_error[:, 0].detach(), error)
