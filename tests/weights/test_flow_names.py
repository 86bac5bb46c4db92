"""Original names of flow families: files, there and back."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from lit_prefopt.errors import InputError
from lit_prefopt.families.base import Component
from lit_prefopt.families.flux1 import FLUX1
from lit_prefopt.families.flux2 import FLUX2
from lit_prefopt.families.lumina2 import LUMINA2
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.families.z_image import Z_IMAGE
from lit_prefopt.weights.component_files import WeightsFile, load_from_file, original_state
from tests.helpers.flow_families import FLOW_FAMILIES, randomised
from tests.helpers.tiny_lumina2 import tiny_gemma2, tiny_gemma_tokenizer

START = "model.diffusion_model."

KNOWN = {
    "flux1": {
        "single_blocks.1.linear1.weight": (3 * 3072 + 4 * 3072, 3072),
        "single_blocks.1.linear2.weight": (3072, 5 * 3072),
        "single_blocks.1.norm.key_norm.scale": (128,),
        "double_blocks.0.txt_attn.qkv.bias": (3 * 3072,),
        "double_blocks.0.img_mod.lin.weight": (6 * 3072, 3072),
        "guidance_in.out_layer.weight": (3072, 3072),
        "final_layer.adaLN_modulation.1.weight": (2 * 3072, 3072),
    },
    "flux2": {
        "single_blocks.1.linear1.weight": (3 * 3072 + 6 * 3072, 3072),
        "double_blocks.1.txt_attn.qkv.weight": (3 * 3072, 3072),
        "double_blocks.1.img_mlp.0.weight": (6 * 3072, 3072),
        "double_stream_modulation_txt.lin.weight": (6 * 3072, 3072),
        "txt_in.weight": (3072, 7680),
    },
    "qwen-image": {
        "transformer_blocks.1.attn.add_q_proj.weight": (3072, 3072),
        "transformer_blocks.1.img_mod.1.weight": (6 * 3072, 3072),
        "txt_in.weight": (3072, 3584),
    },
    "z-image": {
        "layers.1.attention.qkv.weight": (3 * 3840, 3840),
        "context_refiner.0.attention.out.weight": (3840, 3840),
        "noise_refiner.1.attention.q_norm.weight": (128,),
        "x_embedder.weight": (3840, 64),
        "final_layer.linear.weight": (64, 3840),
        "cap_pad_token": (1, 3840),
    },
    "chroma": {
        "single_blocks.1.linear1.weight": (3 * 3072 + 4 * 3072, 3072),
        "double_blocks.0.txt_attn.qkv.bias": (3 * 3072,),
        "distilled_guidance_layer.in_proj.weight": (5120, 64),
        "distilled_guidance_layer.layers.4.in_layer.weight": (5120, 5120),
        "distilled_guidance_layer.norms.4.scale": (5120,),
        "distilled_guidance_layer.out_proj.weight": (3072, 5120),
        "final_layer.linear.weight": (64, 3072),
    },
    "lumina2": {
        "layers.1.attention.qkv.weight": (2304 + 2 * 768, 2304),
        "layers.0.adaLN_modulation.1.weight": (4 * 2304, 1024),
        "noise_refiner.0.attention_norm1.weight": (2304,),
        "context_refiner.1.attention_norm1.weight": (2304,),
        "context_refiner.0.feed_forward.w3.weight": (9216, 2304),
        "cap_embedder.0.weight": (2304,),
        "cap_embedder.1.weight": (2304, 2304),
        "t_embedder.mlp.2.weight": (1024, 1024),
        "final_layer.adaLN_modulation.1.weight": (2304, 1024),
        "final_layer.linear.bias": (64,),
    },
}


@pytest.fixture(params=FLOW_FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def read_back(net: nn.Module, component: Component, state: dict[str, Tensor], path: Path) -> None:
    """Check that a network is loaded from a file with every tensor."""
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)

    def build() -> nn.Module:
        own = net.config
        return type(net)(own) if component.package == "transformers" else net.from_config(own)

    loaded = load_from_file(build, WeightsFile(str(path)), component, torch.float32, "itself")
    assert_equal(loaded.state_dict(), net.state_dict())


def test_the_published_width_in_original_names(name: str) -> None:
    """The sizes are those of the published files; diffusers reads the same network in them."""
    case = FLOW_FAMILIES[name]
    net = case.empty()
    original = original_state(net, case.names.denoiser)
    shapes = {key.removeprefix(START): tuple(tensor.shape) for key, tensor in original.items()}
    assert KNOWN[name].items() <= shapes.items()
    state = net.state_dict()
    back = case.convert({key.removeprefix(START): x for key, x in original.items()})
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "z-image"])
def test_diffusers_reads_every_tensor_back(name: str) -> None:
    """FLUX.2's reader fails on the prefix that ComfyUI's checkpoints have."""
    case = FLOW_FAMILIES[name]
    net = case.build()
    original = original_state(net, case.names.denoiser)
    assert all(key.startswith(START) for key in original)
    back = case.convert({key.removeprefix(START): x for key, x in original.items()})
    assert_equal(back, net.state_dict())


@pytest.mark.parametrize("name", ["flux1", "chroma", "lumina2"])
def test_diffusers_reads_every_row_back(name: str) -> None:
    """Its readers of them know one width: one column is enough to see where rows go."""
    case = FLOW_FAMILIES[name]
    net = case.empty()
    generator = torch.Generator().manual_seed(0)
    rows = {
        key: torch.randn(tensor.shape[0], *[1] * (tensor.ndim - 1), generator=generator)
        for key, tensor in net.state_dict().items()
    }
    narrow = nn.Module()
    narrow.state_dict = lambda: dict(rows)  # type: ignore[method-assign]
    original = original_state(narrow, case.names.denoiser)
    assert_equal(case.convert({key.removeprefix(START): x for key, x in original.items()}), rows)


@pytest.mark.parametrize("prefix", [START, "diffusion_model.", ""])
def test_files_in_original_names(name: str, prefix: str, tmp_path: Path) -> None:
    case = FLOW_FAMILIES[name]
    net = case.build()
    original = original_state(net, case.names.denoiser)
    state = {prefix + key.removeprefix(START): tensor for key, tensor in original.items()}
    read_back(net, case.names.denoiser, state, tmp_path / "original.safetensors")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_files_in_diffusers_names(name: str, prefix: str, tmp_path: Path) -> None:
    case = FLOW_FAMILIES[name]
    net = case.build()
    state = {prefix + key: tensor for key, tensor in net.state_dict().items()}
    read_back(net, case.names.denoiser, state, tmp_path / "own.safetensors")


def test_a_tensor_that_is_not_understood_is_named(name: str, tmp_path: Path) -> None:
    """Also in a file of the transformer alone; two families' have a norm that nothing reads."""
    case = FLOW_FAMILIES[name]
    state = original_state(case.build(), case.names.denoiser)
    state |= {START + key: torch.ones(32) for key in case.names.denoiser.ignored}
    assert len(case.names.denoiser.ignored) == (name in ("z-image", "lumina2"))
    for prefix in (START, ""):
        own = {prefix + key.removeprefix(START): x.clone() for key, x in state.items()}
        net, path = case.build(), tmp_path / "file.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            known = own.keys() - {prefix + key for key in case.names.denoiser.ignored}
            read_back(net, case.names.denoiser, {key: own[key] for key in known}, path)
            read_back(net, case.names.denoiser, own, path)
        strange = own | {f"{prefix}distilled_guidance_layer.weight": torch.ones(3)}
        with pytest.warns(UserWarning, match=r"1 tensors .* not used \(.*distilled_guidance_layer"):
            read_back(net, case.names.denoiser, strange, path)


