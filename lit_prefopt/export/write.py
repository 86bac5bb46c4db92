"""Write trained weights: read them, merge their LoRAs, and save the requested layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prefopt.errors import InputError
from lit_prefopt.export.base_pipeline import BasePipeline
from lit_prefopt.export.layouts import DType, Layout
from lit_prefopt.export.metadata import modelspec
from lit_prefopt.export.pipeline_folder import write_pipeline
from lit_prefopt.export.recipe import Recipe
from lit_prefopt.export.single_file import check_single_file, single_file_state
from lit_prefopt.export.trained_weights import TrainedWeights, missing_base, read_trained_weights
from lit_prefopt.export.unread import describe_unread
from lit_prefopt.export.write_lora import (
    combine,
    write_comfyui_lora,
    write_diffusers_lora,
    write_kohya_lora,
)
from lit_prefopt.families.known import DENOISERS, FAMILIES
from lit_prefopt.processes.marks import source_marks
from lit_prefopt.utils.atomic_files import atomic_output
from lit_prefopt.weights.checks import check_finite
from lit_prefopt.weights.lora_files import WEIGHTS, LoRAFile, read_lora
from lit_prefopt.weights.merge import match_lora, merge_lora

LORA_WRITERS = {
    "diffusers-lora": write_diffusers_lora,
    "kohya": write_kohya_lora,
    "comfyui": write_comfyui_lora,
}


def write_weights(
    source: str,
    to: Layout,
    output: str,
    base: str | None,
    plus: str | None,
    dtype: DType,
    base_config: str | None,
    variant: str | None,
    plus_scale: float = 1.0,
) -> None:
    """Export trained weights in a layout for other programs.

    The arguments are those of `lit-prefopt export`.
    """
    target = Path(output)
    _check_output(target, to)
    origin = _at(read_trained_weights(source), base, base_config, variant)
    loras = _loras(origin, plus, to, plus_scale)
    recipe = origin.recipe
    if to in LORA_WRITERS:
        recipe = _with_lora_marks(recipe, Path(loras[-1].source))
    place = BasePipeline.from_recipe(recipe) if recipe.pretrained else None
    note = None
    if to in LORA_WRITERS:
        write, note = _lora_writer(loras, to, place, origin.name, getattr(torch, dtype))
    else:
        write = _merged_writer(origin, loras, to, place, getattr(torch, dtype))
    with atomic_output(target) as path:
        write(path)
    print(f"Written: {target}")
    if note is not None:
        print(note)


def _check_output(target: Path, to: Layout) -> None:
    if target.exists():
        raise InputError(f"{target} exists; remove it or choose another path.")
    file = to in (*LORA_WRITERS, "single-file")
    if file != (target.suffix == ".safetensors"):
        kind = "file: use a name that ends in" if file else "folder: use a name without"
        raise InputError(f"The output {target} is a {kind} .safetensors.")


def _at(
    origin: TrainedWeights, base: str | None, config: str | None, variant: str | None
) -> TrainedWeights:
    """Return the weights with the pipeline that the command line names."""
    recipe = origin.recipe
    if base is not None:
        recipe = recipe._replace(
            pretrained=base, config=None, variant=None, denoiser=None, vae=None
        )
    recipe = recipe._replace(config=config or recipe.config, variant=variant or recipe.variant)
    return origin._replace(recipe=recipe)


def _with_lora_marks(recipe: Recipe, source: Path) -> Recipe:
    """Return the recipe with the prediction type that a LoRA's file states, if it names none."""
    file = source / WEIGHTS if source.is_dir() else source
    marks = source_marks(str(file))
    prediction = recipe.prediction or marks.config.get("prediction_type")
    zero = recipe.zero_terminal_snr
    if zero is None:
        zero = marks.config.get("rescale_betas_zero_snr")
    return recipe._replace(prediction=prediction, zero_terminal_snr=zero)


