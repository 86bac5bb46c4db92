"""Write a pipeline's folder that stock diffusers runs in its plainest call."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DiffusionPipeline


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in diffusers' layout, in the precision of its components.

    Without a precision, `from_pretrained(folder)` loads diffusers' components in float32, and
    transformers' in the one that their config.json states: text encoders saved in float16 would
    give a UNet in float32 prompts in float16, and fail. So their config.json states float32; the
    weights stay as they are, and `torch_dtype=torch.float16` loads all components in float16.

    Args:
        pipeline: The pipeline.
        folder: The folder.
    """
    pipeline.save_pretrained(folder)
    for file in Path(folder).glob("*/config.json"):
        config = json.loads(file.read_text("utf-8"))
        stated = [name for name in ("dtype", "torch_dtype") if name in config]
        if stated:
            config |= dict.fromkeys(stated, "float32")
            file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    lacking = [name for name, part in pipeline.components.items() if part is None]
    given = [name for name in lacking if name not in pipeline._optional_components]
    if (
        given
    ):  # such as the T5 of Stable Diffusion 3, which diffusers saves but does not load without
        arguments = ", ".join(f"{name}=None" for name in given)
        print(f"diffusers loads this pipeline with `from_pretrained(FOLDER, {arguments})`.")
