"""``reelforge bench`` as it is typed."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reelforge.bench import readme
from reelforge.bench.compare import Status
from reelforge.bench.report import NO_RECORD
from reelforge.stages.cli import main

DATA = Path(__file__).parent / "data"
VERBS = (
    "kernels",
    "block",
    "fp8",
    "sensitivity",
    "rl-cost",
    "rl",
    "distill",
    "h200",
    "gate",
    "compare",
    "report",
    "promote",
)


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench(verb, "--help")
    assert exit_.value.code == 0
    assert f"usage: reelforge bench {verb}" in capsys.readouterr().out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reelforge.stages.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass\n"
        "light = {'reelforge.bench.cli', 'reelforge.bench.drive'}\n"
        "heavy = {'torch', 'triton', 'numpy', 'rich', 'matplotlib'} & sys.modules.keys()\n"
        "print(sorted(heavy | {name for name in sys.modules if name.startswith('reelforge.bench.')} - light))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert time.monotonic() - start < 3


def test_every_exit_code_is_in_the_help_and_in_the_docs(capsys) -> None:
    with pytest.raises(SystemExit):
        bench("compare", "--help")
    text = capsys.readouterr().out
    docs = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
    for status in Status:
        assert re.search(rf"^ +{int(status)}  {status.name} ", text, re.MULTILINE)
        assert f"| {int(status)} | {status.name} |" in docs


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("verb", ["kernels", "block", "h200"])
def test_nothing_is_timed_without_a_gpu(verb: str, tmp_path: Path, capsys) -> None:
    assert bench(verb, "--out", tmp_path / "out") == 2
    assert "There is no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", Status, ids=lambda status: status.name)
def test_compare_ends_with_the_code_of_its_status(status: Status, capsys) -> None:
    new = DATA / f"new_{status.name.lower()}.jsonl"
    assert bench("compare", DATA / "base.jsonl", new) == status
    assert capsys.readouterr().out.splitlines()[-1] == f"{status.name} (exit code {int(status)})"
    assert bench("compare", DATA / "base.jsonl", new, "--json") == status
    assert json.loads(capsys.readouterr().out)["status"] == status.name


def test_compare_with_limits_and_renewal(tmp_path: Path, capsys) -> None:
    limits, base = tmp_path / "limits.json", tmp_path / "base.jsonl"
    limits.write_text('{"Example GPU": {"norm_modulate 1.3B 4680": {"median_us": 1.0}}}')
    base.touch()
    assert bench("compare", base, DATA / "new_pass.jsonl", "--limits", limits, "--renew") == Status.REGRESSION
    assert "above the limit of 1" in capsys.readouterr().out
    assert len(base.read_text().splitlines()) == 2


def test_compare_with_a_missing_file_is_an_infra_error(tmp_path: Path, capsys) -> None:
    assert bench("compare", DATA / "base.jsonl", tmp_path / "none.jsonl") == Status.INFRA_ERROR
    assert "none.jsonl cannot be read" in capsys.readouterr().out


def test_report_prints_or_writes(tmp_path: Path, capsys) -> None:
    assert bench("report") == 0
    assert NO_RECORD in capsys.readouterr().out
    assert bench("report", DATA / "run.jsonl", DATA / "base.jsonl") == 0
    assert "## Example GPU" in capsys.readouterr().out
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}{readme.END}")
    assert bench("report", DATA / "run.jsonl", "--out", tmp_path / "r.md", "--png", "--readme", page) == 0
    assert capsys.readouterr().out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "r.md", "r-roofline.png"}
    assert "norm_modulate" in page.read_text()


def test_report_on_a_missing_file_or_a_readme_without_marks(tmp_path: Path, capsys) -> None:
    assert bench("report", tmp_path / "none.jsonl") == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    page = tmp_path / "README.md"
    page.write_text("no marks")
    assert bench("report", DATA / "run.jsonl", "--readme", page) == 2
    assert "has no <!-- bench:begin -->" in capsys.readouterr().err


def test_promote_says_what_each_kernel_lacks(tmp_path: Path, capsys) -> None:
    assert bench("promote", DATA / "base.jsonl", "--check") == 0
    assert "refused    norm_modulate/triton on 9.0: its source is another one now" in capsys.readouterr().out
    empty = tmp_path / "none.jsonl"
    empty.touch()
    assert bench("promote", empty, "--check") == 0
    assert capsys.readouterr().out == "There is no record of a kernel of ours.\n"


# -- bench/ci.sh ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
# `reelforge`, except that `bench kernels --out FILE` copies stored records instead of measuring.
if [ "$2" = kernels ]; then
    [ -n "{source}" ] && cp "{source}" "$4"
    exit {code}
fi
exec "{python}" -m reelforge.stages.cli "$@"
"""


def ci(tmp_path: Path, source: object, *, code: int = 0, base: Path = DATA / "base.jsonl", **environment: str):
    """Run the script with stored records in place of a measurement."""
    command = tmp_path / "reelforge"
    command.write_text(STAND_IN.format(source=source, code=code, python=sys.executable))
    command.chmod(0o755)
    return subprocess.run(
        [ROOT / "bench/ci.sh", base, tmp_path / "artefacts", "--op", "norm_modulate"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "REELFORGE": str(command), **environment},
        capture_output=True,
        text=True,
    )


ARTEFACTS = {"records.jsonl", "compare.txt", "compare.json", "report.md", "report-roofline.svg"}


@pytest.mark.parametrize("status", [Status.PASS, Status.REGRESSION], ids=lambda status: status.name)
def test_ci_passes_the_code_on_and_leaves_artefacts(status: Status, tmp_path: Path) -> None:
    done = ci(tmp_path, DATA / f"new_{status.name.lower()}.jsonl")
    assert done.returncode == status, done.stderr
    assert {path.name for path in (tmp_path / "artefacts").iterdir()} == ARTEFACTS
    assert json.loads((tmp_path / "artefacts/compare.json").read_text())["exit_code"] == status
    assert status.name in done.stdout and status.name in (tmp_path / "artefacts/compare.txt").read_text()


def test_ci_reports_what_a_failed_measurement_left(tmp_path: Path) -> None:
    assert ci(tmp_path, DATA / "new_pass.jsonl", code=7).returncode == 7
    assert {path.name for path in (tmp_path / "artefacts").iterdir()} == ARTEFACTS


def test_ci_without_any_record_is_an_infra_error(tmp_path: Path) -> None:
    done = ci(tmp_path, "")
    assert done.returncode == Status.INFRA_ERROR and "records.jsonl cannot be read" in done.stdout


def test_ci_makes_and_renews_the_baseline(tmp_path: Path) -> None:
    base = tmp_path / "new/base.jsonl"
    done = ci(tmp_path, DATA / "new_pass.jsonl", base=base, BENCH_RENEW="1")
    assert done.returncode == Status.CALIBRATION_NEEDED
    assert len(base.read_text().splitlines()) == 2
    again = ci(tmp_path, DATA / "new_pass.jsonl", base=base)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_ci_says_how_it_is_called() -> None:
    done = subprocess.run([ROOT / "bench/ci.sh", "base.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: bench/ci.sh BASELINE.jsonl ARTEFACTS")
