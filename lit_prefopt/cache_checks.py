"""Check cached latents and reference errors against the run that uses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.conditioning import described
from lit_prefopt.data.latents.error_table import ErrorTable, draw_seed
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.loading.long_prompts import LongPromptCounter
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.datamodules.cached import CachedPairs
from lit_prefopt.datamodules.image_sizes import check_image_sizes
from lit_prefopt.datamodules.rollouts import PromptCollections
from lit_prefopt.datamodules.side_checks import SideUser, check_sides
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError
from lit_prefopt.utils.fingerprint import fingerprint

CHECKED_PAIRS = 256  # number of pairs whose noise levels are compared


class CacheUser(SideUser, Protocol):
    """The part of a method on which cached latents and reference errors depend."""

    backbone: Backbone
    masked: bool
    mask_dilation: int
    validation_draws: int
    needs_reference: bool
    takes_reference_errors: bool

    @property
    def trainer(self) -> Any:
        """Return the Trainer of the run."""

    def level_quantiles(self, u: Tensor) -> Tensor:
        """Return quantiles of the process's distribution of noise levels."""


def check_data(module: CacheUser, data: object) -> None:
    """Check that a run can use its data, before training starts.

    Args:
        module: The method with its backbone, at the weights that training starts from.
        data: The data module, after its setup.
    """
    backbone = module.backbone
    check_sides(module, data)
    _check_reference(module, data)
    if not isinstance(data, CachedPairs):
        if data is not None:
            backbone.require_encoders(f"{type(data).__name__}, which yields images or prompts,")
            check_image_sizes(backbone, data)
            _count_long_prompts(backbone, data)
        return
    for latents in data.sets:
        check_latents(backbone, latents)
    check_image_sizes(backbone, data)
    if data.sets and not backbone.has_encoders:
        backbone.set_empty_prompt(data.sets[0].empty)
        _log_unverified(backbone, data.sets[0])
    _check_tables(module, data)


def _count_long_prompts(backbone: Backbone, data: object) -> None:
    """Count the prompts beyond the text encoder's context: now, or as the pairs are read."""
    if isinstance(data, StoredPairs):
        data.fits_context = backbone.fits_context
    elif isinstance(data, PromptCollections):
        counter = LongPromptCounter(backbone.fits_context, "roll-out")
        counter.count(data.texts)
        counter.finish()


def check_latents(backbone: Backbone, latents: LatentSet) -> None:
    """Check that cached latents and prompts fit a backbone.

    Args:
        backbone: The backbone to train on them.
        latents: Manifest of the cached latents.
    """
    settings, made_by = latents.settings, latents.notes.get("checkpoint")
    wanted = backbone.latent_settings()
    differing = [
        _difference(n, settings.get(n), v) for n, v in wanted.items() if settings.get(n) != v
    ]
    if differing:
        raise InputError(
            f"The pairs were cached for another model ({', '.join(differing)}): train {made_by}, "
            "which cached them, or cache them again."
        )
    own, theirs = backbone.encoders, settings["encoders"]
    if own and (odd := sorted(own.keys() ^ theirs.keys())):
        with_it = "and the backbone has one" if odd[0] in own else "which the backbone lacks"
        without = "out" if odd[0] in own else ""
        raise InputError(
            f"The pairs were cached by {made_by} with{without} {odd[0]}, {with_it}: cache them "
            "again, or take the same `--backbone.pretrained`."
        )
    differing = [name for name, part in own.items() if fingerprint(part) != theirs[name]]
    if differing:
        raise InputError(
            f"The pairs were cached by {made_by} in {settings['dtype']}, whose {differing[0]} has "
            "other weights or another precision than the backbone's: cache them again, or take the "
            "same `--backbone.pretrained`, `.vae` and `.dtype`."
        )


def check_text(backbone: Backbone) -> None:
    """Check that a backbone embeds the text tensors that it declares for its caches.

    Args:
        backbone: The backbone that embeds prompts.

    Raises:
        InputError: They are others, or of other widths.
    """
    declared, embedded = backbone.latent_settings()["text"], backbone.empty.widths()
    if declared is not None and declared != embedded:
        raise InputError(
            f"{type(backbone).__name__} embeds prompts as {described(embedded)}, and its "
            f"`latent_settings` have {described(declared)} as `text`: return there the width of "
            "each text tensor by name."
        )


def _difference(name: str, cached: Any, wanted: Any) -> str:
    """Describe a setting of a cache that differs from the backbone's."""
    if name == "text":
        return f"text tensors {described(cached)} and not {described(wanted)}"
    return f"{name} {cached} and not {wanted}"


