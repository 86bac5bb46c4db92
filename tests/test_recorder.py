"""The recorder of pipelines: what it keeps, and that its comparison finds the first difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.helpers.recorder import Recorder, copied, first_difference, parts_of
from tests.helpers.tiny_sd3 import load_stock_sd3, tiny_sd3_vae

STEPS = 3


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd3", "sd35"])
def pipeline(request: pytest.FixtureRequest) -> DiffusionPipeline:
    def folder(name: str) -> str:
        return request.getfixturevalue(name)

    match request.param:
        case "sd1":
            loaded = StableDiffusionPipeline.from_pretrained(folder("tiny_folder"))
        case "sdxl":
            loaded = StableDiffusionXLPipeline.from_pretrained(folder("tiny_xl_folder"))
        case "sd3":
            loaded = load_stock_sd3(folder("tiny_sd3_folder"))
        case _:
            loaded = load_stock_sd3(folder("tiny_sd35_without_t5_folder"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def recorded(pipeline: DiffusionPipeline, text: str | None = "a cat", **options: Any) -> Recorder:
    options = {"guidance_scale": 2.0, "height": 32, "width": 32} | options
    seed = torch.Generator().manual_seed(3)
    with Recorder(parts_of(pipeline)) as recorder:
        pipeline(text, num_inference_steps=STEPS, generator=seed, output_type="pt", **options)
    return recorder


def denoiser(pipeline: DiffusionPipeline) -> tuple[str, str]:
    """Return the denoiser's name and that of its first argument."""
    flow = isinstance(pipeline, StableDiffusion3Pipeline)
    return ("transformer", "hidden_states") if flow else ("unet", "sample")


def test_every_part_is_recorded_by_step(pipeline: DiffusionPipeline) -> None:
    record = recorded(pipeline)
    name, first = denoiser(pipeline)
    assert [call.step for call in record.of(name)] == list(range(STEPS))
    assert [call.step for call in record.of("scheduler.step")] == list(range(STEPS))
    assert [call.step for call in record.of("vae.decode")] == [STEPS]
    encoders = [part for part in record.parts if part.startswith("text_encoder")]
    assert len(encoders) == sum(
        value is not None
        for key, value in pipeline.components.items()
        if key.startswith("text_encoder")
    )
    texts = 1 if name == "unet" and len(encoders) == 2 else 2  # SDXL's empty prompt is zeros
    for part in encoders:
        assert [call.step for call in record.of(part)] == [0] * texts
    for i in range(STEPS - 1):
        (step,), (following,) = record.of("scheduler.step", i), record.of(name, i + 1)
        assert torch.equal(following.arguments[first], step.result[0].repeat(2, 1, 1, 1))
    assert len(record.calls) == 2 * STEPS + 1 + texts * len(encoders)


def test_equal_calls_are_equal_in_every_bit(pipeline: DiffusionPipeline) -> None:
    assert first_difference(recorded(pipeline), recorded(pipeline)) is None


