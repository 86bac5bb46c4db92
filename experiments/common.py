"""Dated reports of experiments."""

from __future__ import annotations

from pathlib import Path

from benchmarks import common

REPORTS = Path(__file__).parent / "reports"


def write_report(name: str, text: str, variant: str = "") -> Path:
    """Write a report with all that is needed to repeat it.

    Args:
        name: The script's name.
        text: The figures.
        variant: Distinguishes several reports of one script and day.
    """
    return common.write_report(name, text, variant, reports=REPORTS)
