"""`lit-prefopt export`: export trained weights in a layout for other programs."""

from __future__ import annotations

from lit_prefopt.export.layouts import DType, Layout
from lit_prefopt.utils.output_lock import exclusive_output


def export(
    source: str,
    to: Layout,
    output: str,
    base: str | None = None,
    plus: str | None = None,
    plus_scale: float = 1.0,
    dtype: DType = "float32",
    base_config: str | None = None,
    variant: str | None = None,
) -> None:
    """Export trained weights in a layout for other programs.

    Args:
        source: A run's folder; one of its checkpoints; a LoRA of diffusers, kohya, peft, ComfyUI
            or OneTrainer; a denoiser's folder; or a complete pipeline's folder.
        to: `diffusers-lora` for `load_lora_weights`; `kohya` for a LoRA in A1111 and ComfyUI;
            `comfyui` for a LoRA with ComfyUI's own names; `unet` or `transformer`, as the family
            has it, for a denoiser's folder, with the LoRA merged; `pipeline` for a complete
            diffusers folder; `single-file` for one checkpoint that A1111, ComfyUI and
            `from_single_file` load.
        output: Output file (.safetensors) or folder.
        base: Hub name, folder or single file of the pipeline that was trained. By default that of
            the run's recipe, including a denoiser or VAE from another source.
        plus: Another LoRA to merge or add. By default the one that training started from, if the
            run's recipe names one; `none` for none.
        plus_scale: Factor of that LoRA's update.
        dtype: Precision of the output; merging is done in float32.
        base_config: If the base is a single file: hub name or folder of a pipeline of the same
            architecture; by default the one that diffusers downloads from the hub.
        variant: Variant of the base's files, such as `fp16`.
    """
    from lit_prefopt.export.write import write_weights  # imports torch and diffusers

    with exclusive_output(output):
        write_weights(source, to, output, base, plus, dtype, base_config, variant, plus_scale)
