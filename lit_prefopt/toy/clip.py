"""Train the toy world's CLIP: a text and an image tower, and their tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from lit_prefopt.batches import ImagePairs
from lit_prefopt.effective_batch import scale_last_step
from lit_prefopt.toy.one_cycle import one_cycle
from lit_prefopt.toy.render import SIZE
from lit_prefopt.toy.scenes import Scene, parse
from lit_prefopt.toy.tokenizer import save_tokenizer, toy_tokenizer


class ToyCLIPTraining(LightningModule):
    """Trains a small transformers CLIPModel on toy images and saves its components.

    It writes `text_encoder/` and `tokenizer/` in the layout of a Stable Diffusion folder, and
    `clip/`, the whole model with its processor, which is the toy world's learned judge.

    Args:
        output: Output folder of the three.
        lr: Peak of the one-cycle learning rate.
        hidden: Width of both towers; the UNet's cross-attention dimension is the same.
        layers: Layers of each tower.
        patch: Side of an image patch in pixels.
        projection: Width of the space that both towers share.
        length: Tokens of a text.
    """

    def __init__(
        self,
        output: str = "runs/toy",
        lr: float = 1e-3,
        hidden: int = 128,
        layers: int = 3,
        patch: int = 4,
        projection: int = 64,
        length: int = 32,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.output = Path(output)
        self.lr = lr
        self.tokenizer = toy_tokenizer(length)
        tower = {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, hidden // 32),
            "projection_dim": projection,
        }
        self.text_config = _text_config(self.tokenizer, tower)
        vision = CLIPVisionConfig(image_size=SIZE, patch_size=patch, **tower)
        self.clip = CLIPModel(
            CLIPConfig(
                text_config=self.text_config.to_dict(),
                vision_config=vision.to_dict(),
                projection_dim=projection,
            )
        ).train()

    def training_step(self, batch: ImagePairs) -> Tensor:
        """Return the contrastive loss, without negatives of the same scene."""
        logits, same = self._logits(batch)
        loss = contrastive_loss(logits, same)
        self.log("train/loss", loss, prog_bar=True)
        return scale_last_step(loss, self._trainer)

    def validation_step(self, batch: ImagePairs) -> None:
        """Log the retrieval accuracy of texts by images within the batch."""
        logits, same = self._logits(batch)
        found = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        size = len(batch.texts)
        self.log("val/retrieval", found, prog_bar=True, batch_size=size, sync_dist=True)

    def _logits(self, batch: ImagePairs) -> tuple[Tensor, Tensor]:
        """Return the scaled similarity of images and texts, and which texts are equivalent."""
        tokens = self.tokenizer(
            batch.texts, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        # no attention mask, as in Stable Diffusion: causal attention excludes the padding
        output = self.clip(input_ids=tokens.input_ids, pixel_values=batch.images[:, 0])
        numbers: dict[Scene, int] = {}
        scenes = [parse(text).upright() for text in batch.texts]
        number = torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in scenes])
        same = number[:, None] == number
        return output.logits_per_image, same.to(self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW under a one-cycle schedule over the whole run."""
        steps = int(self.trainer.estimated_stepping_batches)
        return one_cycle(self.clip.parameters(), self.lr, 0.01, steps)

    def on_fit_end(self) -> None:
        """Write text encoder, tokenizer and the whole CLIP."""
        if not self.trainer.is_global_zero:
            return
        encoder = CLIPTextModel(self.text_config)
        # the whole CLIP names this tower `text_model`, the encoder alone does not
        encoder.load_state_dict(self.clip.text_model.state_dict())
        encoder.save_pretrained(self.output / "text_encoder")
        self.clip.save_pretrained(self.output / "clip")
        toy_processor().save_pretrained(self.output / "clip")
        for folder in ("tokenizer", "clip"):
            save_tokenizer(self.tokenizer, self.output / folder)


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Compute CLIP's symmetric loss without false negatives.

    Args:
        logits: (B, B) scaled similarity of pictures (rows) and texts, true pairs on the diagonal.
        same: (B, B) bool, where two samples show the same scene.
    """
    target = torch.arange(len(logits), device=logits.device)
    other = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(other, -torch.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def toy_processor() -> CLIPImageProcessor:
    """Return the image processor of the toy CLIP: RGB in [-1, 1]."""
    half = [0.5, 0.5, 0.5]
    square = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size=square, crop_size=square, image_mean=half, image_std=half)


def _text_config(tokenizer: CLIPTokenizer, tower: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        # the pooled output is read at the first token of this number
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **tower,
    )
