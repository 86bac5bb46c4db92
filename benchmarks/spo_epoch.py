"""Where the time of an SPO epoch goes, and how far each part is from the machine's own speed.

    python -m benchmarks.spo_epoch --family toy --epochs 2
    python -m benchmarks.spo_epoch --family sd15
    python -m benchmarks.spo_epoch --family sd15 --small_decoder true

`toy` is the shipped recipe with the exact judge. `sd15` has the full size of Stable Diffusion 1.5
and of the step-aware judge, with random weights: one prompt, three decisions among four candidates,
and a step for each. `tiny` is the same on very small networks, to see that it works. The floor of a
part is the FLOPs of its networks over the matmul peak that this machine reaches in the same minute.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderTiny
from jsonargparse import auto_cli
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer, CLIPVisionConfig

from benchmarks.common import VIT_H, VIT_H_TEXT, default_dtype, random_sd15, write_report
from benchmarks.parts import PARTS, Parts
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.judges import StepAware
from lit_prefopt.judges.step_aware import StepAwareCLIP
from lit_prefopt.utils.device import matmul_peak
from tests.helpers.tiny import tiny_pipeline, tiny_text_config, tiny_tokenizer

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class RandomStepAware(StepAware):
    """The step-aware judge with random weights in bfloat16, created on first access.

    Args:
        full: Of ViT-H/14's size, or very small.
        folder: Where its tokenizer and the numbers of its image processor are written.
    """

    def __init__(self, full: bool, folder: str) -> None:
        super().__init__(pretrained=folder, processor=folder)
        self.full = full

    @cached_property
    def clip(self) -> StepAwareCLIP:
        """The model."""
        folder, length = Path(self.pretrained), 77 if self.full else 16
        side = {"height": 224, "width": 224} if self.full else {"height": 32, "width": 32}
        tokenizer: CLIPTokenizer = tiny_tokenizer(folder, length=length)
        tokenizer.save_pretrained(folder)
        shortest = {"shortest_edge": side["height"]}
        CLIPImageProcessor(size=shortest, crop_size=side).save_pretrained(folder)
        text = tiny_text_config(tokenizer, **(VIT_H_TEXT if self.full else {}))
        vision = CLIPVisionConfig(**(VIT_H if self.full else TINY_VISION))
        config = CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=1024 if self.full else 24,
        )
        with default_dtype(torch.bfloat16), torch.random.fork_rng():
            torch.manual_seed(0)
            return StepAwareCLIP(config).eval().requires_grad_(False)

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32; no two alike, so that all become pairs."""
        scores = super().score(images, texts, t)
        return scores + torch.arange(len(scores), device=scores.device) * 1e-3


def toy(epochs: int) -> list[str]:
    """Return the arguments of the toy recipe; its epoch is 8 batches."""
    return ["--config", "toy-spo", "--trainer.max_steps", str(8 * epochs)]


def random_decoder(folder: Path) -> list[str]:
    """Return the arguments that decode by an AutoencoderTiny of its usual size."""
    AutoencoderTiny().save_pretrained(folder)
    return ["--backbone.decoder", str(folder)]


def full_size(family: str, folder: Path, epochs: int) -> list[str]:
    """Return the arguments of one prompt an epoch: three decisions, a pair and a step for each."""
    prompts = folder / "prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red fox in the snow\nthe sea\n")
    pipeline = (random_sd15 if family == "sd15" else tiny_pipeline)(folder / family)
    judge = "benchmarks.spo_epoch.RandomStepAware"
    return [
        *("--config", "toy-spo", "--backbone", "backbone/sd15-lora.yaml"),
        *("--backbone.pretrained", str(pipeline), "--backbone.lora.rank", "4"),
        *("--model.judge", judge, "--model.judge.full", str(family == "sd15").lower()),
        *("--model.judge.folder", str(folder / f"{family}-judge")),
        *("--model.candidates", "4", "--model.threshold", "0", "--model.first", "2"),
        *("--model.sampling.steps", "5", "--model.sampling.batch_size", "4"),
        *("--model.sampling.guidance", "7.5"),
        *("--data", "PromptCollections", "--data.prompts", "PromptFile"),
        *("--data.prompts.path", str(prompts), "--data.round_size", "1"),
        *("--data.batch_size", "1", "--batch.pairs", "1", "--data.batches", "3"),
        *("--trainer.precision", "bf16-mixed", "--trainer.max_steps", str(3 * epochs)),
        *("--trainer.accelerator", "auto"),
    ]


def table(parts: Parts, epochs: int, peak: float) -> str:
    """Return the figures of one epoch.

    Args:
        parts: What was timed.
        epochs: How many there were.
        peak: TFLOP/s of this machine.
    """
    work, total = parts.teraflops(), sum(parts.seconds.values())
    lines = ["| part | s | share | TFLOP | floor, s | peak, GiB |", "|---|---|---|---|---|---|"]
    for part in PARTS:
        seconds, tera = parts.seconds[part] / epochs, work[part] / epochs
        floor = f"{tera:.3g} | {tera / peak:.3g}" if tera else " | "
        share = parts.seconds[part] / total
        lines.append(
            f"| {part} | {seconds:.2f} | {share:.1%} | {floor} | {parts.peaks[part]:.2f} |"
        )
    tera = sum(work.values()) / epochs
    most = max(parts.peaks.values())
    lines.append(
        f"| together | {total / epochs:.2f} | | {tera:.3g} | {tera / peak:.3g} | {most:.2f} |"
    )
    return "\n".join(lines)


def main(
    family: Literal["toy", "sd15", "tiny"] = "toy",
    epochs: int = 1,
    small_decoder: bool = False,
    folder: str = "runs/spo-epoch",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        family: What is measured.
        epochs: Collections with the training on each; the figures are their means.
        small_decoder: Decode what the judge looks at by an AutoencoderTiny, at full size only.
        folder: Where the pipeline, the judge's tokenizer and the run are written.
        report: Write a report as well.
    """
    root = Path(folder)
    run = root / f"run-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe = toy(epochs) if family == "toy" else full_size(family, root, epochs)
    if small_decoder:
        recipe += random_decoder(root / "decoder")
    recipe += [
        *("--batch.validate_every", str(10**6), "--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks+", "benchmarks.parts.Parts"),
        *("--trainer.default_root_dir", str(run)),
    ]
    lit_prefopt(["fit", *recipe])
    bf16 = family != "toy"
    peak = matmul_peak(torch.bfloat16 if bf16 else torch.float32)
    rows = {name: dict(seen) for name, seen in Parts.last.rows.items()}
    text = "\n".join(
        [
            f"One epoch of SPO, {family}, mean of {epochs}; {torch.get_num_threads()} threads; the "
            f"floor is at {peak:.2f} TFLOP/s ({'bfloat16' if bf16 else 'float32'}).",
            "",
            table(Parts.last, epochs, peak),
            "",
            "Rows that each network saw:",
            *(f"- {name}: {part} {n}" for name, seen in rows.items() for part, n in seen.items()),
        ]
    )
    print(text)
    if report:
        print(write_report("spo_epoch", text, family + ("-small-decoder" if small_decoder else "")))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
