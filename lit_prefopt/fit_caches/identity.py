"""Identity of encodings and reference errors: all that determines them, to the last bit."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from lit_prefopt.backbones import Backbone
from lit_prefopt.cache_checks import CacheUser, settings_of_reference

FORMAT = 1  # of the records
VERSIONS = ("torch", "diffusers", "transformers", "pillow", "simplejpeg", "lit-prefopt")
PROBES = 256  # noise levels by which a method's distribution is known


def encoding_settings(backbone: Backbone, trainer: Any, batch_size: int) -> dict[str, Any]:
    """Return all that determines latents and prompts of given images and texts, by name.

    Digits depend on the batch size, on the device and on the libraries' versions as well.

    Args:
        backbone: The backbone that encodes.
        trainer: The Trainer of the run.
        batch_size: Pairs in a batch of one rank.
    """
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "format": FORMAT,
        "backbone": type(backbone).__name__,
        "checkpoint": backbone.checkpoint,
        "encoders": {name: weights_hash(part) for name, part in backbone.encoders.items()},
        **backbone.latent_settings(),
        "dtype": str(backbone.latent_dtype),
        "precision": str(trainer.precision),
        "matmul": torch.get_float32_matmul_precision(),
        "device": kind,
        "batch_size": batch_size,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def error_settings(module: CacheUser) -> dict[str, Any]:
    """Return all that determines the reference's errors at a seed, beside the encodings.

    Args:
        module: The method with its backbone.
    """
    levels = module.level_quantiles(torch.arange(PROBES, dtype=torch.float64) / PROBES)
    return {**settings_of_reference(module), "levels": levels.tolist()}


def hash_of(settings: Mapping[str, Any]) -> str:
    """Return a hash of settings by name."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=12).hexdigest()


def weights_hash(net: nn.Module) -> str:
    """Return a hash of a network's weights with their precision and memory format.

    Tensors are hashed in threads: a text encoder of 8 GB takes a second on 16 cores.
    """
    tensors = sorted(net.state_dict().items())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return blake2b(
            "".join(pool.map(_tensor_hash, tensors)).encode(), digest_size=16
        ).hexdigest()


def _tensor_hash(named: tuple[str, Tensor]) -> str:
    name, tensor = named
    digest = blake2b(digest_size=16)
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.stride()}{tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()
