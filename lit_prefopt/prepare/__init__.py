"""Prepare datasets: convert preference data to checked shards, validate and preview them."""

from lit_prefopt.prepare.columns import Columns
from lit_prefopt.prepare.convert import convert
from lit_prefopt.prepare.preview import preview
from lit_prefopt.prepare.stages import split_into_stages
from lit_prefopt.prepare.validate import ValidationReport, validate

__all__ = ["Columns", "ValidationReport", "convert", "preview", "split_into_stages", "validate"]
