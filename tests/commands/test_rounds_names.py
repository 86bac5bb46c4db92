"""The folder of a round's policy has the name that the backbone's family gives its denoiser."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_prefopt.commands.rounds import Round, _denoiser_name
from lit_prefopt.errors import InputError


def test_rounds_export_the_denoiser_of_the_family(tmp_path: Path) -> None:
    for kind, name in {"StableDiffusionXL": "unet", "StableDiffusion3": "transformer"}.items():
        recipe = {"backbone": {"class_path": f"lit_prefopt.backbones.{kind}"}}
        one = Round(tmp_path, [], [], _denoiser_name(recipe))
        *_, last = one.steps
        assert last[:1] == ["export"]
        assert last[last.index("--to") + 1] == name
        assert one.policy == tmp_path / name
    (tmp_path / "weights" / "transformer").mkdir(parents=True)
    assert one.policy == tmp_path / "weights" / "transformer"


def test_a_backbone_without_a_family_is_refused() -> None:
    with pytest.raises(InputError, match="belongs to no family of models"):
        _denoiser_name({"backbone": {"class_path": "lit_prefopt.backbones.Backbone"}})
