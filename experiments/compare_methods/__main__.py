"""python -m experiments.compare_methods: see the package."""

from jsonargparse import auto_cli

from experiments.compare_methods.runs import main

if __name__ == "__main__":
    auto_cli(main, as_positional=False)
