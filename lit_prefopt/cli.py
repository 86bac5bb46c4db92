"""The command line: `lit-prefopt fit | validate | test | predict`, and `lit-prefopt shards ...`.

Every key of a recipe is an argument of a class; `lit-prefopt fit --model.help DiffusionDPO` prints
a class's arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported so that a recipe may name their classes without the whole path.
import lit_prefopt.backbones
import lit_prefopt.callbacks
import lit_prefopt.data
import lit_prefopt.evaluate.prompts
import lit_prefopt.judges
import lit_prefopt.methods
import lit_prefopt.optimizers
import lit_prefopt.toy  # noqa: F401
from lit_prefopt.backbones import Backbone
from lit_prefopt.configs import BASE, find_config
from lit_prefopt.errors import InputError
from lit_prefopt.run_directory import RunDirectory, prepare_run_directory

COMMANDS = ("fit", "validate", "test", "predict")
HELP = """usage: lit-prefopt COMMAND [--config RECIPE] [--KEY VALUE ...]

Align text-to-image diffusion models with human preferences.

commands:
  fit        train by a recipe: lit-prefopt fit --config toy-diffusion-dpo
  validate   held-out preference accuracy of a checkpoint
  test       compare policy and reference on held-out prompts
  predict    run a generator
  shards     convert | index: turn your images into pair shards

`--config` takes a path or the name of a shipped recipe; COMMAND --help lists every key,
`lit-prefopt fit --model.help DiffusionDPO` the arguments of a class.

shipped recipes:
"""


class PreferenceCLI(LightningCLI):
    """LightningCLI with a `backbone` of its own, handed to the model when both are built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `backbone` key and its link to the model."""
        parser.add_subclass_arguments(Backbone, "backbone", required=False)
        parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Give the run its directory."""
        assert self.subcommand is not None
        prepare_run_directory(self.config[self.subcommand], fitting=self.subcommand == "fit")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`, which are the process's own or a test's."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the recipe as it is: Lightning would let the checkpoint's numbers override it."""


def run_lightning(args: Sequence[str]) -> None:
    """Run one of the trainer's commands."""
    PreferenceCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunDirectory,
        save_config_kwargs={"config_filename": "recipe.yaml", "save_to_log_dir": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={command: {"default_config_files": [str(BASE)]} for command in COMMANDS},
        args=named_recipes(args),
    )


def named_recipes(args: Sequence[str]) -> list[str]:
    """Return the arguments with names of shipped recipes and their parts replaced by paths."""
    resolved: list[str] = []
    separated = [part for arg in args for part in _separate(arg)]
    for before, arg in zip(("", *separated), separated, strict=False):
        part = before in ("--model", "--backbone", "--data", "--trainer") and arg.endswith(".yaml")
        named = before in ("--config", "-c") or part
        resolved.append(str(find_config(arg)) if named else arg)
    return resolved


def _separate(arg: str) -> list[str]:
    """Return `--config=NAME` as two arguments, and any other as it is."""
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def shards(args: Sequence[str]) -> None:
    """Run `lit-prefopt shards convert | index`."""
    from lit_prefopt.data.convert import convert
    from lit_prefopt.data.index import index_shards

    auto_cli(
        {"convert": convert, "index": index_shards},
        args=list(args),
        as_positional=False,
        prog="lit-prefopt shards",
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; `args` defaults to the process's own."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        recipes = sorted(path.stem for path in (BASE.parent / "recipes").glob("*.yaml"))
        print(HELP + "\n".join(f"  {name}" for name in recipes))
        return
    try:
        _run(args)
    except InputError as error:
        sys.exit(f"lit-prefopt: {error}")


def _run(args: list[str]) -> None:
    if args[0] == "shards":
        shards(args[1:])
    elif args[0] in COMMANDS:
        run_lightning(args)
    else:
        known = ", ".join((*COMMANDS, "shards"))
        raise InputError(f"There is no command {args[0]!r}; choose one of {known}.")


if __name__ == "__main__":
    main()
