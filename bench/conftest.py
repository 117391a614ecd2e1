"""Benchmarks print what they compare: ratios and rates beside the times."""

from pytest_benchmark.fixture import BenchmarkFixture


def pytest_benchmark_update_json(config: object, benchmarks: list[BenchmarkFixture], output_json: dict) -> None:
    """Keep ``extra_info`` in ``--benchmark-json`` records under stable, sorted keys."""
    for record in output_json["benchmarks"]:
        record["extra_info"] = dict(sorted(record["extra_info"].items()))


def pytest_terminal_summary(terminalreporter: object, config: object) -> None:
    """A table of ``extra_info`` behind pytest-benchmark's own."""
    session = config._benchmarksession  # type: ignore[attr-defined]
    for bench in session.benchmarks:
        facts = "  ".join(f"{name} {value}" for name, value in sorted(bench.extra_info.items()))
        terminalreporter.write_line(f"{bench.name:<64} {facts}")  # type: ignore[attr-defined]