def _log_unverified(backbone: Backbone, latents: LatentSet) -> None:
    made_by = latents.notes.get("checkpoint")
    if made_by != backbone.checkpoint:
        rank_zero_warn(
            f"The pairs were cached by {made_by} and {backbone.checkpoint} is trained; without VAE "
            "and text encoders it cannot be checked that both have the same ones."
        )
    else:
        rank_zero_info(
            f"VAE and text encoders are not loaded; the pairs were cached with those of {made_by}."
        )


def _check_reference(module: CacheUser, data: object) -> None:
    """Check that a method that needs a reference has one, or a table of its errors."""
    if module.backbone.has_reference or not module.needs_reference or _tables(data):
        return
    cached = (
        ", or read its errors from a cache (`--data CachedPairs --data.shards FOLDER "
        "--data.reference FOLDER`)"
    )
    raise InputError(
        f"{type(module).__name__} compares the policy with a reference, and the recipe has none: "
        "set `--backbone.reference initial`, which is no second network with a LoRA "
        f"(`--backbone.lora.rank 16`){cached if module.takes_reference_errors else ''}."
    )


def _tables(data: object) -> list[ErrorTable]:
    """Return the tables of the reference's errors that a data module has."""
    if not isinstance(data, CachedPairs):
        return []
    return [t for t in (data.reference, data.validation_reference) if t is not None]


def _check_tables(module: CacheUser, data: CachedPairs) -> None:
    tables = _tables(data)
    if not tables:
        return
    if not module.takes_reference_errors:
        raise InputError(
            f"{type(module).__name__} needs more of its reference than denoising errors of stored "
            "pairs (`takes_reference_errors` is False): leave `--data.reference` and "
            "`--data.validation_reference` out."
        )
    if not module.backbone.has_reference:
        _check_complete(module, data)
    held_out = data.validation_reference
    if held_out is not None and held_out.draws < module.validation_draws:
        raise InputError(
            f"{held_out.folder} has {held_out.draws} draws of each held-out pair, and validation "
            f"needs {module.validation_draws}: set `--model.validation_draws {held_out.draws}`, or "
            "compute more."
        )
    settings = settings_of_reference(module)
    for table in tables:
        differing = [name for name, value in settings.items() if table.settings.get(name) != value]
        if differing:
            raise InputError(
                f"The reference's errors in {table.folder} differ from this run's in "
                f"{', '.join(differing)}: give the recipe that computed them, or compute them "
                "again."
            )
        _check_levels(module, table)


def _check_complete(module: CacheUser, data: CachedPairs) -> None:
    """Check that a backbone without a reference has cached errors for all pairs."""
    fitting = module.trainer.state.fn == "fit"
    missing = {
        "reference": fitting and data.reference is None,
        "validation_reference": data.validation is not None and data.validation_reference is None,
    }
    for name, is_so in missing.items():
        if is_so:
            raise InputError(
                "The backbone has no reference, and only some pairs have cached errors: give "
                f"`--data.{name}` as well, or set `--backbone.reference initial`."
            )


def _check_levels(module: CacheUser, table: ErrorTable) -> None:
    """Check that cached errors have noise levels of the method's own distribution."""
    stored = table.quantiles(CHECKED_PAIRS)
    known = [int(i) for i in torch.nonzero(stored[:, 0] >= 0)]
    held_out = table.settings["held_out"]
    for draw in range(table.draws):
        seeds = _seeds(table, known, draw, held_out=held_out)
        own = module.level_quantiles(draws.uniform(seeds, "t")).float()
        if not torch.equal(own, stored[known, draw]):
            raise InputError(
                f"{type(module).__name__} draws other noise levels than those of {table.folder}: "
                "compute the errors again with its `gamma` and `gamma_steps`, if it has them; a "
                "method with draws of its own cannot use them."
            )


def _seeds(table: ErrorTable, pairs: Iterable[int], draw: int, *, held_out: bool) -> torch.Tensor:
    of = 0 if held_out else draw
    seeds = [draw_seed(table.seed, index, of) for index in pairs]
    return torch.tensor(seeds, dtype=torch.int64) + draw - of


def settings_of_reference(module: Any) -> dict[str, Any]:
    """Return the settings that determine the errors of a module's reference, by name.

    Args:
        module: A module with a backbone, a trainer, `masked` and `mask_dilation`.
    """
    own = {"precision": str(module.trainer.precision)}
    own |= {name: getattr(module, name) for name in ("masked", "mask_dilation")}
    return {**module.backbone.reference_settings(), **own}
