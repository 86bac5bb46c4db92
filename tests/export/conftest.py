"""Fixtures: a pipeline of each family, with random weights."""

from tests.helpers.exporting import family

__all__ = ["family"]