def test_a_fused_layer_of_another_width(tmp_path: Path) -> None:
    case = FLOW_FAMILIES["flux1"]
    state = original_state(case.build(), case.names.denoiser)
    key = f"{START}single_blocks.0.linear1.weight"
    state[key] = state[key][:-32].contiguous()
    save_file({k: x.clone() for k, x in state.items()}, tmp_path / "cut.safetensors")
    file = WeightsFile(str(tmp_path / "cut.safetensors"))
    with pytest.raises(InputError, match=r"linear1.weight is \(192, 32\) and should be"):
        load_from_file(case.build, file, case.names.denoiser, torch.float32, "itself")


def tiny_vae(kind: type[nn.Module], **config: object) -> nn.Module:
    """Return a VAE of four blocks, every tensor of which is random, statistics too."""
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 2,
    }
    return randomised(kind(**blocks | config))


@pytest.mark.parametrize("family", [FLUX1, Z_IMAGE, LUMINA2])
def test_the_vae_of_flux1_z_image_and_lumina2(family: object, tmp_path: Path) -> None:
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = tiny_vae(AutoencoderKL, latent_channels=16, layers_per_block=2, **bare)
    state = original_state(vae, family.vae)
    assert all(key.startswith("vae.") for key in state)
    assert state["vae.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert_equal(convert_ldm_vae_checkpoint(state, vae.config), vae.state_dict())
    for prefix in ("vae.", "first_stage_model.", ""):
        renamed = {prefix + key.removeprefix("vae."): x for key, x in state.items()}
        read_back(vae, family.vae, renamed, tmp_path / "vae.safetensors")


def test_the_vae_of_flux2(tmp_path: Path) -> None:
    """Its statistics are kept; the counter, which nothing reads, may be missing."""
    vae = tiny_vae(AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    state = original_state(vae, FLUX2.vae)
    ends = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    assert {f"vae.{end}.weight" for end in ends.values()} <= state.keys()
    inner = {key.removeprefix("vae."): x for key, x in state.items()}
    for top, end in ends.items():  # as in ComfyUI, which diffusers' reader of older VAEs knows
        inner |= {f"{top}.{kind}": inner.pop(f"{end}.{kind}") for kind in ("weight", "bias")}
    back = convert_ldm_vae_checkpoint(dict(inner), vae.config)
    statistics = {key: x for key, x in inner.items() if key.startswith("bn.")}
    assert len(statistics) == 3
    assert_equal(back | statistics, vae.state_dict())
    for layout in (state, inner, vae.state_dict()):
        read_back(vae, FLUX2.vae, layout, tmp_path / "vae.safetensors")
    without = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
    assert len(without) == len(state) - 1
    read_back(vae, FLUX2.vae, without, tmp_path / "vae.safetensors")
    del without["vae.bn.running_var"]
    with pytest.raises(InputError, match=r"lacks 1 of .* tensors \(vae.bn.running_var\)"):
        read_back(vae, FLUX2.vae, without, tmp_path / "vae.safetensors")


def test_the_vae_of_qwen_image(tmp_path: Path) -> None:
    """It has the names of Wan's VAE, which diffusers reads in the published form alone."""
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    vae = randomised(AutoencoderKLQwenImage(**sizes, temperal_downsample=[False, True, True]))
    state = original_state(vae, QWEN_IMAGE.vae)
    inner = {key.removeprefix("vae."): x for key, x in state.items()}
    assert inner["encoder.downsamples.0.residual.2.weight"].shape == (4, 4, 3, 3, 3)
    assert inner["decoder.upsamples.4.shortcut.weight"].shape == (16, 8, 1, 1, 1)
    assert_equal(convert_wan_vae_to_diffusers(dict(inner)), vae.state_dict())
    for layout in (state, inner, vae.state_dict()):
        read_back(vae, QWEN_IMAGE.vae, layout, tmp_path / "vae.safetensors")


QWEN3 = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32},
    **{"bos_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_with_its_output_layer(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Qwen3ForCausalLM(Qwen3Config(**QWEN3, tie_word_embeddings=tied))
    part = FLUX2.encoders[0]
    state = original_state(net, part)
    start = "text_encoders.qwen3_4b.transformer."
    assert state[f"{start}model.layers.1.mlp.up_proj.weight"].shape == (16, 16)
    for prefix in (start, "text_encoders.qwen3_8b.transformer.", "text_encoder.", ""):
        renamed = {prefix + key.removeprefix(start): x for key, x in state.items()}
        read_back(net, part, renamed, tmp_path / "te.safetensors")
    without = {key: x for key, x in state.items() if "lm_head" not in key}
    assert len(without) == len(state) - 1
    if tied:
        read_back(net, part, without, tmp_path / "te.safetensors")
        return
    with pytest.raises(InputError, match=r"lacks 1 of .* tensors \(lm_head.weight\)"):
        read_back(net, part, without, tmp_path / "te.safetensors")


def test_a_language_model_without_its_output_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, part = Qwen3Model(Qwen3Config(**QWEN3)), Z_IMAGE.encoders[0]
    state = original_state(net, part)
    start = "text_encoders.qwen3_4b.transformer."
    assert f"{start}model.embed_tokens.weight" in state
    alone = {key.removeprefix(start): x for key, x in state.items()}
    for layout in (state, alone, net.state_dict()):
        read_back(net, part, layout, tmp_path / "te.safetensors")


def test_gemma_2(tmp_path: Path) -> None:
    """A whole checkpoint of ComfyUI also has a scale that nothing reads."""
    torch.manual_seed(0)
    net, part = tiny_gemma2(tiny_gemma_tokenizer()), LUMINA2.encoders[0]
    state = original_state(net, part)
    start = "text_encoders.gemma2_2b.transformer."
    assert f"{start}model.layers.2.post_feedforward_layernorm.weight" in state
    alone = {key.removeprefix(start): x for key, x in state.items()}
    scaled = state | {"text_encoders.gemma2_2b.logit_scale": torch.ones(())}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for layout in (scaled, alone, net.state_dict()):
            read_back(net, part, layout, tmp_path / "te.safetensors")


def test_a_language_model_that_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"intermediate_size": 16})
    net, part = Qwen2_5_VLForConditionalGeneration(config), QWEN_IMAGE.encoders[0]
    state = original_state(net, part)
    start = "text_encoders.qwen25_7b.transformer."
    wanted = {"model.layers.0.self_attn.q_proj.bias", "visual.blocks.0.attn.qkv.weight"}
    assert {start + key for key in wanted} <= state.keys()
    alone = {key.removeprefix(start): x for key, x in state.items()}
    for layout in (state, alone, net.state_dict()):
        read_back(net, part, layout, tmp_path / "te.safetensors")
