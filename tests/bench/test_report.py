"""The report's numbers are the records' numbers; the roofline is drawn; the README's table is put in place."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from reelforge.bench import readme, report, roofline
from reelforge.bench.record_files import Entry, read
from reelforge.bench.records import Hardware, Record
from reelforge.bench.report import NO_RECORD, groups, number, render
from reelforge.engine.core.errors import DataError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def run() -> list[Entry]:
    return read(DATA / "run.jsonl")


@pytest.fixture(scope="module")
def page(run: list[Entry]) -> str:
    return render(run)


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of all table rows below a heading, up to the next one."""
    part = page.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def find(run: list[Entry], op: str, label: str, arm: str = "ours", l2: str = "cold") -> Record:
    (found,) = [
        entry.record
        for entry in run
        if not entry.reasons
        and (entry.record.workload.op, entry.record.workload.label, entry.record.identity.arm) == (op, label, arm)
        and entry.record.timing is not None
        and entry.record.timing.l2 == l2
        and not entry.record.workload.backward
    ]
    return found


def test_every_table_is_rectangular(page: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert len(tables) == 3 * 2 + 3
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1


def test_arms_stand_side_by_side_with_bound_floor_and_ratios(run: list[Entry], page: str) -> None:
    head, _, *body = rows(page, "### norm_modulate")
    assert head == ["case", "L2", "floor us", "bound", "ours us", "compiled us", "eager us", "compiled over ours",
                    "eager over ours"]  # fmt: skip
    ours = find(run, "norm_modulate", "14B 4680")
    line = next(row for row in body if row[0] == "14B 4680")
    ratio = ours.derived.ratio_vs["compiled"]
    assert line[1:5] == ["cold", number(ours.derived.floor_us), "bytes", number(ours.timing.median_us)]
    assert line[5] == number(find(run, "norm_modulate", "14B 4680", "compiled").timing.median_us)
    assert line[7] == f"{ratio.median:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]"
    backward = next(row for row in body if row[0] == "14B 32760 backward")
    assert backward[6] == "–" and backward[8] == "–"  # eager was not among its arms


def test_rates_accuracy_and_clocks_of_each_arm(run: list[Entry], page: str) -> None:
    record = find(run, "attention", "1.3B 4680", "cudnn")
    line = next(row for row in rows(page, "### attention") if row[0] == "1.3B 4680" and row[2] == "cudnn")
    assert line[4:] == [
        number(record.derived.gbps),
        number(record.derived.tflops),
        f"{record.derived.pct_datasheet:.0f} %",
        f"{record.derived.pct_measured_peak:.0f} %",
        "2.1e-03",
        "1950",
        "kernel",
    ]
    warm = [row for row in rows(page, "### norm_modulate") if row[1] == "warm" and row[2].startswith("ours")]
    assert [row[2] for row in warm] == ["ours (triton)"]


def test_lost_shapes_are_listed_worst_first(run: list[Entry], page: str) -> None:
    lost = rows(page, "### Where a peer is faster")[2:]
    expected = sum(
        ratio.median < 1
        for group in groups([e.record for e in run if not e.reasons])
        for ratio in group.ratios.values()
    )
    assert len(lost) == expected == 9
    ratios = [float(row[3].split()[0]) for row in lost]
    assert ratios == sorted(ratios) and lost[0][:3] == ["attention 1.3B 32760", "cold", "cudnn"]
    assert f"{expected} of 39 comparisons." in page


def test_nothing_lost_is_said(run: list[Entry]) -> None:
    page = render([entry for entry in run if entry.record.workload.label == "14B 32760" and not entry.reasons][:2])
    assert "0 of 1 comparisons." in page and rows(page, "### Where a peer is faster") == []


def test_invalid_records_are_listed_with_their_reasons_and_times_and_nowhere_else(run: list[Entry], page: str) -> None:
    refused = {
        Path(entry.origin).name: [
            entry.record.timing.l2,
            number(entry.record.timing.median_us),
            "; ".join(f"{arm} {report.ratio_cell(ratio)}" for arm, ratio in entry.record.derived.ratio_vs.items())
            or "–",
        ]
        for entry in run
        if entry.reasons
    }
    assert rows(page, "## Invalid records, in no table above")[2:] == [
        [*each, *refused[each[0]]]
        for each in (
            ("run.jsonl:61", "ema_lerp 1.3B 32760", "ours", "throttled: sw_power_cap"),
            ("run.jsonl:62", "sde_step 1.3B 32760", "ours", "rel-L2 0.02 is above its tolerance 0.004"),
            ("run.jsonl:63", "sde_step 1.3B 32760", "eager", "no clock stamps"),
        )
    ]
    assert "### sde_step" not in page and "### ema_lerp" not in page


def test_a_line_that_is_no_record_is_listed(run: list[Entry]) -> None:
    page = render([*run, Entry("a/b.jsonl:7", None, ("not JSON | at all",))])
    assert "| b.jsonl:7 | – | – | not JSON \\| at all | – | – | – |" in page


def test_accuracy_runs_are_in_the_accuracy_table(page: str) -> None:
    table = rows(page, "### Accuracy against fp64")
    assert ["group_fork", "triton", "1", "2.1e-03", "4.0e-03"] in table
    assert ["norm_modulate", "triton", "8", "2.1e-03", "4.0e-03"] in table


def test_the_latest_record_of_a_case_counts(run: list[Entry]) -> None:
    record = find(run, "gelu", "1.3B 4680")
    later = replace(record.timing, median_us=77.7)
    identity = replace(record.identity, timestamp="2026-02-01T00:00:00.000+00:00")
    again = replace(record, timing=later, identity=identity)
    for order in ([record, again], [again, record]):
        (group,) = groups(order)
        assert group.microseconds("ours") == 77.7


def test_a_ratio_to_an_invalid_peer_is_not_shown(run: list[Entry]) -> None:
    record = find(run, "gelu", "1.3B 4680")
    (group,) = groups([record])
    assert "compiled" in record.derived.ratio_vs and group.ratios == {}


def test_machines_are_reported_apart(run: list[Entry]) -> None:
    record = find(run, "gelu", "1.3B 4680")
    capped = replace(record, hardware=replace(record.hardware, power_limit_w=350.0))
    page = render([Entry("x:1", record, ()), Entry("x:2", capped, ())])
    assert page.count("## Example GPU") == 2 and "350 W" in page and "700 W" in page


def test_accuracy_on_a_cpu_is_no_gpu_record(run: list[Entry]) -> None:
    proof = next(entry.record for entry in run if entry.record.identity.kind == "accuracy")
    page = render([Entry("x:1", replace(proof, hardware=Hardware("Example CPU")), ())])
    assert NO_RECORD in page and "## Example CPU, no GPU" in page and "| group_fork |" in page


def test_without_records_a_sentence_says_so() -> None:
    assert render([]) == f"# Benchmarks\n\n{NO_RECORD}\n"
    assert readme.summary([]) == NO_RECORD


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (123456.0, "123000"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_report_lies_beside_its_picture(run: list[Entry], tmp_path: Path, suffix: str) -> None:
    report.write(run, tmp_path / "new/report.md", suffix)
    picture = tmp_path / f"new/report-roofline{suffix}"
    assert f"![Roofline]({picture.name})" in (tmp_path / "new/report.md").read_text()
    if suffix == ".png":
        assert min(Image.open(picture).size) > 500
        return
    svg = picture.read_text()
    for text in ("norm_modulate", "gelu", "attention", "cudnn", "eager", "measured: 4000 GB/s", "datasheet: 5000 GB/s",
                 "bfloat16 measured: 700 TF/s", "Example GPU", "FLOP per byte"):  # fmt: skip
        assert text in svg
    assert "ema_lerp" not in svg  # invalid


def test_pictures_are_reproducible(run: list[Entry], tmp_path: Path) -> None:
    for name in ("a", "b"):
        report.write(run, tmp_path / name / "r.md")
    assert (tmp_path / "a/r-roofline.svg").read_bytes() == (tmp_path / "b/r-roofline.svg").read_bytes()


def test_one_panel_where_there_is_one_kind_of_op(run: list[Entry], tmp_path: Path) -> None:
    records = [entry.record for entry in run if not entry.reasons and entry.record.workload.op == "gelu"]
    roofline.draw(records, "x", tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    assert "GB/s" in svg and "FLOP per byte" not in svg


def test_without_times_there_is_no_picture(run: list[Entry], tmp_path: Path) -> None:
    proofs = [entry for entry in run if entry.record.identity.kind == "accuracy"]
    report.write(proofs, tmp_path / "r.md")
    assert [path.name for path in tmp_path.iterdir()] == ["r.md"]


def test_the_readme_table_is_put_between_its_marks(run: list[Entry], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nEnd.\n")
    readme.update(run, path)
    first = path.read_text()
    readme.update(run, path)
    assert path.read_text() == first
    assert first.startswith(f"# Title\n\n{readme.BEGIN}\n| op |") and first.endswith(f"\n{readme.END}\n\nEnd.\n")
    body = [line for line in first.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:2] for line in body] == [
        ["| norm_modulate", "14B 32760"],
        ["| gelu", "14B 32760"],
        ["| attention", "14B 32760"],
        ["| norm_modulate", "14B 32760 backward"],
    ]
    assert body[0].endswith("| compiled | 1.28 [1.26, 1.32] | 0.94 |") and "Example GPU" in first
    readme.update([], path)
    assert f"{readme.BEGIN}\n{NO_RECORD}\n{readme.END}" in path.read_text()


@pytest.mark.parametrize("text", ["no marks", readme.BEGIN, f"{readme.END} {readme.BEGIN}"])
def test_a_readme_without_marks_is_refused(run: list[Entry], tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(DataError, match="has no <!-- bench:begin -->"):
        readme.update(run, path)
    assert path.read_text() == text
    with pytest.raises(DataError, match="cannot be read"):
        readme.update(run, tmp_path / "none.md")
