"""FLUX.1."""

from __future__ import annotations

from tests.families.cases import Case

CASES: dict[str, Case] = {}
