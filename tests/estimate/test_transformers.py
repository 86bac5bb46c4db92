"""FLOPs and memory of flow transformers: by hand, by what is kept, and at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.functional import scaled_dot_product_attention

from lit_prefopt.backbones import LoRA, StableDiffusion3, trained
from lit_prefopt.conditioning import Prompt, Ragged
from lit_prefopt.estimate.memory import footprint, savings
from lit_prefopt.estimate.step_cost import checkpointing, flop_counter, step_cost
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.estimate.test_memory import kept_for_backward, size
from tests.helpers.batches import images
from tests.helpers.full_size import SD35_TOKENS, random_backbone, random_pairs
from tests.helpers.tiny_sd3 import SD35, tiny_sd3_transformer

TEXT = 20


def flops_by_hand(net: SD3Transformer2DModel, side: int, text: int) -> int:
    """Return the FLOPs of one row's forward: 2 for each weight of a layer at each of its tokens."""
    c: Any = net.config
    width, patch = net.inner_dim, c.patch_size**2 * c.in_channels
    image = (side // c.patch_size) ** 2
    both, square = image + text, width**2
    total = 2 * image * patch * width * 2  # into patches, and out of them
    total += 2 * text * c.joint_attention_dim * width
    total += 2 * ((256 + width) + (c.pooled_projection_dim + width)) * width  # time, pooled text
    total += 2 * 2 * square  # modulation of the last norm
    for number in range(c.num_layers):
        dual, last = number in c.dual_attention_layers, number == c.num_layers - 1
        modulation = (9 if dual else 6) + (2 if last else 6)
        attended, out = 3 * both, (image if last else both)
        feed_forward = 8 * (image if last else both)
        total += 2 * square * (modulation + attended + out + feed_forward)
        total += 4 * both**2 * width
        if dual:
            total += 2 * square * 4 * image + 4 * image**2 * width
    return total


@pytest.mark.parametrize("kind", [{}, SD35, {**SD35, "num_layers": 3}], ids=["3", "3.5", "deeper"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_costs_what_its_tokens_cost(kind: dict[str, Any], device: str) -> None:
    net = tiny_sd3_transformer(**kind).to(device)
    sizes = net.config
    with torch.no_grad(), flop_counter() as counter:
        net(
            hidden_states=torch.zeros(2, 16, 8, 8, device=device),
            timestep=torch.zeros(2, device=device),
            encoder_hidden_states=torch.zeros(2, TEXT, sizes.joint_attention_dim, device=device),
            pooled_projections=torch.zeros(2, sizes.pooled_projection_dim, device=device),
        )
    assert counter.get_total_flops() == 2 * flops_by_hand(net, 8, TEXT)


def test_attention_is_counted_forward_and_backward() -> None:
    """Two products forward, and five backward, which makes the scores again."""
    rows = torch.randn(2, 4, 64, 16, requires_grad=True)
    product = 2 * (2 * 4) * 64 * 64 * 16
    with flop_counter() as counter:
        out = scaled_dot_product_attention(rows, rows, rows)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 7 * product


def dpo(folder: str, **options: Any) -> DiffusionDPO:
    module = DiffusionDPO(StableDiffusion3(folder, **options), AdamW(1e-3), beta=5000.0)
    module.train()
    return module


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_a_steps_cost_by_shapes_is_the_real_ones(tiny_sd35_folder: str, lora: LoRA | None) -> None:
    """From a cache, so that only the transformer is at work."""
    module = dpo(tiny_sd35_folder, lora=lora, encoders=False)
    batch = random_pairs("sd35-medium", module.backbone, 4, 64, 0)  # 16 x 16 latents
    cost = step_cost(module, batch)
    assert module.measured == {}
    with flop_counter() as counter:
        kept = kept_for_backward(module, batch)
    assert cost.flops == counter.get_total_flops()
    # a LoRA keeps less beside what comes and goes
    most, saved = (1.35, 0.9) if lora else (1.25, 0.75)
    assert kept <= cost.activations <= most * kept
    with checkpointing(module, True):
        twice = step_cost(module, batch)
    assert twice.activations < saved * cost.activations
    assert twice.flops > 1.1 * cost.flops


def test_a_network_that_counts_tokens_costs_as_with_full_prompts(tmp_path: Path) -> None:
    """Lumina Image 2.0 reads from its mask how long each prompt is."""
    changes = {"hidden_size": 24, "num_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1}
    changes |= {"axes_dim_rope": (4, 2, 2), "multiple_of": 16}
    backbone = random_backbone("lumina2", tmp_path, changes, lora=LoRA(4), text_tokens=20)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0).train()
    batch = random_pairs("lumina2", backbone, 2, 64, 0)
    values = torch.randn(2 * 20, 2304)
    full = batch._replace(prompt=Prompt({"hidden": Ragged(values, (20, 20))}))
    short = batch._replace(prompt=Prompt({"hidden": Ragged(values[:27], (20, 7))}))
    with flop_counter() as counter:
        kept_for_backward(module, full)
    costs = [step_cost(module, one) for one in (full, short)]
    assert costs[0].flops == costs[1].flops == counter.get_total_flops()


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_a_footprint_is_what_is_there(tiny_sd35_folder: str, lora: LoRA | None) -> None:
    module = dpo(tiny_sd35_folder, lora=lora)
    optimizer = module.optimizer.build(trained(module).values())
    module.training_step(images(2), 0).backward()
    optimizer.step()
    parts, policy = footprint(module), module.backbone.policy
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert (parts.gradients, parts.states) == (size(gradients), size(states))
    positions = policy.denoiser.pos_embed.pos_embed  # a table that is no parameter
    weights = size(policy.denoiser.parameters())
    assert parts.trained + parts.frozen == weights + size([positions])
    assert parts.reference == (0 if lora else weights + size([positions]))
    named = {"vae", "text encoder", "text encoder 2", "text encoder 3"}
    assert set(parts.others) == named
    encoders = sum(size(part.parameters()) for part in module.backbone.encoders.values())
    assert abs(sum(parts.others.values()) - encoders) < 10_000  # buffers
    advised = {saving.how.split()[0] for saving in savings(module, images(4))}
    assert {"--backbone.gradient_checkpointing", "--data.batch_size"} <= advised
    assert ("--backbone.lora.rank" in advised) == (lora is None)


@pytest.mark.slow
def test_stable_diffusion_35_medium_is_estimated_on_the_meta_device(tmp_path: Path) -> None:
    """A LoRA step at full size: 512 pixels are 1024 tokens, beside 333 of the prompt.

    The policy's and the reference's forward, recomputation, and a backward that has no gradients of
    the frozen weights: four forwards, and one score matrix more in each attention's backward.
    """
    with torch.device("meta"):
        backbone = random_backbone("sd35-medium", tmp_path, lora=LoRA(16), dtype="bfloat16")
        module = DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0).train()
    net = module.backbone.policy.denoiser
    batch = random_pairs("sd35-medium", module.backbone, 1, 512, 0)
    own = sum(p.numel() for p in trained(net).values())
    assert sum(p.numel() for p in net.parameters()) - own == 2_243_171_520
    forward = flops_by_hand(net, 64, SD35_TOKENS)

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    plain = step_cost(module, batch, context)
    with checkpointing(module, True):
        twice = step_cost(module, batch, context)
    assert plain.flops == pytest.approx(2 * 3 * forward, rel=0.05)
    assert twice.flops - plain.flops == pytest.approx(2 * forward, rel=0.05)
    parts = footprint(module, twice.activations)
    assert parts.frozen == 2 * (2_243_171_520 + 384 * 384 * 1536)  # and the table of positions
    assert parts.trained == parts.gradients == parts.states / 2 == 4 * own
    assert parts.activations < plain.activations / 4
