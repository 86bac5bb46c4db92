"""How fast pairs are read and decoded, beside bare reading of tars and bare decoding by PIL.

    python -m benchmarks.loader --pairs 400 --side 512 --resolution 512
    python -m benchmarks.loader --pairs 60 --side 2048 --resolution 512
    python -m benchmarks.loader --cached true

Bare is the least that any loader has to do, in one process: read the tars from end to end and
decode every image to RGB pixels, without resizing and without tensors. The data module's batches
are ready for training, and come out of workers by torch's DataLoader. Runs alternate, and the best
of each counts.

`--cached true` adds a cache of the same pairs, in the shapes of Stable Diffusion 1.5 and made by
small networks: what it holds does not change what reading it takes. Its floor is reading its bytes.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from jsonargparse import auto_cli
from PIL import Image
from transformers import CLIPTextModel

from benchmarks.common import CLIP_L, default_dtype, random_shards, write_report
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.datamodules import CachedPairs, PairShards
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.toy.assemble import SCHEDULER, save_pipeline
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer, tiny_unet, tiny_vae

KINDS = ("image", "cached")
BATCH = 4  # pairs
SMALL_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def decoded(shards: Path) -> Iterator[Image.Image]:
    """Read all tars and decode all images."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                content = data.read()
                if member.name.endswith(("jpg", "png")):
                    yield Image.open(BytesIO(content)).convert("RGB")


def bare(shards: Path) -> int:
    """Read all tars, decode all images, and return how many pairs there were."""
    return sum(1 for _ in decoded(shards)) // 2


def bare_in(shards: Path, workers: int) -> Callable[[], int]:
    """Return what reads and decodes everything in each of so many processes at once."""
    if not workers:
        return lambda: bare(shards)
    pool = ProcessPoolExecutor(workers)
    return lambda: sum(pool.map(bare, [shards] * workers))


def cache(folder: Path, shards: Path, resolution: int) -> Path:
    """Write the pairs as `sd15-cache` would, in shape and precision; once."""
    pipeline, made = folder / "small-encoders", folder / f"cache-{shards.name}"
    if not (pipeline / "model_index.json").is_file():
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(pipeline / "made-from", length=77)
        with default_dtype(torch.bfloat16):
            vae = tiny_vae(**SMALL_VAE)
            text = CLIPTextModel(tiny_text_config(tokenizer, **CLIP_L | {"num_hidden_layers": 1}))
            unet = tiny_unet(sample_size=64, cross_attention_dim=768)
        save_pipeline(pipeline, vae, text, tokenizer, unet, DDIMScheduler(**SCHEDULER))
    lit_prefopt(
        [
            *("predict", "--config", "sd15-cache", "--backbone.pretrained", str(pipeline)),
            *("--data.shards", str(shards), "--model.output", str(made), "--model.flip", "false"),
            *("--model.resolution", str(resolution), "--trainer.accelerator", "cpu"),
        ]
    )
    return made


def read(shards: Path) -> None:
    """Read all bytes of all tars."""
    for path in shards.glob("*.tar"):
        path.read_bytes()


def loaded(shards: Path, resolution: int, workers: int, *, draft: bool) -> Callable[[], int]:
    """Return what goes through an epoch of the data module and counts its pairs."""
    return _epoch(
        PairShards(str(shards), BATCH, resolution=resolution, workers=workers, draft=draft)
    )


def _epoch(data: StoredPairs) -> Callable[[], int]:
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(len(batch.keys) for batch in loader)


def rates(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the best pairs/s of each run, turn about; workers start in a first epoch."""
    best: dict[str, float] = {}
    for epoch in range(1 + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            pairs = run()
            if epoch:
                best[name] = max(best.get(name, 0.0), pairs / (time.perf_counter() - start))
    return best


def differences(shards: Path, resolution: int) -> Iterator[float]:
    """Yield by how many grey levels a draft's pixels differ from the whole ones, for each pair."""
    whole, draft = (
        PairShards(str(shards), 1, resolution=resolution, workers=0, draft=draft)
        for draft in (False, True)
    )
    for data in (whole, draft):
        data.setup("fit")
    both = zip(whole.train_dataloader(), draft.train_dataloader(), strict=True)
    for one, other in list(both)[:20]:
        yield float((one.images.float() - other.images.float()).abs().mean())


def main(
    pairs: int = 200,
    side: int = 512,
    resolution: int = 512,
    workers: list[int] | None = None,
    repeats: int = 3,
    shards: str | None = None,
    cached: bool = False,
    folder: str = "runs/loader",
    report: bool = False,
) -> None:
    """Measure.

    Args:
        pairs: How many pairs are made, of JPEGs.
        side: Their width and height, in pixels.
        resolution: Width and height of what comes out.
        workers: Numbers of worker processes; 0 is the process itself.
        repeats: How often each is measured.
        shards: Shards of one's own in place of those that are made.
        cached: Measure a cache of the pairs too.
        folder: Where shards are written.
        report: Write a report as well.
    """
    torch.set_num_threads(1)  # as in a worker
    place = Path(folder) / f"jpeg-{side}-{pairs}"
    made = Path(shards) if shards else random_shards(place, pairs, side)
    runs: dict[str, Callable[[], int]] = {}
    counts = [0, 2] if workers is None else workers
    for count in counts:
        runs[f"bare reading and decoding, {count} workers"] = bare_in(made, count)
        runs[f"image shards, {count} workers"] = loaded(made, resolution, count, draft=False)
    if cached:
        latents = cache(Path(folder), made, resolution)
        for count in counts:
            data = CachedPairs(str(latents), BATCH, workers=count)
            runs[f"cached shards, {count} workers"] = _epoch(data)
        runs["reading the cache's bytes"] = lambda: (read(latents), pairs)[1]
    drafts = side >= 2 * resolution
    if drafts:
        runs["image shards by drafts, 0 workers"] = loaded(made, resolution, 0, draft=True)
    best = rates(runs, repeats)
    lines = [
        f"{pairs} pairs of JPEGs of {side} x {side} pixels, to {resolution} x {resolution}; best "
        f"of {repeats}, turn about.",
        "",
        "| | pairs/s | against bare in as many processes |",
        "|---|---|---|",
    ]
    for name, rate in best.items():
        base = best.get(f"bare reading and decoding, {name.split(', ')[-1]}")
        lines.append(f"| {name} | {rate:.1f} | {f'{rate / base:.2f}' if base else ''} |")
    if drafts:
        apart = [*differences(made, resolution)]
        lines += [
            "",
            f"A draft's pixels differ by {np.mean(apart):.2f} of 255 grey levels in the mean "
            f"({max(apart):.2f} in the pair where it is most).",
        ]
    if cached:
        lines.append("")
        for count in counts:
            image, latent = (best[f"{kind} shards, {count} workers"] for kind in KINDS)
            lines.append(
                f"With {count} workers a cache gives {latent / image:.1f} times the pairs/s."
            )
    text = "\n".join(lines)
    print(text)
    if report:
        print(write_report("loader", text, f"{side}-to-{resolution}"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
