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
from lit_prefopt.export.base import Base
from lit_prefopt.export.facts import modelspec
from lit_prefopt.export.lora_files import LoRAFile, read_lora
from lit_prefopt.export.merge import match_lora, merge_lora
from lit_prefopt.export.origin import Origin, missing_base, read_origin
from lit_prefopt.export.single_file import single_file_state
from lit_prefopt.export.write_lora import combine, write_diffusers_lora, write_kohya_lora
from lit_prefopt.whole_files import whole_output

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
        base: Hub name, folder or single file of the pipeline that was trained; what the run's
            recipe says where it is not given.
        plus: Another LoRA that is taken in too, such as the one that training started from.
        dtype: Precision of what is written; merging is done in float32.
        base_config: Where the base is a single file: hub name or folder of a pipeline of its form.
        variant: Variant of the base's files, such as `fp16`.
    """
    target = Path(output)
    _check_output(target, to)
    origin = read_origin(source)
    if base is not None:
        origin = origin._replace(base=base, config=None, variant=None, denoiser=None)
    origin = origin._replace(config=base_config or origin.config, variant=variant or origin.variant)
    if origin.lora is None:
        _check_full(origin, plus, to)
    loras = [read_lora(plus)] if plus else []
    loras += [origin.lora] if origin.lora else []
    place = Base(origin.base, origin.config, origin.variant) if origin.base else None
    if to in LORA_WRITERS:
        write = _lora_writer(loras, to, place, origin.name, getattr(torch, dtype))
    else:
        write = _merged_writer(origin, loras, to, place, getattr(torch, dtype))
    with whole_output(target) as path:
        write(path)
    print(f"Written: {target}")


def _check_output(target: Path, to: Layout) -> None:
    if target.exists():
        raise InputError(f"{target} exists; remove it or name another.")
    file = to in (*LORA_WRITERS, "single-file")
    if file != (target.suffix == ".safetensors"):
        kind = "file: let its name end in" if file else "folder: let its name not end in"
        raise InputError(f"What is written to {target} is a {kind} .safetensors.")


def _check_full(origin: Origin, plus: str | None, to: Layout) -> None:
    """Refuse what cannot be done with a UNet of which all weights were trained."""
    if to in LORA_WRITERS:
        raise InputError(
            f"{origin.name} is a UNet of which all weights were trained, not a LoRA: export it to "
            "unet, pipeline or single-file."
        )
    if plus is not None:
        raise InputError(
            f"{origin.name} is a UNet of which all weights were trained, and holds what training "
            "started from: leave `--plus` away."
        )


def _lora_writer(
    loras: list[LoRAFile], to: Layout, base: Base | None, name: str, dtype: torch.dtype
) -> Callable[[Path], None]:
    """Return what writes LoRAs as one."""
    if base is None:
        raise missing_base(name)
    parts = base.skeleton()
    layers = reduce(combine, (match_lora(parts, lora) for lora in loras))
    return lambda path: LORA_WRITERS[to](layers, path, base, dtype)


def _merged_writer(
    origin: Origin, loras: list[LoRAFile], to: Layout, base: Base | None, dtype: torch.dtype
) -> Callable[[Path], None]:
    """Return what writes the weights with all LoRAs merged into them."""
    unet = origin.load_unet(base)
    if to == "unet":
        for lora in loras:
            merge_lora(unet, [], lora)
        return unet.to(dtype).save_pretrained
    if base is None:
        raise missing_base(origin.name)
    pipeline = base.pipeline(unet)
    for lora in loras:
        merge_lora(unet, [getattr(pipeline, part) for part in base.encoders], lora)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part.dtype != dtype:
            part.to(dtype)
    if to == "pipeline":
        return pipeline.save_pretrained
    state = single_file_state(pipeline, base.family)
    return lambda path: save_file(state, path, modelspec(base, path.stem, lora=False))
