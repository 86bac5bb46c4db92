"""LoRA files that no trainer should write: each is read whole, or refused with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.models import load_model
from lit_prefopt.families import Family
from lit_prefopt.families.known import FAMILIES
from lit_prefopt.families.lora_prefixes import DENOISER, PREFIXES
from lit_prefopt.families.stable_diffusion import SD1
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.weights.lora_files import LoRALayer, read_lora
from lit_prefopt.weights.lora_layers import adaptable, original_layers
from lit_prefopt.weights.merge import match_lora, merge_lora
from tests.helpers.exporting import refused
from tests.helpers.flow_families import FLOW_FAMILIES
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_sd3 import tiny_sd3_transformer

State = dict[str, Tensor]


class Model(NamedTuple):
    """A denoiser, and one of its square layers."""

    family: Family
    net: nn.Module
    layer: str
    other: str

    @property
    def key(self) -> str:
        """Beginning of the layer's keys in diffusers' layout."""
        return f"{self.family.denoiser.name}.{self.layer}"

    def matrices(self, layer: str | None = None) -> tuple[Tensor, Tensor]:
        """Return the two matrices of a LoRA of rank 2."""
        weight = self.net.get_submodule(layer or self.layer).weight
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        ones = [1] * (weight.ndim - 2)
        return down, torch.randn(len(weight), 2, *ones, generator=generator)

    def plain(self) -> State:
        """Return a LoRA of the layer."""
        down, up = self.matrices()
        return {f"{self.key}.lora_A.weight": down, f"{self.key}.lora_B.weight": up}

    def read(self, state: State, folder: Path) -> dict[tuple[str, str], LoRALayer]:
        """Write a file and match it with the denoiser."""
        file = folder / "odd.safetensors"
        save_file({key: x.contiguous() for key, x in state.items()}, file)
        return match_lora(self.family, {self.family.denoiser.name: self.net}, read_lora(file))


def _model(family: Family, net: nn.Module) -> Model:
    names = adaptable(net)
    layer = next(name for name in names if name.endswith("to_out.0"))
    return Model(family, net, layer, next(name for name in names if name.endswith("to_k")))


BUILDERS: dict[str, Callable[[], Model]] = {
    **{
        name: lambda case=case: _model(case.names, case.build())
        for name, case in FLOW_FAMILIES.items()
    },
    "sd3": lambda: _model(SD3, tiny_sd3_transformer()),
    "sd1": lambda: _model(SD1, tiny_unet()),
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> Model:
    return BUILDERS[request.param]()


def again(model: Model, name: str, prefix: str | None = None) -> State:
    """Return a second LoRA of the layer under another name."""
    down, up = model.matrices()
    start = f"{model.family.denoiser.name}." if prefix is None else prefix
    return {f"{start}{name}.lora_A.weight": 2 * down, f"{start}{name}.lora_B.weight": up}


ADDED: dict[str, tuple[Callable[[Model], State], str]] = {
    "DoRA": (lambda m: {f"{m.key}.dora_scale": torch.ones(4, 1)}, "contains a DoRA"),
    "DoRA of peft": (
        lambda m: {f"{m.key}.lora_magnitude_vector": torch.ones(4)},
        "contains a DoRA",
    ),
    "LoHa": (lambda m: {f"{m.key}.hada_w1_a": torch.ones(2, 2)}, "contains a LoHa"),
    "LoKr": (lambda m: {f"{m.key}.lokr_w1": torch.ones(2, 2)}, "contains a LoKr"),
    "weights": (lambda m: {f"{m.key}.diff": torch.ones(2, 2)}, "a difference of weights"),
    "biases": (lambda m: {f"{m.key}.diff_b": torch.ones(2)}, "a difference of weights"),
    "Tucker": (lambda m: {f"{m.key}.lora_mid.weight": torch.ones(2, 2)}, "a Tucker decomposition"),
    "strange key": (lambda m: {"step": torch.ones(1)}, "contains step, which is in no layout"),
    "strange part": (
        lambda m: {f"{m.key}.reshape_weight": torch.ones(2)},
        "reshape_weight, which is in no layout",
    ),
    "strange layer": (lambda m: again(m, "foo"), "1 of its 2 layers are not in this model.*'foo'"),
    "text encoder": (
        lambda m: again(m, "encoder.layers.0.mlp.fc1", "text_encoder."),
        "also changes the text_encoder, which",
    ),
    "alpha alone": (
        lambda m: {f"{m.family.denoiser.name}.{m.other}.alpha": torch.ones(())},
        "contains only the alpha of its layer .*to_k",
    ),
    "half": (
        lambda m: {f"{m.family.denoiser.name}.{m.other}.lora_A.weight": torch.ones(2, 32)},
        "contains only down of its layer .*to_k",
    ),
    "alphas": (lambda m: {f"{m.key}.alpha": torch.ones(2)}, "the alpha of its layer .*to_out"),
    "empty alpha": (lambda m: {f"{m.key}.alpha": torch.ones(0)}, "the alpha of its layer .*to_out"),
    "true": (lambda m: {f"{m.key}.alpha": torch.tensor(True)}, "the alpha of its layer .*to_out"),
    "two ends": (
        lambda m: {
            f"{m.key}.lora_down.weight": m.matrices()[0],
            f"{m.key}.lora_up.weight": m.matrices()[1],
        },
        "lora_down.weight twice",
    ),
    "two spellings": (
        lambda m: again(m, m.layer.replace(".", "_")),
        "contains the layer .*to_out_0 twice",
    ),
    "two prefixes": (
        lambda m: again(m, m.other, "diffusion_model."),
        "mixes the names of two layouts",
    ),
}
"""Keys beside those of a plain LoRA, and what is said of each."""


@pytest.mark.parametrize("kind", ADDED)
def test_what_is_not_understood_is_named(model: Model, kind: str, tmp_path: Path) -> None:
    added, message = ADDED[kind]
    with pytest.raises(InputError, match=message) as stop:
        model.read(model.plain() | added(model), tmp_path)
    sentence = str(stop.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 500 + 2 * len(str(tmp_path))


REPLACED: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = {
    "rank 0": (lambda down, up: (down[:0], up[:, :0]), "the two matrices of its layer .* do not"),
    "transposed": (lambda down, up: (down.T, up.T), "it maps 2 values to 2, while .*to_out"),
    "exchanged": (lambda down, up: (up, down), "it maps 2 values to 2, while .*to_out"),
    "int8": (lambda down, up: (down.char(), up.char()), "contains int8 weights of its layer"),
    "complex": (lambda down, up: (down + 0j, up + 0j), "contains complex64 weights of its layer"),
    "one number": (lambda down, up: (down[0], up[:, 0]), "the two matrices of its layer .* do not"),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_matrices_that_are_none_of_a_lora(model: Model, kind: str, tmp_path: Path) -> None:
    changed, message = REPLACED[kind]
    state = dict(zip(model.plain(), changed(*model.matrices()), strict=True))
    with pytest.raises(InputError, match=message):
        model.read(state, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_alpha_of_any_number(model: Model, dtype: torch.dtype, tmp_path: Path) -> None:
    for shape in ((), (1,)):
        alpha = torch.full(shape, 3, dtype=dtype)
        (layer,) = model.read(model.plain() | {f"{model.key}.alpha": alpha}, tmp_path).values()
        down, up = model.matrices()
        torch.testing.assert_close(layer.delta, 3 / 2 * (up @ down), atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_computed_with(model: Model, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also in a fused layer, of which the ranks that reach a piece are looked at."""
    fused = [p for p in original_layers(model.net, model.family.denoiser).items() if p[1].sizes]
    key, wanted = model.key, [model.layer]
    down, up = model.matrices()
    if fused:
        place = fused[0][1]
        wanted = [name for name, one in fused if one.entry.key == place.entry.key]
        key = f"diffusion_model.{place.entry.key}"
        up = torch.randn(sum(place.sizes), 2)
    down, up = down.to(dtype), up.to(dtype)
    found = model.read({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path)
    assert {name for _, name in found} == {*wanted}
    rows = torch.cat([found[model.family.denoiser.name, name].delta for name in wanted])
    order = [place.entry.piece for name, place in fused if name in wanted] if fused else [0]
    product = (up.float() @ down.float()).chunk(len(order))
    torch.testing.assert_close(rows, torch.cat([product[n] for n in order]))


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_kernels_of_a_convolution_are_not_exchanged(name: str, tmp_path: Path) -> None:
    """As many values in another order would be another update."""
    model = BUILDERS[name]()
    convolutions = [
        name
        for name in adaptable(model.net)
        if model.net.get_submodule(name).weight.shape[2:].numel() > 1
    ]
    down, up = model.matrices(convolutions[0])
    key = f"{model.family.denoiser.name}.{convolutions[0]}.lora_"
    (layer,) = model.read({f"{key}A.weight": down, f"{key}B.weight": up}, tmp_path).values()
    assert torch.equal(layer.down, down)
    with pytest.raises(InputError, match="use a LoRA that is not transposed"):
        model.read({f"{key}A.weight": down.permute(0, 2, 3, 1), f"{key}B.weight": up}, tmp_path)


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    """A LoHa in ComfyUI's names, in which no key contains `lora`."""
    key = "diffusion_model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.hada_"
    file = tmp_path / "loha.safetensors"
    save_file({f"{key}{end}": torch.ones(2, 2) for end in ("w1_a", "w1_b", "w2_a", "w2_b")}, file)
    return file


def test_every_command_names_another_adapter(loha: Path, tiny_folder: str, tmp_path: Path) -> None:
    message = "contains a LoHa .*, which is not a plain LoRA"
    with pytest.raises(InputError, match=message):
        StableDiffusion(tiny_folder, start_lora=str(loha))
    with pytest.raises(InputError, match=message):
        StableDiffusion(tiny_folder, lora=LoRA(2), training_adapter=str(loha))
    with pytest.raises(InputError, match=message):
        load_model(str(loha), base=tiny_folder)
    to = ("--to", "kohya", "--output", tmp_path / "out.safetensors", "--base", tiny_folder)
    assert "contains a LoHa" in refused("--source", loha, *to)
    whole = ("--to", "unet", "--output", tmp_path / "unet")
    assert "contains a LoHa" in refused("--source", loha, *whole, "--base", tiny_folder)


def test_a_text_encoder_that_no_model_of_the_family_has(tmp_path: Path) -> None:
    model = BUILDERS["z-image"]()
    state = model.plain() | again(model, "encoder.layers.0.mlp.fc1", "text_encoder_2.")
    with pytest.raises(InputError, match="which a model of Z-Image does not have: use a LoRA of"):
        model.read(state, tmp_path)


def test_metadata_of_changed_weights(tmp_path: Path) -> None:
    """PiSSA subtracts its start from the base, so that the file alone is another update."""
    model = BUILDERS["sd1"]()
    file = tmp_path / "pissa.safetensors"
    metadata = {"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa", "unet.r": 2}'}
    save_file(model.plain(), file, metadata)
    with pytest.raises(InputError, match="was initialised by pissa, which changes the weights"):
        read_lora(file)


def test_a_beginning_has_one_role() -> None:
    for family in FAMILIES:
        assert PREFIXES[f"{family.denoiser.kohya}_"] == DENOISER
        assert PREFIXES[family.denoiser.comfyui] == DENOISER
        for part in family.encoders:
            assert PREFIXES[f"{part.name}."] == part.name
            for start in (f"{part.kohya}_", part.comfyui):
                assert PREFIXES[start] in part.lora_roles, (family.name, start)


def test_merging_changes_that_layer_alone(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(model.plain(), file)
    before = {name: x.clone() for name, x in model.net.state_dict().items()}
    merge_lora(model.family, model.net, {}, read_lora(file))
    changed = {n for n, x in model.net.state_dict().items() if not torch.equal(x, before[n])}
    model.net.load_state_dict(before)
    assert changed == {f"{model.layer}.weight"}
