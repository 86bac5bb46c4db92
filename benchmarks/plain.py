"""Diffusion-DPO as a plain script trains it, on the networks of one of our backbones.

Everything is made anew at every step, as in the code that was released with the paper: images and
texts are encoded, and the reference is a copy of the UNet, also beside a LoRA. No Lightning, a
plain DataLoader, plain AdamW, and the loss is read at every step to be shown.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lit_prefopt.backbones import trained
from lit_prefopt.conditioning import Prompt
from lit_prefopt.methods import DiffusionDPO


class PlainPairs(Dataset):
    """The pairs of image shards, held as encoded bytes.

    Args:
        shards: Folder of the shards.
        resolution: Width and height of what comes out.
    """

    def __init__(self, shards: Path, resolution: int) -> None:
        self.resolution = resolution
        samples: dict[str, dict[str, bytes]] = {}
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, name = member.name.partition(".")
                    data = tar.extractfile(member)
                    assert data is not None
                    part = name.rsplit(".", 1)[0] if name.count(".") else name
                    samples.setdefault(key, {})[part] = data.read()
        self.samples = [*samples.values()]

    def __len__(self) -> int:
        """Return their number."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return both sides (2, 3, H, W) in [-1, 1] and the prompt."""
        sample = self.samples[index]
        sides = [self._pixels(sample[name]) for name in ("chosen", "rejected")]
        return torch.stack(sides), sample["txt"].decode()

    def _pixels(self, data: bytes) -> Tensor:
        image, side = Image.open(BytesIO(data)).convert("RGB"), self.resolution
        scale = side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, upper = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = np.array(image.crop((left, upper, left + side, upper + side)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

    def batches(self, rows: int, workers: int, *, pinned: bool) -> Iterator[tuple[Tensor, list]]:
        """Yield batches without an end."""
        loader: DataLoader = DataLoader(
            self,
            rows,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
            drop_last=True,
        )
        while True:
            yield from loader


class PlainLoop:
    """One step after the other.

    Args:
        module: Holds the networks and the method's numbers.
        optimizer: Of its trained weights.
        context: Makes the mixed precision of a forward.
        clip: Largest norm of the gradients.
    """

    def __init__(
        self,
        module: DiffusionDPO,
        optimizer: Optimizer,
        context: Callable[[], AbstractContextManager[Any]],
        clip: float = 1.0,
    ) -> None:
        self.backbone: Any = module.backbone
        self.unet: Any = self.backbone.policy.denoiser
        self.reference: Any = self.backbone.policy.frozen or _without_adapter(self.unet)
        self.parameters = [*trained(module).values()]
        self.optimizer, self.context, self.clip, self.beta = optimizer, context, clip, module.beta

    def step(self, images: Tensor, texts: list[str]) -> float:
        """Train on a batch of images (B, 2, 3, H, W) and return the loss."""
        device = self.parameters[0].device
        pixels = torch.cat([images[:, 0], images[:, 1]]).to(device, non_blocking=True)
        with self.context():
            loss = self._loss(pixels, texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _loss(self, pixels: Tensor, texts: list[str]) -> Tensor:
        backbone = self.backbone
        vae, scheduler = backbone.vae, backbone.process.scheduler
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample()
            latents = latents.float() * vae.config.scaling_factor
            embedded = backbone.embed(texts)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        t = torch.randint(0, backbone.process.steps, (len(texts),), device=latents.device)
        t = t.repeat(2)
        noised = scheduler.add_noise(latents, noise, t)
        prompt = Prompt.cat([embedded, embedded])
        conditioning = backbone.denoiser_kwargs(prompt, noised)
        target = backbone.process.target(latents, noise, t).float()

        def drop(net: Any) -> Tensor:
            output = net(noised.to(backbone.dtype), t, **conditioning).sample.float()
            chosen, rejected = F.mse_loss(output, target, reduction="none").mean((1, 2, 3)).chunk(2)
            return chosen - rejected

        apart = drop(self.unet)
        with torch.no_grad():
            reference = drop(self.reference)
        return -F.logsigmoid(-0.5 * self.beta * (apart - reference)).mean()


def _without_adapter(unet: Any) -> Any:
    """Return a frozen copy of what lies below the adapter."""
    reference = copy.deepcopy(unet)
    reference.delete_adapters("default")
    return reference.requires_grad_(False).eval()