def test_the_first_difference_is_named(pipeline: DiffusionPipeline) -> None:
    """A callback that nudges one latent after step 1 is seen at the denoiser of step 2."""
    name, first = denoiser(pipeline)

    def nudge(_: object, step: int, t: object, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            kept["latents"] = kept["latents"].clone()
            kept["latents"][0, 1, 2, 3] += 1e-3
        return kept

    plain, nudged = recorded(pipeline), recorded(pipeline, callback_on_step_end=nudge)
    difference = first_difference(plain, nudged)
    assert difference is not None
    assert difference.startswith(f"{name} of step 2, {first}: float32 (2, ")
    assert difference.endswith("largest difference 0.001 at (0, 1, 2, 3)")
    later = first_difference(plain, nudged, [name], atol=1.5e-3)
    assert later is None or "result" in later
    assert first_difference(plain, nudged, [name], atol=1e-4) is not None


def test_another_prompt_is_seen_at_the_first_text_encoder(pipeline: DiffusionPipeline) -> None:
    difference = first_difference(recorded(pipeline), recorded(pipeline, "a dog"))
    assert difference is not None
    assert difference.startswith("text_encoder of step 0, input_ids: int64 (1, ")


def test_fewer_calls_are_a_difference(pipeline: DiffusionPipeline) -> None:
    plain, unguided = recorded(pipeline), recorded(pipeline, guidance_scale=1.0)
    assert first_difference(plain, unguided, ["vae.decode"], atol=10) is None
    unguided.calls = [call for call in plain.calls if call.part != "vae.decode"]
    assert first_difference(plain, unguided) == (
        f"{len(plain.calls)} calls against {len(unguided.calls)}; one has vae.decode of step 3"
    )


def test_parts_are_left_as_they_were(pipeline: DiffusionPipeline) -> None:
    parts = parts_of(pipeline)
    before = {name: getattr(owner, method) for name, (owner, method) in parts.items()}
    with pytest.raises(RuntimeError, match="stopped"), Recorder(parts):
        raise RuntimeError("stopped")
    for name, (owner, method) in parts.items():
        assert method not in vars(owner)
        assert getattr(owner, method) == before[name]


def test_a_parts_name_must_be_in_both(pipeline: DiffusionPipeline) -> None:
    one, other = Recorder(parts_of(pipeline)), Recorder({})
    with pytest.raises(KeyError, match="vae.decode"):
        first_difference(one, other, ["vae.decode"])


def flux() -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return a pipeline whose latents are packed, without text encoders, and its prompts."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(scheduler, tiny_sd3_vae(), None, None, None, None, transformer)
    prompts = {"prompt_embeds": torch.randn(1, 5, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipeline, prompts


def z_image() -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return a pipeline whose transformer takes and returns lists, and its prompts."""
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = ZImagePipeline(scheduler, tiny_sd3_vae(), None, None, transformer)
    prompts = {
        "prompt_embeds": [torch.randn(7, 16)],
        "negative_prompt_embeds": [torch.randn(3, 16)],
    }
    return pipeline, prompts


@pytest.mark.parametrize("made", [flux, z_image])
def test_other_families_are_recorded_too(made: Any) -> None:
    torch.manual_seed(0)
    pipeline, prompts = made()
    pipeline.set_progress_bar_config(disable=True)
    one, same = (recorded(pipeline, None, **prompts) for _ in range(2))
    assert len(one.of("transformer")) == len(one.of("scheduler.step")) == STEPS
    assert first_difference(one, same) is None
    prompts["prompt_embeds"] = copied(prompts["prompt_embeds"])
    prompts["prompt_embeds"][0][1, 2] += 1
    difference = first_difference(one, recorded(pipeline, None, **prompts))
    assert difference is not None
    assert difference.startswith("transformer of step 0, ")
    assert difference.endswith(
        "largest difference 1 at " + ("(0, 1, 2)" if made is flux else "(1, 2)")
    )


class Network(torch.nn.Module):
    """Changes what it gets, and takes what comes as lists and dictionaries."""

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, options: dict | None = None) -> Any:
        x[0].mul_(2)
        return {"sample": x, "t": t}


def recording(x: list[torch.Tensor], *rest: Any, **named: Any) -> Recorder:
    network = Network()
    with Recorder({"network": (network, "forward")}) as recorder:
        network(x, *rest, **named)
    return recorder


def test_arguments_are_those_before_the_call_and_bound_by_name() -> None:
    record = recording([torch.ones(2)], torch.tensor(3.0))
    other = recording([torch.ones(2)], t=torch.tensor(3.0), options=None)
    (call,) = record.of("network")
    assert call.arguments["x"][0].tolist() == [1, 1]
    assert call.result["sample"][0].tolist() == [2, 2]
    assert first_difference(record, other) is None


@pytest.mark.parametrize(
    ("x", "t", "options", "expected"),
    [
        ([torch.ones(2)], torch.tensor(3.0).double(), None, "t: float32 () against float64 ()"),
        ([torch.ones(3)], torch.tensor(3.0), None, "x[0]: float32 (2,) against float32 (3,)"),
        ([torch.ones(2)] * 2, torch.tensor(3.0), None, "x: list of 1 against list of 2"),
        ([torch.ones(2)], torch.tensor(3.0), {"scale": 1}, "options: None against a dictionary"),
    ],
)
def test_what_is_no_value_differs_too(x: list, t: Any, options: Any, expected: str) -> None:
    record, other = recording([torch.ones(2)], torch.tensor(3.0)), recording(x, t, options)
    assert first_difference(record, other) == f"network of step 0, {expected}"
    only = first_difference(record, other, tensors_only=True)
    assert only is None if options else only == f"network of step 0, {expected}"


def test_signs_of_zero_and_nan_are_bits() -> None:
    def of(t: float) -> Recorder:
        return recording([torch.ones(1)], torch.tensor(t))

    assert first_difference(of(float("nan")), of(float("nan"))) is None
    difference = first_difference(of(0.0), of(-0.0))
    assert difference == "network of step 0, t: float32 (), largest difference 0 at ()"
