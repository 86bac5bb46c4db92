"""`lit-prefopt export`: trained weights in the layout that another program wants."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.metadata import modelspec
from lit_prefopt.export.single_file import check_single_file, single_file_state
from lit_prefopt.export.trained_weights import TrainedWeights, missing_base, read_trained_weights
from lit_prefopt.export.write_lora import combine, write_diffusers_lora, write_kohya_lora
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.weights.lora_files import LoRAFile, read_lora
from lit_prefopt.weights.merge import match_lora, merge_lora

Layout = Literal["diffusers-lora", "kohya", "unet", "pipeline", "single-file"]
LORA_WRITERS = {"diffusers-lora": write_diffusers_lora, "kohya": write_kohya_lora}
DType = Literal["float32", "bfloat16", "float16"]


def export(
    source: str,
    to: Layout,
    output: str,
    base: str | None = None,
    plus: str | None = None,
    dtype: DType = "float32",
    base_config: str | None = None,
    variant: str | None = None,
) -> None:
    """Write trained weights in the layout that another program wants.

    Args:
        source: A run's folder; one of its checkpoints; a LoRA as .safetensors file, in diffusers'
            or kohya's layout; a UNet's folder; or a whole pipeline's folder.
        to: `diffusers-lora` for `load_lora_weights`; `kohya` for a LoRA in A1111 and ComfyUI;
            `unet` for a denoiser's folder, the LoRA merged into it; `pipeline` for a whole
            diffusers folder; `single-file` for one checkpoint that A1111, ComfyUI and
            `from_single_file` load.
        output: The file (.safetensors) or folder to be made.
        base: Hub name, folder or single file of the pipeline that was trained. Where it is not
            given, the run's recipe tells, also of a denoiser or VAE from another place.
        plus: Another LoRA that is taken in too. Where it is not given, the one that training
            started from, if the run's recipe names one; `none` for none.
        dtype: Precision of what is written; merging is done in float32.
        base_config: Where the base is a single file: hub name or folder of a pipeline of the same
            architecture; what diffusers takes from the hub where it is not given.
        variant: Variant of the base's files, such as `fp16`.
    """
    target = Path(output)
    _check_output(target, to)
    origin = _at(read_trained_weights(source), base, base_config, variant)
    loras = _loras(origin, plus, to)
    recipe = origin.recipe
    place = (
        BasePipeline(recipe.pretrained, recipe.config, recipe.variant, recipe.prediction)
        if recipe.pretrained
        else None
    )
    if to in LORA_WRITERS:
        write = _lora_writer(loras, to, place, origin.name, getattr(torch, dtype))
    else:
        write = _merged_writer(origin, loras, to, place, getattr(torch, dtype))
    with atomic_output(target) as path:
        write(path)
    print(f"Written: {target}")


def _check_output(target: Path, to: Layout) -> None:
    if target.exists():
        raise InputError(f"{target} exists; remove it or name another.")
    file = to in (*LORA_WRITERS, "single-file")
    if file != (target.suffix == ".safetensors"):
        kind = "file: let its name end in" if file else "folder: let its name not end in"
        raise InputError(f"What is written to {target} is a {kind} .safetensors.")


def _at(
    origin: TrainedWeights, base: str | None, config: str | None, variant: str | None
) -> TrainedWeights:
    """Return the origin with its pipeline where the command line says that it lies."""
    recipe = origin.recipe
    if base is not None:
        recipe = recipe._replace(
            pretrained=base, config=None, variant=None, denoiser=None, vae=None
        )
    recipe = recipe._replace(config=config or recipe.config, variant=variant or recipe.variant)
    return origin._replace(recipe=recipe)


def _loras(origin: TrainedWeights, plus: str | None, to: Layout) -> list[LoRAFile]:
    """Return the LoRAs that are not in the UNet yet: what training started from, and its own."""
    if origin.lora is not None:
        return [*_start(origin, plus), origin.lora]
    if to in LORA_WRITERS:
        raise InputError(
            f"{origin.name} is a UNet of which all weights were trained, not a LoRA: export it to "
            "unet, pipeline or single-file."
        )
    if plus is not None and origin.recipe.start_lora is None:
        raise InputError(
            f"{origin.name} is a UNet of which all weights were trained, and no LoRA is named in "
            "its recipe: leave `--plus` away."
        )
    # The UNet holds it already, the text encoders do not.
    return [] if to == "unet" else [lora.without("unet") for lora in _start(origin, plus)]


def _start(origin: TrainedWeights, plus: str | None) -> list[LoRAFile]:
    """Return the LoRA that is taken in too, if there is one."""
    start = plus or origin.recipe.start_lora
    if start in (None, "none"):
        return []
    if plus is None and not Path(start).exists():
        raise InputError(
            f"{origin.name} was trained from the LoRA {start}, which is not there: say where it "
            "lies by `--plus`, or leave it out by `--plus none`."
        )
    return [read_lora(start)]


def _lora_writer(
    loras: list[LoRAFile], to: Layout, base: BasePipeline | None, name: str, dtype: torch.dtype
) -> Callable[[Path], None]:
    """Return what writes LoRAs as one."""
    if base is None:
        raise missing_base(name)
    parts = base.skeleton()
    layers = reduce(combine, (match_lora(parts, lora) for lora in loras))
    return lambda path: LORA_WRITERS[to](layers, path, base, dtype)


def _merged_writer(
    origin: TrainedWeights,
    loras: list[LoRAFile],
    to: Layout,
    base: BasePipeline | None,
    dtype: torch.dtype,
) -> Callable[[Path], None]:
    """Return what writes the weights with all LoRAs merged into them."""
    unet = origin.load_unet(base)
    if to == "unet":
        for lora in loras:
            merge_lora(unet, [], lora)
        return unet.to(dtype).save_pretrained
    if base is None:
        raise missing_base(origin.name)
    if to == "single-file":
        check_single_file(unet)
    pipeline = base.pipeline(unet, origin.recipe.vae)
    for lora in loras:
        merge_lora(unet, [getattr(pipeline, part) for part in base.encoders], lora)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part.dtype != dtype:
            part.to(dtype)
    if to == "pipeline":
        return pipeline.save_pretrained
    state = single_file_state(pipeline, base.family)
    return lambda path: save_file(state, path, modelspec(base, path.stem, lora=False))
