"""Caches that a training fills itself: encodings of images and prompts, reference errors."""

from lit_prefopt.fit_caches.caches import FitCaches

__all__ = ["FitCaches"]
