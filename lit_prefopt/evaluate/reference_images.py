"""Reference images on disk, so that further evaluations of a run sample only the policy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.evaluate.comparison import ImageSampler
from lit_prefopt.utils.atomic_files import write_atomic
from lit_prefopt.utils.fingerprint import fingerprint

IMAGES, CHECKSUM = "images", "checksum"
SETTINGS = "settings.json"
DAMAGES = (OSError, SafetensorError, KeyError, ValueError)


class ReferenceImages:
    """Image sampler that keeps its images on disk, one file per batch, and reads them again.

    The images are stored unrounded, so that an evaluation with them is the same bit for bit. A
    batch's name is a hash of the settings, texts and seeds: with others it is sampled. A damaged
    file is sampled again with a warning.

    Args:
        sampler: Samples the reference.
        folder: Folder of the files; each set of settings has a folder of its own inside.
        settings: All that determines the images beside texts and seeds.
        most_bytes: Maximum size of all files; batches beyond it are sampled every time.
        device: Device of the returned images.
    """

    def __init__(
        self,
        sampler: ImageSampler,
        folder: Path,
        settings: Mapping[str, Any],
        most_bytes: int,
        device: torch.device,
    ) -> None:
        self.sampler, self.most_bytes, self.device = sampler, most_bytes, device
        self._settings = json.dumps(settings, sort_keys=True, indent=2)
        self.root, self.folder = folder, folder / _digest(self._settings)
        self._full = False

    def prepare(self) -> None:
        """Remove images of other settings and create the folder; called on one rank."""
        if not self.most_bytes:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        others = self.root.iterdir() if self.root.is_dir() else ()
        for other in [path for path in others if path != self.folder]:
            shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / SETTINGS, self._settings + "\n")

    def __call__(self, texts: list[str], seeds: Tensor) -> Tensor:
        """Return one image for each text and seed, (B, 3, H, W) in [-1, 1]."""
        if not self.most_bytes:
            return self.sampler(texts, seeds)
        name = _digest(json.dumps([self._settings, texts, seeds.tolist()]))
        path = self.folder / f"{name}.safetensors"
        found = self._read(path, len(texts))
        if found is None:
            found = self.sampler(texts, seeds)
            self._write(path, found)
        return found.to(self.device)

    def _read(self, path: Path, count: int) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                images: Tensor = file.get_tensor(IMAGES)
                checksum = (file.metadata() or {})[CHECKSUM]
            if checksum != fingerprint({IMAGES: images}) or len(images) != count:
                raise ValueError("its content has changed")
        except DAMAGES as error:
            warn(f"{path} is damaged ({error}); its images are sampled again.", stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        return images

    def _write(self, path: Path, images: Tensor) -> None:
        """Write a batch atomically, if there is space for it."""
        if self._full:
            return
        stored = images.detach().cpu().contiguous()
        try:
            used = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
            free = shutil.disk_usage(self.folder).free
            if used + stored.nbytes > self.most_bytes or 2 * stored.nbytes > free:
                self._full = True
                rank_zero_info(
                    f"{self.folder} has no space for more of the reference's images, so further "
                    "ones are sampled in every evaluation: raise `reference_gib` of the callback "
                    "Evaluation to keep them."
                )
                return
            checksum = {CHECKSUM: fingerprint({IMAGES: stored})}
            write_atomic(path, save({IMAGES: stored}, checksum))
        except OSError as error:
            self._full = True
            warn(f"The reference's images are not kept: {error}", stacklevel=2)


def reference_settings(backbone: Backbone, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that determines the reference's images beside texts and seeds.

    Args:
        backbone: Has the reference, the VAE and the text encoders.
        evaluation: Settings and notes of an evaluation.
    """
    names = ("reference", "sampler", "sampling", "resolution", "precision", "device", "versions")
    return {
        **{name: evaluation[name] for name in names},
        "backbone": type(backbone).__name__,
        "latents": backbone.latent_settings(),
        "encoders": {name: fingerprint(part) for name, part in backbone.encoders.items()},
        "empty_prompt": fingerprint(backbone.empty.tensors()),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
