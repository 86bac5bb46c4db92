"""Anything that scores."""

from lit_prefopt.judges.judge import Judge

__all__ = ["Judge"]
