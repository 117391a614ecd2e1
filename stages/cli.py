"""The ``reelforge`` command. Imports nothing heavy: ``--help`` answers at once, each verb loads what it needs."""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from reelforge.engine.core.allocator import keep_freed_memory
from reelforge.engine.core.errors import Interrupted, ReelforgeError
from reelforge.engine.core.settings import settings
from reelforge.stages import bench

Verb = Callable[[argparse.Namespace], int]


def _lazily(module: str) -> Verb:
    """The verb's ``main`` in its module of this package, imported when it runs."""

    def run(arguments: argparse.Namespace) -> int:
        if settings().kernel_pins:
            importlib.import_module("reelforge.engine.core.probe").pin_kernels(settings().kernel_pins)
        return importlib.import_module(f"reelforge.stages.{module}").main(arguments)

    return run


def _with_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a TOML file; see recipes/")
    _with_overrides(parser)


def _with_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides", help="override one key; repeatable"
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demo (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a minute instead of ten; shows that it runs, not how well"
    )
    parser.add_argument("--seed", type=int, default=0, help="names every random draw (default: %(default)s)")
    _with_overrides(parser)


def _rlhf(parser: argparse.ArgumentParser) -> None:
    _with_recipe(parser)
    parser.add_argument(
        "--preset", choices=("ours", "flash", "flow", "dance", "mix"),
        help="lay a published method's settings over the recipe; see recipes/presets/",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what the run would do and cost, and stop")


def _distill(parser: argparse.ArgumentParser) -> None:
    _with_recipe(parser)
    parser.add_argument("--plan", action="store_true", help="print memory and FLOPs from the models' configs, and stop")


def _pipeline(parser: argparse.ArgumentParser) -> None:
    _with_recipe(parser)
    parser.add_argument(
        "--skip", action="append", default=[],
        choices=("cache", "sft", "rlhf", "longer", "enhance", "distill", "judge"),
        help="leave a stage out; repeatable",
    )  # fmt: skip


def _enhance(parser: argparse.ArgumentParser) -> None:
    _with_recipe(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], help="put this to a rewriter whose folder stands in the recipe's place"
    )


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, metavar="RECIPE", help="print what a distill recipe takes, and stop")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of the GPU (default: this machine's, or an H200's)"
    )
    _with_overrides(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a model folder in diffusers' layout")
    parser.add_argument("--transformer", type=Path, help="transformer/ of another run in place of the folder's")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter to merge in")
    parser.add_argument("--enhance", type=Path, metavar="REWRITER", help="rewrite the prompts by this folder's model")
    parser.add_argument("--prompt", action="append", default=[], help="what to show; repeatable")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    parser.add_argument(
        "--out", type=Path, default=Path("videos"), help="folder for the mp4 files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="names the noise (default: %(default)s)")
    _with_overrides(parser)


VERBS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("the whole chain in miniature, on a CPU, with a report", "demo", _demo),
    "pipeline": ("every stage of a recipe in order, each from the one before", "pipeline", _pipeline),
    "cache": ("encode a folder of clips and captions for training", "cache", _with_recipe),
    "sft": ("supervised fine-tuning on a cache", "sft", _with_recipe),
    "rlhf": ("GRPO from rewards on a set of prompts", "rlhf", _rlhf),
    "enhance": ("a rewriter of prompts, from pairs and from rewards", "enhance", _enhance),
    "distill": ("a causal few-step student by self-forcing", "distill", _distill),
    "generate": ("prompts to mp4 files", "generate", _generate),
    "judge": ("models on the same prompts and noise, scored and compared, on one page", "judge", _with_recipe),
    "bench": ("rates on a GPU, gates without one, records and their comparison", "bench", bench.add_arguments),
    "doctor": ("what this machine has, which kernels run and why", "doctor", _doctor),
}


def parser() -> argparse.ArgumentParser:
    """The command's parser; one subparser a verb."""
    top = argparse.ArgumentParser(prog="reelforge", description="Post-train and run Wan2.1-family video models.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (summary, module, add_arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add_arguments(verb)
        verb.set_defaults(run=_lazily(module))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit status: 0 done, 2 bad input, 3 training failed, 10 to 13 ``bench compare``, 130 interrupted."""
    arguments = parser().parse_args(argv)
    keep_freed_memory()
    # SIGTERM ends a verb as Ctrl-C does; training and sampling turn both into an orderly stop.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.run(arguments)
    except ReelforgeError as error:
        word = "stopped" if isinstance(error, Interrupted) else "error"
        sys.stderr.write(f"reelforge {arguments.verb}: {word}: {error.what}\n  {error.hint}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"reelforge {arguments.verb}: interrupted\n  Run the same command to continue.\n")
        return Interrupted.exit_code
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
