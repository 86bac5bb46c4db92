"""`estimate --fit 24GiB`: the cheapest options with which a recipe fits a card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_prefopt.backbones.policy import round_weights
from lit_prefopt.batches import ImagePairs
from lit_prefopt.commands.estimate import estimate, take_option
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.datamodules.cached import CachedPairs
from lit_prefopt.errors import InputError, quoted
from lit_prefopt.estimate.kept_encodings import kept_bytes
from lit_prefopt.estimate.memory import FITS, GIB
from lit_prefopt.estimate.switches import Switches, SwitchSearch, Trial
from lit_prefopt.fit_caches.encoding_cache import size_in_words
from lit_prefopt.lightning_cli import PreferenceCLI, run_lightning
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.recipe_files import named_recipes
from lit_prefopt.utils.device import matmul_dtype
from lit_prefopt.utils.meta import meta_weights

UNITS = {"": GIB, "GIB": GIB, "GB": 10**9}
CACHE = "--data CachedPairs --data.shards FOLDER"


class StatedOptions(NamedTuple):
    """Options of a recipe, as far as other ones take their place."""

    checkpointing: Any
    quantization: Any
    pairs: int | None  # of an optimizer step, if `batch.pairs` states it


class FittingOptions(NamedTuple):
    """The cheapest set of options that fits."""

    options: str  # as command-line arguments, to be added to the recipe
    needed: int  # bytes
    limit: int  # bytes that a step may use
    trials: list[Trial]  # all that were tried; the last one fits
    plain_flops: int  # of a step with no option, per pair
    kept: int  # bytes of encodings that the training stores on the disk; 0 if it stores none


class FitCLI(PreferenceCLI):
    """Builds a recipe without weights on the CPU, and searches instead of training."""

    folder: str
    limit: int
    found: FittingOptions

    def before_instantiate_classes(self) -> None:
        """Keep one device, no workers and no output; options that are tried are off."""
        config = self.config[self.subcommand]
        trainer, data = config.trainer, config.data.get("init_args") or {}
        backbone = (config.backbone or {}).get("init_args") or {}
        self.recipe = StatedOptions(
            backbone.get("gradient_checkpointing"),
            backbone.get("quantization"),
            config.batch.pairs,
        )
        self.precision = str(trainer.precision or "32-true")
        trainer.default_root_dir, trainer.limit_val_batches = self.folder, 0
        trainer.accelerator, trainer.devices, trainer.num_nodes = "cpu", 1, 1
        trainer.strategy, trainer.logger, trainer.callbacks = "auto", False, []
        trainer.precision = "bf16-mixed" if self.precision.endswith("-mixed") else "32-true"
        for name in ("gradient_checkpointing", "compile"):
            if name in backbone:
                backbone[name] = False
        if "quantization" in backbone:
            backbone["quantization"] = None
        if "workers" in data:
            data["workers"] = 0
        super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Build the networks on the meta device."""
        with meta_weights():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        module, data = self.model, self.datamodule
        if not isinstance(module, PreferenceDiffusionModule) or not isinstance(data, StoredPairs):
            raise InputError(
                f"`--fit` computes a step on stored pairs, and {type(module).__name__} on "
                f"{type(data).__name__} is not one: run `lit-prefopt estimate` without it on the "
                "card, which measures the first steps."
            )
        data.setup("fit")
        if isinstance(data, CachedPairs) and not module.backbone.has_encoders:
            module.backbone.set_empty_prompt(data.sets[0].empty)
        batch: Any = next(iter(data.train_dataloader()))
        batch = batch.scaled() if hasattr(batch, "scaled") else batch
        mixed = self.precision.endswith("-mixed")
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device="cpu")
            if mixed:
                round_weights(module.backbone.policy.frozen, matmul_dtype(self.precision))
        module.train()
        context = self.trainer.precision_plugin.forward_context if mixed else nullcontext
        bf16 = self.precision.startswith("bf16")
        search = SwitchSearch(module, batch, context, bf16=bf16, base=self.recipe.quantization)
        keeps = getattr(data, "keep_encodings", False)
        kept = kept_bytes(module, batch, self.trainer, data) if keeps else 0
        self.found = self._find(search, kept)

    def _find(self, search: SwitchSearch, kept: int) -> FittingOptions:
        trials = search.fit(self.limit)
        best = trials[-1]
        accumulated = self.trainer.accumulate_grad_batches
        pairs = accumulated * len(search.batch.seeds)
        options = options_of(best.switches, self.recipe, pairs, search)
        if best.total > self.limit:
            raise InputError(
                f"No set of options fits the recipe to a card of {_gib(self.limit / FITS)}: with "
                f"the smallest ({best.switches.names}; `{options}`) a step needs "
                f"{_gib(best.total)}, {_gib(best.total - self.limit)} more than the {FITS:.0%} of "
                f"the card that a step may use: take a card of {_gib(best.total / FITS)} or lower "
                "`--data.resolution`."
            )
        plain = search.trial(Switches(quantization=self.recipe.quantization)).pair_flops
        stored = 0 if best.switches.cached else kept
        return FittingOptions(options, best.total, self.limit, trials, plain, stored)


