"""Cases of all families; a new family adds its module here."""

from __future__ import annotations

from tests.families import chroma, flux1, flux2, lumina2, qwen_image, sd3, z_image
from tests.families.cases import Case

CASES: dict[str, Case] = {
    name: case
    for family in (sd3, flux1, chroma, lumina2, flux2, qwen_image, z_image)
    for name, case in family.CASES.items()
}

FIRST: dict[str, str] = {
    case.backbone.FAMILY.name: name for name, case in reversed([*CASES.items()])
}
"""Name of the first case of each family."""