def _loras(
    origin: TrainedWeights, plus: str | None, to: Layout, scale: float = 1.0
) -> list[LoRAFile]:
    """Return the LoRAs not yet merged into the denoiser: the initial one, and the trained one."""
    if origin.lora is not None:
        if origin.recipe.training_adapter is not None:
            rank_zero_info(
                f"{origin.name} was trained with the adapter {origin.recipe.training_adapter}, "
                "which is left out."
            )
        return [*(start.scaled(scale) for start in _start(origin, plus)), origin.lora]
    if to in LORA_WRITERS:
        raise InputError(
            f"{origin.name} is a fully trained denoiser, not a LoRA: export it to "
            f"{' or '.join(DENOISERS)}, pipeline or single-file."
        )
    if plus is not None and origin.recipe.start_lora is None:
        raise InputError(
            f"{origin.name} is a fully trained denoiser without a LoRA in its recipe: omit "
            "`--plus`."
        )
    # It is merged into the denoiser already, but not into the text encoders.
    starts = [] if to in DENOISERS else _start(origin, plus)
    return [start.scaled(scale).without_denoiser() for start in starts]


def _start(origin: TrainedWeights, plus: str | None) -> list[LoRAFile]:
    """Return the additional LoRA, or None."""
    start = plus or origin.recipe.start_lora
    if start in (None, "none"):
        return []
    if plus is None and not Path(start).exists():
        raise InputError(
            f"{origin.name} was trained from the LoRA {start}, which does not exist: name its file "
            "with `--plus`, or omit it with `--plus none`."
        )
    return [read_lora(start)]


def _lora_writer(
    loras: list[LoRAFile], to: Layout, base: BasePipeline | None, name: str, dtype: torch.dtype
) -> tuple[Callable[[Path], None], str | None]:
    """Return a function that writes the LoRAs as one file, and what diffusers leaves out of it."""
    if base is None:
        raise missing_base(name)
    parts = base.skeleton()
    layers = reduce(combine, (match_lora(base.family, parts, lora) for lora in loras))
    _check_written(
        {f"{name}.{k}": v for (_, name), x in layers.items() for k, v in x._asdict().items()},
        dtype,
    )
    note = describe_unread(layers, to, base)
    return lambda path: LORA_WRITERS[to](layers, path, base, dtype), note


def _merged_writer(
    origin: TrainedWeights,
    loras: list[LoRAFile],
    to: Layout,
    base: BasePipeline | None,
    dtype: torch.dtype,
) -> Callable[[Path], None]:
    """Return a function that writes the weights with all LoRAs merged."""
    own = base.family.denoiser if base is not None else origin.component
    if own is None:
        raise missing_base(origin.name)
    if to in DENOISERS and to != own.name:
        raise InputError(
            f"The denoiser of {base.name if base else origin.name} is a {own.name}: export it "
            f"with `--to {own.name}`."
        )
    denoiser = origin.load_denoiser(base)
    if to in DENOISERS:
        family = base.family if base else next(f for f in FAMILIES if f.denoiser is own)
        for lora in loras:
            merge_lora(family, denoiser, {}, lora)
        denoiser.to(dtype)
        _check_written(denoiser.state_dict(), dtype)
        save: Callable[[Path], None] = denoiser.save_pretrained
        return save
    if base is None:
        raise missing_base(origin.name)
    if to == "single-file":
        check_single_file(own, denoiser.config)
    pipeline = base.pipeline(denoiser, origin.recipe.vae)
    for lora in loras:
        merge_lora(
            base.family, denoiser, {name: getattr(pipeline, name) for name in base.encoders}, lora
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part.dtype != dtype:
            part.to(dtype)
    for name in (own.name, base.family.vae.name, *base.encoders):
        _check_written(getattr(pipeline, name).state_dict(), dtype)
    if to == "pipeline":
        return lambda path: write_pipeline(pipeline, path)
    state = single_file_state(pipeline, base.family)
    return lambda path: save_file(state, path, modelspec(base, path.stem, lora=False))


def _check_written(tensors: Mapping[str, Tensor | float], dtype: torch.dtype) -> None:
    """Check that weights are finite in the precision of the output."""
    check_finite(
        {name: torch.as_tensor(x).to(dtype) for name, x in tensors.items()},
        f"The output in {str(dtype).removeprefix('torch.')}",
        "choose a wider `--dtype`, or weights from before the run diverged; nothing is written",
    )
