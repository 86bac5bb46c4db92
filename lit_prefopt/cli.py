"""The command line: the trainer's commands, and what is built on them or beside them.

Every key of a recipe is an argument of a class; `lit-prefopt fit --model.help DiffusionDPO` prints
a class's arguments.
"""

from __future__ import annotations

import os
import sys
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_prefopt.command_line.quick import answer
from lit_prefopt.configs import HOMES, named_columns, recipe_names
from lit_prefopt.errors import (
    TRACE,
    InputError,
    UsageError,
    causes,
    did_you_mean,
    is_from,
    printable,
    quoted,
)
from lit_prefopt.recipe_files import named_recipes
from lit_prefopt.utils.addresses import check_secrets
from lit_prefopt.utils.garbage import collection
from lit_prefopt.utils.os_errors import explain_os_error
from lit_prefopt.utils.output_lock import release_locks
from lit_prefopt.utils.parent_watch import watch_parent

if TYPE_CHECKING:
    from lit_prefopt.command_line.table import Table

COMMANDS = ("fit", "validate", "test", "predict")
OTHERS = ("evaluate", "estimate", "shards", "rounds", "export", "report")
HELP = """usage: lit-prefopt COMMAND [--config RECIPE] [--KEY VALUE ...]

Align text-to-image diffusion models with human preferences.

commands:
  fit        train by a recipe: lit-prefopt fit --config toy-diffusion-dpo
  estimate   what a `fit` will cost, from its first steps: time, memory, hours of a device;
             with --fit 24GiB, the cheapest options with which it fits a card
  validate   held-out preference accuracy of a checkpoint
  test       compare policy and reference on held-out prompts
  evaluate   compare any two models: lit-prefopt evaluate --config toy --model.policy NAME
  predict    generate pairs: lit-prefopt predict --config toy-self-play
  rounds     generate and fit in turn: lit-prefopt rounds --config toy-spin
  shards     convert | validate | preview | index | stages: make pair shards, look at them
  export     trained weights for diffusers, A1111 and ComfyUI: LoRA, pipeline or single file
  report     an evaluation's page, made again: lit-prefopt report --folder runs/RUN/evaluation

`--config` takes a path or the name of a shipped recipe; COMMAND --help lists every key,
`lit-prefopt fit --model.help DiffusionDPO` the arguments of a class.
"""


def shards(args: Sequence[str]) -> None:
    """Run `lit-prefopt shards convert | validate | preview | index | stages`."""
    from lit_prefopt.data.shards.index import index_shards
    from lit_prefopt.prepare import ValidationReport, convert, preview, split_into_stages, validate

    functions = {
        "convert": convert,
        "validate": validate,
        "preview": preview,
        "index": index_shards,
        "stages": split_into_stages,
    }
    result = _call(functions, "shards", named_columns(args))
    if isinstance(result, ValidationReport) and result.would_stop:
        sys.exit(1)


def export_weights(args: Sequence[str]) -> None:
    """Run `lit-prefopt export`."""
    from lit_prefopt.commands.export import export

    _call(export, "export", args)


def write_report(args: Sequence[str]) -> None:
    """Run `lit-prefopt report`."""
    from lit_prefopt.evaluate.report.page import report

    _call(report, "report", args)


def run_estimate(args: Sequence[str]) -> None:
    """Run `lit-prefopt estimate`."""
    from lit_prefopt.utils.postponed import postpone_bitsandbytes

    postpone_bitsandbytes()
    from lit_prefopt.commands import estimate_fit

    estimate_fit.run_estimate(args)


def run_rounds(args: Sequence[str]) -> None:
    """Run `lit-prefopt rounds`."""
    from lit_prefopt.commands.rounds import rounds

    _call(rounds, "rounds", named_recipes(["rounds", *args])[1:])


def run_trainer(args: Sequence[str]) -> None:
    """Run one of the Trainer's commands, or `evaluate`, which is a `predict` of two models."""
    named = named_recipes(args)
    if named[0] == "evaluate":
        named[0] = "predict"
    if not answer(named, _write_table):
        collection.postpone()
        try:
            from lit_prefopt.utils.postponed import postpone_bitsandbytes

            postpone_bitsandbytes()
            from lit_prefopt.lightning_cli import run_lightning

            run_lightning(named)
        finally:
            collection.resume()


