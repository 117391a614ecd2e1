"""Writes the example records of this folder again: `python tests/bench/data/generate.py`.

Nothing here was measured. The GPU is called "Example GPU", and every time is a formula.
"""

import json
from dataclasses import replace
from pathlib import Path

from reelforge.bench.records import (
    OURS,
    Derived,
    Hardware,
    Identity,
    Memory,
    Quality,
    Ratio,
    Record,
    Software,
    Span,
    Stamps,
    Timing,
    Workload,
)

HERE = Path(__file__).parent
GBPS, TFLOPS, SHEET_GBPS, SHEET_TFLOPS = 4000.0, 700.0, 5000.0, 1000.0
MODELS = {"1.3B": (1536, 12), "14B": (5120, 40)}


def example(
    op: str = "norm_modulate",
    model: str = "1.3B",
    tokens: int = 32760,
    arm: str = OURS,
    share: float = 0.85,
    *,
    backward: bool = False,
    l2: str = "cold",
    peers: dict[str, float] | None = None,
    day: int = 1,
) -> Record:
    """A record at ``share`` of the measured roof; ``peers`` maps arms to their share."""
    width, heads = MODELS[model]
    attention = op == "attention"
    size = 2.0 * tokens * width * (4 if attention else 3 if backward else 2)
    flops = 4.0 * tokens * tokens * width if attention else 0.0
    floor_us = max(size / GBPS / 1e3, flops / TFLOPS / 1e6)
    median = floor_us / share + 2.0
    label = f"{model} {tokens}"
    ratios = {peer: (floor_us / other + 2.0) / median for peer, other in (peers or {}).items()}
    return Record(
        Identity(
            case_id=f"{op} {label}" + (" backward" if backward else ""),
            arm=arm,
            kernel_impl="triton" if arm == OURS else arm,
            kernel_hash="0123456789abcdef" if arm == OURS else "",
            config_hash="example-settings",
            git_sha="0000000example",
            dirty=False,
            timestamp=f"2026-01-{day:02d}T00:00:00.000+00:00",
        ),
        Workload(
            op, label, backward, "bfloat16", 0, ("kernel",), size, flops,
            model=model, tokens=tokens, kv_tokens=tokens if attention else None, heads=heads, head_dim=128, dim=width,
            batch=1, dtype_acc="float32",
        ),
        Hardware("Example CPU", "Example GPU", "9.0", 132, "example", "100.0", 700.0, 140.0, True, False),
        Software("3.12.0", "2.11.0", "3.6.0", "13.0", "91900", env_flags={"cudnn_benchmark": "False"}),
        Quality(0.0021, 0.004, "pass", cosine=0.999998),
        Timing("event", 10, 7, 30, l2, median, *(median * f for f in (0.99, 1.02, 0.98, 1.0, 0.01)), host_us=20.0),
        Stamps(
            True, 21, Span(1900.0, 1950.0, 1980.0), Span(3201.0, 3201.0, 3201.0), Span(400.0, 520.0, 600.0),
            Span(41.0, 44.0, 46.0), 1.5, ("applications_clocks_setting",), 0.004,
        ),
        Derived(
            tflops=flops / median / 1e6 if attention else 0.0,
            gbps=size / median / 1e3,
            pct_datasheet=100 * max(size / SHEET_GBPS / 1e3, flops / SHEET_TFLOPS / 1e6) / median,
            pct_measured_peak=100 * floor_us / median,
            bound="tensor cores" if attention else "bytes",
            floor_us=floor_us,
            ratio_vs={peer: Ratio(ratio, ratio * 0.98, ratio * 1.03) for peer, ratio in ratios.items()},
            peak_gbps=GBPS,
            peak_tflops=TFLOPS,
            datasheet_gbps=SHEET_GBPS,
            datasheet_tflops=SHEET_TFLOPS,
        ),
        Memory(peak_alloc_mb=2000.0, workspace_mb=0.0),
    )  # fmt: skip


def slower(record: Record, factor: float) -> Record:
    timing = record.timing
    times = {name: getattr(timing, name) * factor for name in ("median_us", "p20", "p80", "min", "mean", "stdev")}
    return replace(record, timing=replace(timing, **times))


def arms(op: str, model: str, tokens: int, shares: dict[str, float], **kinds) -> list[Record]:
    """One record an arm, all in one case."""
    peers = {arm: share for arm, share in shares.items() if arm != OURS}
    return [
        example(op, model, tokens, arm, share, peers=peers if arm == OURS else None, **kinds)
        for arm, share in shares.items()
    ]


def run() -> list[Record]:
    """A whole run: three ops, several shapes, peers, a lost shape, and three records that must not count."""
    records = []
    for model, gain in (("1.3B", 0.0), ("14B", 0.04)):
        for tokens, ours, compiled in ((32760, 0.86, 0.70), (4680, 0.80, 0.66), (1560, 0.55, 0.60)):
            shares = {OURS: ours + gain, "compiled": compiled, "eager": 0.3}
            records += arms("norm_modulate", model, tokens, shares)
            records += arms("gelu", model, tokens, {**shares, OURS: ours + gain + 0.02})
            records += arms("attention", model, tokens, {OURS: 0.72 + gain, "cudnn": 0.78, "sdpa": 0.6})
        records += arms("norm_modulate", model, 32760, {OURS: 0.75, "compiled": 0.5}, backward=True)
    records += arms("norm_modulate", "1.3B", 4680, {OURS: 0.95, "compiled": 0.8}, l2="warm")
    first = records[0]
    throttled = replace(first.stamps, valid=False, throttle_reasons=("gpu_idle", "sw_power_cap"))
    records.append(replace(example("ema_lerp"), stamps=throttled))
    records.append(replace(example("sde_step"), quality=Quality(0.02, 0.004, "fail")))
    records.append(replace(example("sde_step", arm="eager"), stamps=None))
    proof = example("group_fork")
    records.append(replace(proof, identity=replace(proof.identity, kind="accuracy"), timing=None, stamps=None))
    return records


def comparison_files() -> dict[str, list[Record]]:
    """Baselines of two cases, and one file of new records for each status."""
    cases = [example(), example(tokens=4680)]
    base = [slower(replace(case, identity=replace(case.identity, timestamp=f"2026-01-{day:02d}")), factor)
            for day, factor in enumerate((1.03, 0.98, 1.0, 1.01, 0.99), start=1) for case in cases]  # fmt: skip
    first, second = cases
    throttled = replace(second.stamps, valid=False, throttle_reasons=("hw_thermal_slowdown",))
    return {
        "base": base,
        "new_pass": [slower(first, 1.02), second],
        "new_regression": [slower(first, 1.2), second],
        "new_calibration_needed": [first, second, example("gelu")],
        "new_recipe_mismatch": [replace(first, software=replace(first.software, torch="2.12.0")), second],
        "new_infra_error": [first, replace(second, stamps=throttled)],
    }


def main() -> None:
    for name, records in {"run": run(), **comparison_files()}.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(record.table()) + "\n" for record in records))


if __name__ == "__main__":
    main()
