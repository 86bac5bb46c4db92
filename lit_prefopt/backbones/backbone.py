"""What a method may ask of a model family."""

from torch import nn


class Backbone(nn.Module):
    """Denoiser, VAE, text encoder and noise process of one model family."""