def _write_table() -> Table:
    from lit_prefopt.commands.help_pages import write_table

    return write_table()


def _call(components: Any, command: str, args: Sequence[str]) -> Any:
    """Call a function, or one of several by name, with its arguments from the command line."""
    from jsonargparse import auto_cli

    from lit_prefopt.command_line.parser import PlainParser

    return auto_cli(
        components,
        args=list(args),
        as_positional=False,
        prog=f"lit-prefopt {command}",
        parser_class=PlainParser,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; `args` defaults to the process's own."""
    args = list(sys.argv[1:] if args is None else args)
    watch_parent()
    try:
        _run(args)
        sys.stdout.flush()  # a full disk or a closed pipe is noticed here, not after the end
    except BrokenPipeError:  # as of `lit-prefopt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        # Lightning ends with 1 after Ctrl-C and with 0 after SIGTERM, which reads as success.
        if isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(130)
        sys.exit(143 if type(stop).__name__ == "SIGTERMException" else stop.code)
    except Exception as error:
        sentence = None if os.environ.get(TRACE) else _user_message(error, args)
        if sentence is None:
            raise
        if any(isinstance(cause, UsageError) for cause in causes(error)):
            print(f"lit-prefopt: {sentence}", file=sys.stderr)
            sys.exit(2)
        sys.exit(f"lit-prefopt: {sentence}")
    finally:
        release_locks()


def _user_message(error: Exception, args: Sequence[str] = ()) -> str | None:
    """Return what is the user's to mend, in words, or None for a failure of the program.

    That is an InputError, or one that others were raised from (not one that was merely handled
    before); and what Lightning says of its own arguments.
    """
    for cause in causes(error):
        if isinstance(cause, InputError):
            return str(cause)
    if _is_lost_rank(error):
        message = str(error).strip().splitlines()[0]
        return (
            f"Another rank has ended or does not answer ({message}): see what it said, and go on "
            "by starting all of them again with `--ckpt_path last`."
        )
    lightnings = type(error).__name__ == "MisconfigurationException"
    if lightnings or (isinstance(error, ValueError) and is_from(error, "lightning")):
        return printable(str(error))
    if isinstance(error, UnicodeDecodeError):
        named = next(filter(_is_binary, (arg.split("=", 1)[-1] for arg in args)), None)
        return named and f"{printable(named)} is not a text in UTF-8: name a YAML or text file."
    return explain_os_error(error)


def _is_binary(name: str) -> bool:
    """Return whether a name is that of a file whose beginning is not text."""
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as stream:
        beginning = stream.read(2**20)
    try:
        getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return True
    return False


def _is_lost_rank(error: Exception) -> bool:
    """Return whether a rank could not be reached, by NCCL, its store, or gloo (a RuntimeError)."""
    named = ("DistBackendError", "DistNetworkError", "DistStoreError")
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return gloo or type(error).__name__ in named


def _print_help() -> None:
    print(HELP)
    for command, home in {"fit": "recipes", **HOMES}.items():
        names = "".join(f"\n  {name}" for name in recipe_names(home))
        print(f"shipped recipes of `{command}`:{names}")


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        _print_help()
        return
    # transformers warns at import of packages that no command needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for arg in args:  # before any of them is printed or saved
        check_secrets(arg)
    if args[0] == "shards":
        shards(args[1:])
    elif args[0] == "export":
        export_weights(args[1:])
    elif args[0] == "report":
        write_report(args[1:])
    elif args[0] == "rounds":
        run_rounds(args[1:])
    elif args[0] == "estimate":
        run_estimate(args[1:])
    elif args[0] in (*COMMANDS, "evaluate"):
        run_trainer(args)
    else:
        known = (*COMMANDS, *OTHERS)
        raise UsageError(f"There is no command {quoted(args[0])}; {did_you_mean(args[0], known)}")


if __name__ == "__main__":
    main()
