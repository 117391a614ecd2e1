"""``reelforge bench``: rates on a GPU, gates without one, and what is done with records. Imports nothing heavy."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from reelforge.bench.drive import Drive

_Run = Callable[[argparse.Namespace], int]
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_Verb = Callable[[str, str, _Run], argparse.ArgumentParser]  # name, summary and what it runs

_EXIT_CODES = """\
exit codes:
   0  PASS                no gate is broken
  10  CALIBRATION_NEEDED  fewer than three baselines of this machine and recipe
  11  RECIPE_MISMATCH     baselines exist, but of another workload, software or way of measuring
  12  INFRA_ERROR         a record is unreadable, invalid, throttled or missing
  13  REGRESSION          worse than the limit, or than the baselines' median by a share and by an amount
The gravest of all cases counts, REGRESSION being the gravest."""


def add_arguments(parser: argparse.ArgumentParser, drive: Drive) -> None:
    """The verbs under ``bench``; each leaves what it runs in the namespace, as ``bench_run``.

    Args:
        parser: of ``bench``.
        drive: runs a stage, for the arms of studies.
    """
    verbs = parser.add_subparsers(dest="bench_verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, run: _Run) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(bench_run=run)
        return made

    _add_kernels(verb)
    _add_fp8(verb)
    _add_rl(verb)
    _add_distill(verb)
    _add_studies(verb, drive)
    _add_machine(verb)
    _add_judging(verb)


def _add_kernels(verb: _Verb) -> None:
    kernels = verb("kernels", "accuracy and rates of every fused op against its peers, on a GPU", _lazily("runner"))
    kernels.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op; repeatable")
    kernels.add_argument("--filter", metavar="TEXT", help="only cases with this in their name")
    block = verb("block", "one transformer block: eager, compiled and ours, on a GPU", _lazily("block"))
    for parser in (kernels, block):
        parser.add_argument("--out", type=Path, help="append the records to this JSONL file")


def _add_fp8(verb: _Verb) -> None:
    verb("fp8", "ways to run attention in e4m3 and their distance from fp64, by arithmetic", _lazily("fp8_schemes"))
    each = verb("sensitivity", "what e4m3 in each class of linears does to a model's videos", _lazily("sensitivity"))
    each.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a model folder")
    each.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line")
    each.add_argument("--count", type=int, default=8, help="of the file's prompts (default: %(default)s)")
    each.add_argument("--out", type=Path, metavar="FILE.md", help="write the table here as well")
    each.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides", help="of sampling; repeatable"
    )


def _add_rl(verb: _Verb) -> None:
    costs = verb("rl-cost", "an RLHF iteration by arithmetic: FLOPs, GPU-hours, memory, waiting ranks", _rl_cost)
    costs.add_argument("--choices", type=int, default=10, metavar="K", help="steps that may be stochastic")
    costs.add_argument("--prompts", type=int, default=48, metavar="P", help="groups an iteration")
    costs.add_argument("--tflops", type=float, default=396.0, help="of a GPU, sustained (default: 40 %% of an H200)")
    rl = verb("rl", "whole RLHF iterations: what sharing, collapsing and overlap save, measured", _lazily("rl_run"))
    which = rl.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder")
    which.add_argument("--shape", choices=("1.3B", "14B"), help="random weights at 480 x 832, on a GPU")
    rl.add_argument("--frames", type=int, default=17, help="of a clip with --shape (default: %(default)s)")
    rl.add_argument("--rounds", type=int, default=5, help="turns of every arm (default: %(default)s)")
    rl.add_argument("--sweep", action="store_true", help="also the cost against G, k and T")
    rl.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the records, and tables beside them")
    for parser, steps in ((costs, 20), (rl, 10)):
        parser.add_argument("--group", type=int, default=8, metavar="G", help="samples a prompt (default: %(default)s)")
        parser.add_argument("--steps", type=int, default=steps, metavar="T", help="a sample (default: %(default)s)")


def _add_distill(verb: _Verb) -> None:
    distill = verb("distill", "self-forcing cycles; replayed backward against the joint graph", _lazily("distill_run"))
    which = distill.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder, for student, critic and teacher")
    which.add_argument("--teacher", choices=("1.3B", "14B"), help="random weights, student of 1.3B, on a GPU")
    for name, default, summary in (
        ("chunk-frames", 1, "latent frames a chunk with --model"),
        ("batch", 8, "clips with --model"),
        ("rounds", 5, "cycles"),
    ):
        distill.add_argument(f"--{name}", type=int, default=default, help=f"{summary} (default: %(default)s)")
    distill.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the records, and tables beside them")


def _add_studies(verb: _Verb, drive: Drive) -> None:
    proof, ablate, parity, rewriting = (
        _lazily(f"{module}_study", function, drive)
        for module, function in (("rl", "proof"), ("rl", "ablation"), ("distill", "run"), ("enhance", "run"))
    )
    study = verb("rl-study", "RLHF of the demo's model under several seeds, with controls and acceptance", proof)
    ablation = verb("rl-ablation", "sharing, noise, rectification and published methods at equal cost", ablate)
    ablation.add_argument("--nfe", type=int, default=20_000, help="network evaluations an arm (default: %(default)s)")
    ablation.add_argument("--seconds", type=float, help="train every arm for so many seconds as well")
    distilled = verb("distill-study", "is the demo's student level with its teacher, and what is it owed to", parity)
    whole = verb("study", "the pipeline under three seeds and every ablation, one page from records", _lazily("study"))
    whole.add_argument("--out", type=Path, default=Path("study"), metavar="DIR", help="folder (default: %(default)s)")
    whole.add_argument("--page", type=Path, default=Path("docs/miniature.md"), help="(default: %(default)s)")
    whole.add_argument("--nfe", type=int, default=8_000, help="of each arm of rl-ablation (default: %(default)s)")
    enhanced = verb("enhance-study", "do rewrites help the demo's aligned model, and what is it owed to", rewriting)
    for parser, out, samples, recipe in (
        (study, "rl_study", None, "rlhf"),
        (ablation, "rl_ablation", 2, "rlhf"),
        (distilled, "distill_study", None, "distill"),
        (enhanced, "enhance_study", None, "enhance"),
    ):
        parser.add_argument("--demo", type=Path, default=Path("demo"), help="a finished demo (default: %(default)s)")
        parser.add_argument(
            "--out", type=Path, default=Path("runs") / out, metavar="DIR", help="folder (default: %(default)s)"
        )
        parser.add_argument(
            "--recipe",
            type=Path,
            default=_RECIPES / f"{recipe}_miniature.toml",
            metavar="FILE.toml",
            help="of every arm (default: %(default)s)",
        )
        parser.add_argument(
            "--samples", type=int, default=samples, help=f"clips a prompt (default: {samples or 'the demo'})"
        )
        parser.add_argument(
            "--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides", help="of every arm; repeatable"
        )


def _add_machine(verb: _Verb) -> None:
    h200 = verb("h200", "everything a fresh GPU machine should be asked, in sections of minutes", _lazily("h200"))
    h200.add_argument("--out", type=Path, default=Path("h200"), metavar="DIR", help="folder (default: %(default)s)")
    h200.add_argument("--section", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    h200.add_argument("--resume", action="store_true", help="go on after the last finished case of the folder")
    h200.add_argument("--limit", type=float, metavar="SECONDS", help="of all sections together, shared among them")
    h200.add_argument("--quick", action="store_true", help="few rounds and sizes; shows that it runs, not how fast")
    gate = verb("gate", "compile every kernel for sm_90a and compare the machine code; needs no GPU", _lazily("gate"))
    gate.add_argument("--update", action="store_true", help="store what was compiled as the new expectation")
    gate.add_argument(
        "--triton", type=Path, action="append", metavar="PATH",
        help="folder with another Triton to compile with; repeatable (default: the GPU machines')",
    )  # fmt: skip
    gate.add_argument("--json", action="store_true", help="machine-readable")


def _add_judging(verb: _Verb) -> None:
    compare = verb("compare", "new records against baselines of the same machine and recipe", _compare)
    compare.epilog = _EXIT_CODES
    compare.add_argument("base", type=Path, metavar="BASE.jsonl", help="earlier records; may be an empty file")
    compare.add_argument("new", type=Path, metavar="NEW.jsonl", help="records to judge")
    compare.add_argument("--limits", type=Path, help="absolute limits by GPU and case (default: bench/limits.json)")
    compare.add_argument("--renew", action="store_true", help="append the judged records to BASE.jsonl")
    compare.add_argument("--json", action="store_true", help="machine-readable")
    report = verb("report", "records as Markdown tables and a roofline picture", _report)
    report.add_argument("records", type=Path, nargs="*", help="JSONL files")
    report.add_argument("--out", type=Path, metavar="FILE.md", help="write here, the picture beside it; else print")
    report.add_argument("--png", action="store_true", help="the picture as PNG instead of SVG")
    report.add_argument("--readme", type=Path, metavar="README.md", help="renew the table between its bench comments")
    promote = verb("promote", "mark kernels proven whose every accuracy case passed on a GPU", _promote)
    promote.add_argument("records", type=Path, nargs="+", help="JSONL files")
    promote.add_argument("--check", action="store_true", help="only say what would change")


def _lazily(module: str, function: str = "main", *more: object) -> _Run:
    """A function of a module of this package, which is imported when it runs."""

    def run(arguments: argparse.Namespace) -> int:
        return getattr(importlib.import_module(f"reelforge.bench.{module}"), function)(arguments, *more)

    return run


def _emit(text: str) -> None:
    sys.stdout.write(text + "\n")


def _rl_cost(arguments: argparse.Namespace) -> int:
    from reelforge.bench import rl_cost, rl_cost_table

    layout = rl_cost.Layout(arguments.group, arguments.steps, arguments.choices)
    _emit(rl_cost_table.text(layout, arguments.prompts, arguments.tflops))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from reelforge.bench import compare

    limits = arguments.limits or compare.LIMITS
    comparison = compare.compare_files(arguments.base, arguments.new, limits, arguments.renew)
    _emit(comparison.json() if arguments.json else comparison.table())
    return int(comparison.status)


def _report(arguments: argparse.Namespace) -> int:
    from reelforge.bench import readme, record_files, report

    entries = [entry for path in arguments.records for entry in record_files.read(path)]
    if arguments.readme is not None:
        readme.update(entries, arguments.readme)
    if arguments.out is not None:
        report.write(entries, arguments.out, ".png" if arguments.png else ".svg")
    if arguments.readme is None and arguments.out is None:
        _emit(report.render(entries).rstrip())
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from reelforge.bench import promote, record_files

    entries = [entry for path in arguments.records for entry in record_files.read(path)]
    outcomes = promote.promote([entry.record for entry in entries if entry.record], check=arguments.check)
    for outcome in outcomes:
        _emit(str(outcome))
    if not outcomes:
        _emit("There is no record of a kernel of ours.")
    return 0
