"""One training step of the step-aware judge at its real size: CLIP ViT-H/14, forward and backward.

    python -m benchmarks.step_aware_vit_h --report true

Weights are random, and in bfloat16 so that they fit twice into a small machine. The denoiser is the
toy world's: what is measured is the judge, on one pair at 224 x 224. The floor is the step's FLOPs,
counted as it runs, over the matmul peak that this machine reaches in the same minute.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from benchmarks.common import VIT_H, VIT_H_TEXT, default_dtype, write_report
from benchmarks.full_size_step import matmul_peak, peak_gib
from lit_prefopt.backbones import trained
from lit_prefopt.batches import ImagePairs
from lit_prefopt.judges import StepAwarePreference
from lit_prefopt.optimizers import AdamW
from lit_prefopt.toy import ToyDiffusion
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

PROJECTION = 1024


def random_vit_h(folder: Path) -> Path:
    """Write a CLIP of ViT-H/14's size with random weights in bfloat16, once."""
    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder, length=77)
    text = tiny_text_config(tokenizer, **VIT_H_TEXT, vocab_size=49408)
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(**VIT_H).to_dict(),
        projection_dim=PROJECTION,
        # OpenAI's start; of random weights even a trained CLIP's 100 would say the same of all
        logit_scale_init_value=math.log(1 / 0.07),
    )
    with default_dtype(torch.bfloat16):
        model = CLIPModel(config)
    tokenizer.save_pretrained(folder)
    side = {"height": 224, "width": 224}
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=side).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def one_pair() -> ImagePairs:
    """Return two random pictures of the toy world's size and a caption of it."""
    images = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = ["a large red circle on the left of a black background"]
    return ImagePairs(images, texts, torch.tensor([0]), torch.ones(1), torch.ones(1), ["pair"])


def step(module: StepAwarePreference, pair: ImagePairs) -> tuple[float, float, float]:
    """Return loss, and seconds of forward and backward."""
    module.zero_grad()
    start = time.monotonic()
    loss = module.training_step(pair, 0)
    middle = time.monotonic()
    loss.backward()
    return loss.item(), middle - start, time.monotonic() - middle


def main(folder: str = "runs/vit-h", steps: int = 2, report: bool = False) -> None:
    """Measure.

    Args:
        folder: Where the CLIP with random weights is written.
        steps: How often the step is taken; the first one warms up.
        report: Write a report as well.
    """
    clip = str(random_vit_h(Path(folder)))
    with default_dtype(torch.bfloat16):
        module = StepAwarePreference(
            ToyDiffusion(reference="none").float(), AdamW(3e-6), clip, None
        )
    pair = one_pair()
    with FlopCounterMode(display=False) as counter:
        first = step(module.train(), pair)
    flops = counter.get_total_flops() / 1e12
    measured = [first, *(step(module, pair) for _ in range(steps - 1))]
    # behind a modulation whose weights are still zero, the timestep's own layers get zeros
    named = trained(module)
    touched = sum(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in named.values())
    count, peak = sum(p.numel() for p in named.values()), matmul_peak()
    seconds = [f"{forward:.1f} + {backward:.1f}" for _, forward, backward in measured]
    text = "\n".join(
        [
            f"Step-aware ViT-H/14, {count / 1e6:.0f} M weights in bfloat16, all trained; one pair, "
            f"two views of {VIT_H['image_size']} x {VIT_H['image_size']}.",
            "",
            "| figure | value |",
            "|---|---|",
            f"| seconds, forward + backward | {', '.join(seconds)} |",
            f"| floor: {flops:.2f} TFLOP at {peak:.2f} TFLOP/s | {flops / peak:.1f} s |",
            f"| peak memory, weights and gradients, no optimizer | {peak_gib():.2f} GiB |",
            f"| loss (a coin: 0.693) | {measured[-1][0]:.3f} |",
            f"| weights with a finite gradient | {touched} of {len(named)} tensors |",
        ]
    )
    print(text)
    if report:
        print(write_report("step_aware_vit_h", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
