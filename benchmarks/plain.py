"""Diffusion-DPO as plain scripts train it: the published procedure, written as a loop.

Two scripts are the model: the one that was released with the paper (all weights, a frozen copy of
the UNet as reference) and diffusers' example with a LoRA (the UNet without its adapter as
reference). Both compute everything anew at every step, in this order: encode images, draw noise
and timesteps, encode texts, policy, reference, loss, means for the log, backward, clipping, AdamW.
No Lightning, a plain DataLoader, and every mean is read at every step to be shown.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from lit_prefopt.conditioning import Prompt


class PlainPairs(Dataset):
    """The pairs of image shards, held as encoded bytes.

    Args:
        shards: Folder of the shards.
        resolution: Width and height of what comes out.
        dropout: Probability that a prompt is replaced by the empty one.
    """

    def __init__(self, shards: Path, resolution: int, dropout: float = 0.0) -> None:
        self.resolution, self.dropout = resolution, dropout
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
        dropped = torch.rand(()).item() < self.dropout
        return torch.stack(sides), "" if dropped else sample["txt"].decode()

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


class Networks(NamedTuple):
    """The networks of a plain script."""

    unet: Any  # what is trained; Any: diffusers is untyped
    reference: Any  # another UNet; None: the same one without its adapter
    vae: Any
    scheduler: Any  # adds noise
    embed: Callable[[list[str]], Any]  # encodes texts
    condition: Callable[[Any, Tensor], dict[str, Any]]  # arguments of the UNet, by embedded texts

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}


def networks_of(backbone: Any) -> Networks:
    """Return the networks of one of our backbones; the reference is a copy, also beside a LoRA.

    Args:
        backbone: A UNet's backbone with VAE and text encoders.
    """
    unet = backbone.policy.denoiser
    reference = backbone.policy.frozen or _without_adapter(unet)

    def condition(prompt: Prompt, noised: Tensor) -> dict[str, Any]:
        return backbone.denoiser_kwargs(Prompt.cat([prompt, prompt]), noised)

    scheduler = backbone.process.scheduler
    return Networks(unet, reference, backbone.vae, scheduler, backbone.embed, condition)


def load_networks(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int | None = None,
    checkpointing: bool = False,
) -> Networks:
    """Load the networks of a Stable Diffusion pipeline as the plain scripts do.

    Trained weights are float32.

    Args:
        folder: The pipeline, in diffusers' layout.
        dtype: Precision of all that is frozen.
        device: Where they are put.
        rank: Rank of a LoRA on the attention's projections; all weights are trained if not given.
        checkpointing: Whether activations are computed twice.
    """

    def load(kind: Any, name: str, precision: torch.dtype = dtype) -> Any:
        network = kind.from_pretrained(folder, subfolder=name, torch_dtype=precision)
        return network.requires_grad_(False).eval().to(device)

    vae, text = load(AutoencoderKL, "vae"), load(CLIPTextModel, "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    reference = None
    if rank is None:
        unet = load(UNet2DConditionModel, "unet", torch.float32).requires_grad_(True)
        reference = load(UNet2DConditionModel, "unet")
    else:
        unet = load(UNet2DConditionModel, "unet")
        projections = ["to_k", "to_q", "to_v", "to_out.0"]
        options = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(target_modules=projections, **options))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()

    def embed(texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(texts, max_length=tokenizer.model_max_length, **options)
        return text(tokens.input_ids.to(device))[0]

    def condition(hidden: Tensor, noised: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": hidden.repeat(2, 1, 1)}

    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    return Networks(unet, reference, vae, scheduler, embed, condition)


class Draws(NamedTuple):
    """Random numbers of a step, to repeat that of another program."""

    posterior: Tensor  # (B, C, H, W): the VAE's, of both sides
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)


class PlainLoop:
    """One step after the other.

    Args:
        networks: What is trained, and what it needs.
        optimizer: Of the trained weights.
        beta: Strength of the regularisation, with the factor 1/2 of the released script.
        context: Makes the mixed precision of the trained UNet.
        reference_context: That of another UNet as reference; the same if not given.
        dtype: Precision of the noised latents.
        clip: Largest norm of the gradients.
    """

    def __init__(
        self,
        networks: Networks,
        optimizer: Optimizer,
        beta: float,
        context: Callable[[], AbstractContextManager[Any]],
        reference_context: Callable[[], AbstractContextManager[Any]] | None = None,
        dtype: torch.dtype | None = None,
        clip: float = 1.0,
    ) -> None:
        self.networks, self.optimizer, self.beta, self.clip = networks, optimizer, beta, clip
        self.context, self.reference_context = context, reference_context or context
        self.dtype = dtype or networks.vae.dtype
        self.parameters = [*networks.trained.values()]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.shown: dict[str, float] = {}

    def step(self, images: Tensor, texts: list[str], draws: Draws | None = None) -> float:
        """Train on a batch and return the loss.

        Args:
            images: (B, 2, 3, H, W) in [-1, 1].
            texts: B prompts.
            draws: Random numbers; drawn if not given.
        """
        device = self.parameters[0].device
        pixels = torch.cat([images[:, 0], images[:, 1]]).to(device, non_blocking=True)
        loss = self._loss(pixels, texts, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return self.shown["loss"]

    def _loss(self, pixels: Tensor, texts: list[str], draws: Draws | None) -> Tensor:
        nets = self.networks
        with torch.no_grad():
            latents = self._latents(pixels, draws)
        if draws is None:
            noise = torch.randn_like(latents).chunk(2)[0]
            t = torch.randint(
                0, nets.scheduler.config.num_train_timesteps, (len(texts),), device=latents.device
            )
        else:
            noise, t = draws.noise.to(latents), draws.t
        noise, t = noise.repeat(2, 1, 1, 1), t.repeat(2)
        noised = nets.scheduler.add_noise(latents, noise, t).to(self.dtype)
        with torch.no_grad():
            conditioning = nets.condition(nets.embed(texts), noised)
        target = noise.float()
        if nets.scheduler.config.prediction_type == "v_prediction":
            target = nets.scheduler.get_velocity(latents, noise, t).float()

        def errors(net: Any) -> Tensor:
            output = net(noised, t, **conditioning).sample.float()
            return F.mse_loss(output, target, reduction="none").mean((1, 2, 3))

        with self.context():
            policy = errors(nets.unet)
        with torch.no_grad():
            reference = self._reference(errors)
        drops = [chosen - rejected for chosen, rejected in (policy.chunk(2), reference.chunk(2))]
        inside = -0.5 * self.beta * (drops[0] - drops[1])
        loss = -F.logsigmoid(inside).mean()
        means = {
            "loss": loss,
            "policy": policy.mean(),
            "reference": reference.mean(),
            "accuracy": (inside > 0).float().mean(),
        }
        self.shown = {name: mean.item() for name, mean in means.items()}
        return loss

    def _latents(self, pixels: Tensor, draws: Draws | None) -> Tensor:
        vae = self.networks.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        if draws is None:
            latents = posterior.sample()
        else:
            latents = posterior.mean + posterior.std * draws.posterior.repeat(2, 1, 1, 1)
        return latents * vae.config.scaling_factor

    def _reference(self, errors: Callable[[Any], Tensor]) -> Tensor:
        nets = self.networks
        if nets.reference is not None:
            with self.reference_context():
                return errors(nets.reference)
        nets.unet.disable_adapters()
        with self.context():
            result = errors(nets.unet)
        nets.unet.enable_adapters()
        return result


def _without_adapter(unet: Any) -> Any:
    """Return a frozen copy of what lies below the adapter."""
    reference = copy.deepcopy(unet)
    reference.delete_adapters("default")
    return reference.requires_grad_(False).eval()
