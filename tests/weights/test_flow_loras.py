"""LoRAs of FLUX.1, FLUX.2, Qwen-Image and Z-Image in all namings, there, back and by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.write_lora import (
    write_comfyui_lora,
    write_diffusers_lora,
    write_kohya_lora,
)
from lit_prefopt.weights.lora_files import LoRALayer, read_lora
from lit_prefopt.weights.lora_layers import adaptable
from lit_prefopt.weights.merge import match_lora
from tests.helpers.flow_families import FLOW_FAMILIES, FlowFamily

WRITERS = {
    "diffusers-lora": write_diffusers_lora,
    "kohya": write_kohya_lora,
    "comfyui": write_comfyui_lora,
}
Layers = dict[tuple[str, str], LoRALayer]


@pytest.fixture(params=FLOW_FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BasePipeline]:
    """Pipelines whose transformer is configured as wide as the published one, by family."""
    found = {}
    for name, case in FLOW_FAMILIES.items():
        folder = case.write(tmp_path_factory.mktemp(name) / "base")
        config = case.empty().config
        kept = {key: config[key] for key in config if key != "_use_default_values"}
        stated = kept | {"_class_name": case.kind.__name__}
        (folder / "transformer" / "config.json").write_text(json.dumps(stated))
        found[name] = BasePipeline(str(folder))
    return found


def random_layers(net: nn.Module, alphas: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Layers:
    """Return a LoRA of all layers of a transformer, of several ranks and alphas."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for number, name in enumerate(adaptable(net)):
        rank = 2 + number % 2
        outputs, inputs = net.get_submodule(name).weight.shape
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        alpha = alphas[number % len(alphas)]
        layers["transformer", name] = LoRALayer(down, up, alpha)
    return layers


def assert_same_updates(ours: Layers, theirs: Layers) -> None:
    assert ours.keys() == theirs.keys()
    for key, layer in theirs.items():
        torch.testing.assert_close(ours[key].delta, layer.delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", WRITERS)
def test_every_layer_comes_back(
    name: str, to: str, bases: dict[str, BasePipeline], tmp_path: Path
) -> None:
    base, file = bases[name], tmp_path / "lora.safetensors"
    layers = random_layers(base.skeleton()["transformer"])
    WRITERS[to](layers, file, base, torch.float32)
    back = match_lora(base.family, base.skeleton(), read_lora(file))
    assert_same_updates(back, layers)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_one_strength_comes_back_bit_for_bit(
    name: str, to: str, bases: dict[str, BasePipeline], tmp_path: Path
) -> None:
    """Pieces of a fused layer with ranks of their own become one layer, and are found in it."""
    base, file = bases[name], tmp_path / "lora.safetensors"
    layers = {
        key: layer._replace(alpha=float(layer.rank))
        for key, layer in random_layers(base.skeleton()["transformer"]).items()
    }
    WRITERS[to](layers, file, base, torch.float32)
    state = load_file(file)
    back = match_lora(base.family, base.skeleton(), read_lora(file))
    assert back.keys() == layers.keys()
    for key, layer in layers.items():
        assert torch.equal(back[key].down, layer.down)
        assert torch.equal(back[key].up, layer.up)
        assert back[key].alpha == layer.alpha
    again = tmp_path / "again.safetensors"
    WRITERS[to](back, again, base, torch.float32)
    written = load_file(again)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
