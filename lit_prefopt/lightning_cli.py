"""The trainer's commands: a LightningCLI that knows backbones and run directories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_prefopt.backbones import Backbone
from lit_prefopt.callbacks.disk_space import DiskSpace
from lit_prefopt.callbacks.interrupts import Interrupts
from lit_prefopt.callbacks.monitors import Monitors
from lit_prefopt.callbacks.out_of_memory import BLUNT, OutOfMemory
from lit_prefopt.callbacks.parameter_count import ParameterCount
from lit_prefopt.callbacks.progress import StepProgressBar
from lit_prefopt.command_line.parser import PlainParser
from lit_prefopt.configs import BASE, PREDICT
from lit_prefopt.effective_batch import EffectiveBatch, prefer_trainer_keys
from lit_prefopt.errors import InputError, causes, check_number
from lit_prefopt.lazy import import_classes
from lit_prefopt.recipe_files import allow_own_modules, loader
from lit_prefopt.recipe_strings import read_recipe, strings, words
from lit_prefopt.runs.directory import (
    RunDirectory,
    check_run_directory,
    logger_arguments,
    run_directory,
    set_checkpoint_folder,
)
from lit_prefopt.strategies.compatibility import check_strategy
from lit_prefopt.utils.addresses import check_secrets
from lit_prefopt.utils.device import is_out_of_memory
from lit_prefopt.utils.garbage import collection
from lit_prefopt.utils.quiet import hide_notices
from lit_prefopt.weights.checks import first_line

set_loader("yaml", loader(get_loader("yaml")), (yaml.YAMLError,))


USERS = (MisconfigurationException, ValueError, TypeError, AttributeError, ImportError)
"""Errors in building a recipe's classes that are the user's to mend."""


class Parser(PlainParser, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line."""


class PreferenceCLI(LightningCLI):
    """LightningCLI with a `backbone` of its own, handed to the model when both are built."""

    commands: ClassVar[tuple[str, ...]] = ()
    """Commands whose parsers are built; all if empty."""

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the Trainer's commands, with the arguments of each that are not keys."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in cls.commands or known}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys `backbone`, with its link to the model, and `batch`."""
        parser.add_subclass_arguments(Backbone, "backbone", required=False)
        parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")
        parser.add_class_arguments(EffectiveBatch, "batch")

    def before_instantiate_classes(self) -> None:
        """Look at the run's directory before anything is loaded."""
        collection.resume()
        config = self.config[self.subcommand]
        self.root = run_directory(config)
        fitting = self.subcommand == "fit"
        config.ckpt_path = check_run_directory(self.root, config.get("ckpt_path"), fitting=fitting)
        strategy = config.trainer.strategy
        check_strategy(str(getattr(strategy, "class_path", strategy)).split(".")[-1])
        prefer_trainer_keys(config, self.given)
        EffectiveBatch(**config.batch.as_dict()).check_alone(config.trainer)
        if config.batch.pairs is None and config.trainer.accumulate_grad_batches is None:
            config.trainer.accumulate_grad_batches = 1
        limits = config.trainer
        if (limits.max_steps, limits.max_epochs, limits.max_time) == (-1, None, None):
            limits.max_epochs = -1  # no end; Lightning would take 1,000 epochs for one
        # Lightning divides by these unchecked.
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            check_number(f"trainer.{name}", config.trainer[name], 1, optional=True)
        interval = config.trainer.val_check_interval
        if isinstance(interval, int | float):
            check_number("trainer.val_check_interval", interval, above=0)
        if config.trainer.logger is False:  # LearningRateMonitor refuses to run without one
            needing, callbacks = "LearningRateMonitor", config.trainer.callbacks or []
            kept = [c for c in callbacks if not c.class_path.endswith(needing)]
            config.trainer.callbacks = kept

    def instantiate_classes(self) -> None:
        """Build everything; what a class says of its arguments is the user's to mend."""
        try:
            super().instantiate_classes()
        except USERS as error:
            chain = causes(error)
            if any(isinstance(cause, InputError) for cause in chain):
                raise
            message = " ".join(str(chain[-1]).split())
            raise InputError(
                f"The recipe cannot be used: {message} (`--print_config` shows what every key was "
                "resolved to.)"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputError(BLUNT) from error
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; where memory does not suffice, say what would."""
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            [noted] = [c for c in callbacks if isinstance(c, OutOfMemory)]
            raise InputError(noted.message or BLUNT) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, whose output goes into the run's directory; the recipe stays."""
        arguments = logger_arguments(self.config[self.subcommand], self.root)
        trainer = super().instantiate_trainer(**arguments, **kwargs)
        set_checkpoint_folder(trainer, self.root)
        batch: EffectiveBatch = self._get(self.config_init, "batch")
        if self.subcommand == "fit":
            batch.apply(trainer, self.datamodule)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Lightning's own bar and table of layers, where the recipe names none
        callbacks = [StepProgressBar() if type(c) is RichProgressBar else c for c in callbacks]
        if "ModelSummary" not in str(self.config[self.subcommand].trainer.callbacks):
            callbacks = [ParameterCount() if isinstance(c, ModelSummary) else c for c in callbacks]
        callbacks += [batch, OutOfMemory(), DiskSpace()]
        interrupts = [c for c in callbacks if isinstance(c, Interrupts)] or [Interrupts()]
        others = [c for c in callbacks if not isinstance(c, Interrupts)]
        trainer.callbacks = [Monitors(), *others, *interrupts[:1]]  # type: ignore[attr-defined]
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`, which are the process's own or a test's."""
        self.given = {arg.removeprefix("--").split("=")[0] for arg in args if arg[:2] == "--"}
        try:
            self.config = parser.parse_args(args)
        except ValueError as error:
            if not str(error).startswith("Unable to add parameter"):
                raise
            raise InputError(
                "A class that is named has an argument that no recipe can give, because of its "
                f"type ({first_line(error)}): name another class, or, if it is your own, annotate "
                "the argument with a type that YAML can express."
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the recipe as it is: Lightning would let the checkpoint's numbers override it."""


def run_lightning(
    args: Sequence[str], kind: type[PreferenceCLI] = PreferenceCLI, *, every_parser: bool = False
) -> PreferenceCLI:
    """Run one of the trainer's commands, and return what ran it.

    Args:
        args: The command and its arguments.
        kind: Class of the command line.
        every_parser: Build the parsers of all commands, not only of the one that runs.
    """
    hide_notices()
    allow_own_modules(args)
    if not every_parser:
        kind = type(kind.__name__, (kind,), {"commands": (args[0],)})
    defaults = {
        command: [str(BASE), *([str(PREDICT)] if command == "predict" else [])]
        for command in kind.subcommands()
    }
    # The parser finds a class by its name where its module is imported.
    Parser.files = read_recipe(args, [BASE, PREDICT])
    for text in (text for file in Parser.files for text in strings(file.content)):
        check_secrets(text)
    import_classes(words(args, Parser.files))
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunDirectory,
        save_config_kwargs={"save_to_log_dir": False},  # it writes recipe.yaml itself
        trainer_defaults={"accumulate_grad_batches": None},  # so that a 1 that is given is seen
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=Parser,
        parser_kwargs={
            "prog": "lit-prefopt",
            **{name: {"default_config_files": files} for name, files in defaults.items()},
        },
        args=list(args),
    )
