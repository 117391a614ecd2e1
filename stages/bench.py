"""``reelforge bench``: bench's verbs, handed what runs a stage. Imports nothing heavy."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from reelforge.bench import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cli.add_arguments(parser, drive)


def main(arguments: argparse.Namespace) -> int:
    return arguments.bench_run(arguments)


def drive(verb: str, recipe: Path, overrides: Sequence[str], overlays: Sequence[Path]) -> None:
    """Run a stage as its verb does, for a study's arm."""
    from reelforge.engine.core import config

    stage = importlib.import_module(f"reelforge.stages.{verb}")
    stage.run(config.load(getattr(stage, f"{verb.capitalize()}Config"), recipe, overrides, overlays))
