"""`lit-prefopt export`: trained weights in the layout that another program wants."""

from __future__ import annotations

from lit_prefopt.export.layouts import DType, Layout


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
    from lit_prefopt.export.write import write_weights  # imports torch and diffusers

    write_weights(source, to, output, base, plus, dtype, base_config, variant)
