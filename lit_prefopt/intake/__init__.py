"""Intake: from what people have to shards that can be trusted, and a look at them."""

from lit_prefopt.intake.columns import Columns
from lit_prefopt.intake.convert import convert
from lit_prefopt.intake.preview import preview
from lit_prefopt.intake.stages import split_into_stages
from lit_prefopt.intake.validate import Report, validate

__all__ = ["Columns", "Report", "convert", "preview", "split_into_stages", "validate"]
