"""HTML report of an evaluation: one self-contained file without network access."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lit_prefopt.evaluate.report.page_data import (
    MINUS,
    categories,
    compare_policies,
    draw_plots,
    labelled_values,
    match_rows,
    model_names,
    outcomes,
    script_data,
    table_rows,
)
from lit_prefopt.evaluate.report.pictures import MAX_BYTES, embed
from lit_prefopt.evaluate.report.saved_results import mapping, read_results
from lit_prefopt.utils.atomic_files import write_atomic

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"


def report(folder: str, other: str | None = None) -> None:
    """Write an evaluation's HTML report again: `report.html` beside its `evaluation.json`.

    Args:
        folder: Folder of the evaluation, such as `runs/quickstart/evaluation`.
        other: Folder of another evaluation on the same prompts and seeds; its policy is shown
            beside this one's, with a comparison.
    """
    print(f"Written: {write_page(Path(folder), None if other is None else Path(other))}")


def write_page(folder: Path, other: Path | None = None, max_bytes: int = MAX_BYTES) -> Path:
    """Write `report.html` into the folder of an evaluation, and return its path.

    Args:
        folder: Folder with `evaluation.json`, and optionally `per_prompt.jsonl` and images.
        other: Another evaluation on the same prompts and seeds, or None.
        max_bytes: Maximum size of all images in the page; the best, the worst and an even spread
            are kept.
    """
    results = read_results(folder)
    third = None if other is None else read_results(other)
    also = [] if third is None else match_rows(results, third)
    files: list[tuple[Path | None, ...]] = [
        (row.picture_reference, row.picture_policy, *(r.picture_policy for r in also[i : i + 1]))
        for i, row in enumerate(results.rows)
    ]
    differences = [row.difference(results.judges[0]) for row in results.rows]
    pictures = embed(files, differences, max_bytes)
    lines, summary = table_rows(results), results.summary
    context = {
        "name": results.name,
        "summary": summary,
        "models": model_names(results, third),
        "lines": lines,
        "outcomes": outcomes(results),
        "categories": categories(results, results.judges[0]),
        "plots": draw_plots(results, lines),
        "against": [] if third is None else compare_policies(results, also, lines),
        "extras": list(
            labelled_values({key: summary.get(key) for key in ("drift", "diversity", "ocr")})
        ),
        "pinned": list(labelled_values(mapping(summary.get("pinned")))),
        "shown": sum(any(own) for own in pictures),
        "there": sum(any(own) for own in files),
        "limit": f"{max_bytes / 1e6:g}",
        "data": script_data(results, also, pictures, lines),
    }
    path = folder / PAGE
    # JSON can contain lone surrogates, which cannot be encoded
    write_atomic(path, render(context).encode("utf-8", "replace"))
    return path


def render(context: dict[str, Any]) -> str:
    """Render the page; every string of the context is escaped in text, attributes and JSON."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"fixed": fixed, "signed": signed, "percent": percent}
    style, script = ((TEMPLATES / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    # hash of the one script that the page's content security policy allows
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": Markup(style), "script": Markup(script), "script_hash": digest}
    return environment.get_template("page.html").render(context | own)


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals and a typographic minus sign."""
    return "" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals and its sign."""
    return "" if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Format a share in percent."""
    return "" if value is None else f"{100 * value:.1f} %"
