"""Images a second of every judge at its full size, beside the floor.

    python -m benchmarks.judges --report true
    python -m benchmarks.judges --judges aesthetic --batches 1

Weights are random, so that nothing is downloaded and scores mean nothing. Images of 512 x 512 and
their prompts go in, scores come out: resizing, tokens and both towers count. The floor is the work
of a batch, counted as it runs, over the matmul peak that this machine reaches in the same minute.
The server of `endpoint` answers at once: what is measured is the way there and back.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
)

from benchmarks.common import CLIP_L, VIT_H, VIT_H_TEXT, write_report
from examples.judge_server import JudgeServer
from lit_prefopt.judges import (
    Aesthetic,
    CLIPScore,
    Endpoint,
    HPSv2,
    ImageReward,
    Judge,
    PickScore,
    StepAware,
)
from lit_prefopt.judges.image_reward import RewardBLIP
from lit_prefopt.judges.linear_head import LinearHead
from lit_prefopt.judges.step_aware import StepAwareCLIP
from lit_prefopt.utils.device import matmul_peak, peak_bytes, reset_peak, synchronize
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

Name = Literal[
    "clip-score", "aesthetic", "pickscore", "hpsv2.1", "step-aware", "imagereward", "endpoint"
]
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
}
TEXT = "a red fox in the snow, in the style of a woodcut"


class Idle(Judge):
    """Says nothing, at once."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(images))


def clip_folder(folder: Path) -> str:
    """Write a CLIP's tokenizer and image processor, and return where."""
    tiny_tokenizer(folder, length=77).save_pretrained(folder)
    side = {"height": 224, "width": 224}
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=side).save_pretrained(folder)
    return str(folder)


def clip_config(folder: str, large: bool) -> CLIPConfig:
    """Return the configuration of ViT-L/14, or of ViT-H/14."""
    look = VIT_H if large else {**VIT_L, "patch_size": 14}
    read = {**VIT_H_TEXT, "projection_dim": 1024} if large else CLIP_L
    text = tiny_text_config(tiny_tokenizer(Path(folder), length=77), **read, vocab_size=49408)
    return CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(**look).to_dict(),
        projection_dim=1024 if large else 768,
    )


def with_clip(judge: Any, folder: str, large: bool, kind: type[CLIPModel] = CLIPModel) -> Judge:
    """Give a judge its CLIP."""
    judge.clip = kind(clip_config(folder, large)).eval().requires_grad_(False)
    return judge


def aesthetic(folder: str) -> Judge:
    """Return the aesthetic predictor."""
    judge = Aesthetic(pretrained=folder)
    judge.head = LinearHead(768).requires_grad_(False)
    return with_clip(judge, folder, large=False)


def image_reward(folder: str) -> Judge:
    """Return ImageReward."""
    words = Path(folder) / "bert"
    words.mkdir(exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (words / "vocab.txt").write_text("\n".join([*special, *set(TEXT.replace(",", " ,").split())]))
    BertTokenizer(str(words / "vocab.txt")).save_pretrained(words)
    vision = BlipVisionConfig(**VIT_L, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
    judge = ImageReward(tokenizer=str(words))
    judge.network = RewardBLIP(vision, text).eval().requires_grad_(False)
    return judge


def endpoint(_: str) -> Judge:
    """Return a judge behind HTTP on this machine."""
    server = JudgeServer(Idle())
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Endpoint(f"http://127.0.0.1:{server.server_port}")


MAKE: dict[Name, Callable[[str], Judge]] = {
    "clip-score": lambda folder: with_clip(CLIPScore(folder), folder, large=False),
    "aesthetic": aesthetic,
    "pickscore": lambda folder: with_clip(PickScore(folder, folder), folder, large=True),
    "hpsv2.1": lambda folder: with_clip(HPSv2(pretrained=folder), folder, large=True),
    "step-aware": lambda folder: with_clip(
        StepAware(None, folder, folder), folder, large=True, kind=StepAwareCLIP
    ),
    "imagereward": image_reward,
    "endpoint": endpoint,
}


def measure(name: Name, folder: str, batch: int, batches: int, device: torch.device) -> list[str]:
    """Return the cells of a judge's row: weights, images/s, floor, share of it, peak memory."""
    judge = MAKE[name](folder)
    judge.prepare()
    images = torch.rand(batch, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images, texts = images.to(device), [TEXT] * batch
    with FlopCounterMode(display=False) as counter:
        judge.score(images, texts)  # warms up as well
    work = counter.get_total_flops() / batch / 1e12
    peak = matmul_peak(torch.float32, device)
    reset_peak(device)
    seconds = []
    for _ in range(batches):
        synchronize(device)
        start = time.perf_counter()
        judge.score(images, texts)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    networks = [part for part in vars(judge).values() if isinstance(part, torch.nn.Module)]
    weights = sum(p.numel() for part in networks for p in part.parameters())
    rate = batch / min(seconds)
    floor = f"{peak / work:.3g}" if work else ""
    share = f"{rate * work / peak:.0%}" if work else ""
    cells = [f"{weights / 1e6:.0f} M", f"{rate:.3g}", f"{work:.3f}" if work else "", floor, share]
    return [name, *cells, f"{peak_bytes(device) / 2**30:.2f} GiB"]


def main(
    judges: list[Name] | None = None, batch: int = 4, batches: int = 3, report: bool = False
) -> None:
    """Measure.

    Args:
        judges: Names; all by default.
        batch: Images scored at a time.
        batches: How many are timed, after one that warms up; the best one counts.
        report: Write a report as well.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = ["judge", "weights", "images/s", "TFLOP an image", "floor, images/s", "of the floor"]
    lines = [" | ".join([*heads, "peak memory"]), "|".join("---" for _ in range(len(heads) + 1))]
    with tempfile.TemporaryDirectory() as made:
        folder = clip_folder(Path(made))
        for name in judges or list(MAKE):
            lines.append(" | ".join(measure(name, folder, batch, batches, device)))
            print(lines[-1], flush=True)
            gc.collect()
    table = "\n".join(f"| {line} |" for line in lines)
    text = "\n".join(
        [
            f"Batches of {batch} images of 512 x 512, float32, random weights; the best of "
            f"{batches} after one that warms up.",
            "",
            table,
        ]
    )
    print(text)
    if report:
        print(write_report("judges", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