def run_estimate(args: Sequence[str]) -> None:
    """Print the cost of a recipe, or with `--fit SIZE` the options with which it fits a card.

    Args:
        args: Arguments of `lit-prefopt fit`, with `--steps N` or `--fit SIZE`.
    """
    memory, rest = take_option(args, "--fit", "the card's memory, such as `--fit 24GiB`")
    if memory is None:
        estimate(rest)
    else:
        fit_card(rest, parse_memory(memory))


def fit_card(args: Sequence[str], memory: int) -> FittingOptions:
    """Find, print and return the cheapest options with which a recipe fits a card.

    Everything is computed from tensor shapes: no weights are read and no GPU is needed, and of the
    pairs only one batch.

    Args:
        args: Arguments of `lit-prefopt fit`.
        memory: Bytes of the card.

    Raises:
        InputError: No set of options fits.
    """
    with tempfile.TemporaryDirectory(prefix="lit-prefopt-estimate-") as folder:
        limit = int(FITS * memory)
        kind = type("FitCLI", (FitCLI,), {"folder": folder, "limit": limit})
        cli = run_lightning(named_recipes(["fit", *args]), kind)
    found: FittingOptions = cli.found  # type: ignore[attr-defined]
    print_options(found)
    return found


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as 24GiB, 24GB or 24, which are GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|)\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError(f"--fit is {quoted(text)}: give the card's memory, such as `--fit 24GiB`.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def options_of(switches: Switches, recipe: StatedOptions, pairs: int, search: SwitchSearch) -> str:
    """Return options as command-line arguments, as far as the recipe has others.

    Args:
        switches: The options.
        recipe: Those of the recipe.
        pairs: Pairs of an optimizer step.
        search: The search that found them.
    """
    found = []
    if (switches.cached or switches.errors) and isinstance(search.batch, ImagePairs):
        found.append(CACHE)
    if switches.cached:
        found.append("--backbone.encoders false")
    if switches.errors:
        found.append("--data.reference FOLDER --backbone.reference none")
    if switches.one_pair:
        found.append("--data.batch_size 1")
        if recipe.pairs is None:
            found.append(f"--trainer.accumulate_grad_batches {pairs}")
    if switches.checkpointing != (recipe.checkpointing is True):
        found.append(f"--backbone.gradient_checkpointing {str(switches.checkpointing).lower()}")
    if switches.eight_bit:
        found.append("--model.optimizer AdamW8bit")
    if switches.bf16_weights:
        found.append("--model.optimizer.stochastic_rounding true --backbone.policy_dtype bfloat16")
    if switches.quantization != recipe.quantization:
        found.append(f"--backbone.quantization {switches.quantization}")
    return " ".join(found)


def print_options(found: FittingOptions) -> None:
    """Print what was tried, and the options to add."""
    table = Table("options", "GiB", "TFLOP per pair", "time by FLOPs", title="Fit, computed")
    for switches, needed, flops in found.trials:
        size = f"{needed.total / GIB:.2f}" if flops else f"over {needed.total / GIB:.2f}"
        ratio = f"{flops / found.plain_flops:.2f}" if flops else ""
        table.add_row(switches.names, size, f"{flops / 1e12:.3g}" if flops else "", ratio)
    console = Console(markup=False)
    console.print(table)
    best = found.trials[-1]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in best.parts.named().items())
    console.print(
        f"A step needs {_gib(found.needed)} of the {_gib(found.limit)} that it may use ({parts})."
    )
    if best.switches.eight_bit or best.switches.quantization:
        console.print(
            "FLOPs do not contain the time of 8-bit moments and of dequantizing weights: run "
            "`estimate` without `--fit` on the card to measure it."
        )
    if best.switches.cached or best.switches.errors:
        console.print("FOLDER: caches that `lit-prefopt predict` writes (docs/guides/caching.md).")
    if found.kept:
        console.print(f"Encodings that the training keeps: {size_in_words(found.kept)} at most.")
    console.print("Add to the recipe:" if found.options else "The recipe fits as it is.")
    console.print(found.options, soft_wrap=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
