"""Choosing implementations: fitness, proof, pins, strictness, and the reasons that are given."""

import inspect
import sys
from collections.abc import Iterator

import parity
import pytest
import torch

from reelforge.engine.core import probe
from reelforge.kernels import attention, dispatch
from reelforge.kernels import norm_modulate as module
from reelforge.kernels.errors import KernelError

GPU = dispatch.Query("cuda", torch.bfloat16)
OP = "norm_modulate"
NAME = f"{OP}/triton"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Choices are remembered; these tests change what they depend on."""
    dispatch._choices.clear()
    yield
    dispatch._choices.clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "9.0")


def prove(monkeypatch: pytest.MonkeyPatch, table: dict[str, dict[str, str]]) -> None:
    monkeypatch.setattr(dispatch, "proven", lambda: table)


def test_an_unproven_kernel_is_not_chosen(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(monkeypatch, {})
    assert dispatch.choose(OP, GPU) == dispatch.REFERENCE
    (choice,) = [choice for choice in dispatch.explain("cuda") if choice.op == OP]
    assert str(choice) == "torch (not triton: unproven on compute capability 9.0)"


def test_a_proof_is_of_one_source_on_one_class(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch.source_hash(module)
    for table, chosen in (
        ({NAME: {"9.0": right}}, "triton"),
        ({NAME: {"9.0": "other"}}, "torch"),
        ({NAME: {"8.0": right}}, "torch"),
    ):
        dispatch._choices.clear()
        prove(monkeypatch, table)
        assert dispatch.choose(OP, GPU) == chosen, table


def test_the_hash_covers_imported_kernels_and_nothing_but_code(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (module, sys.modules["reelforge.kernels.tiling"])
    read = inspect.getsource
    source = {kernel.__name__: read(kernel) for kernel in kernels}
    monkeypatch.setattr(inspect, "getsource", lambda kernel: source.get(kernel.__name__) or read(kernel))
    before = dispatch.source_hash(module)
    reworded = source[module.__name__].replace("LayerNorm followed", "A LayerNorm followed", 1)
    assert reworded != source[module.__name__]
    source[module.__name__] = "# a comment\n\n" + reworded
    assert dispatch.source_hash(module) == before
    source["reelforge.kernels.tiling"] += "\n_ANOTHER = 1\n"
    assert dispatch.source_hash(module) != before


def test_a_pin_wins_over_proof_and_not_over_fitness(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(monkeypatch, {})
    with dispatch.pinned(OP, "triton"):
        assert dispatch.choose(OP, GPU) == "triton"
        with pytest.raises(KernelError, match=r"pinned to triton.*float64 is not one of"):
            dispatch.choose(OP, GPU._replace(dtype=torch.float64))
    with dispatch.pinned(OP, "torch"):
        assert dispatch.choose(OP, GPU) == "torch"
    assert dispatch.choose(OP, GPU) == "torch"


def test_pins_name_what_exists() -> None:
    with pytest.raises(KernelError, match="no op 'nrom_modulate'"):
        dispatch.pin("nrom_modulate", "triton")
    with pytest.raises(KernelError, match=r"no implementation 'cuda'. Choose of \['triton', 'torch'\]"):
        dispatch.pin(OP, "cuda")
    with pytest.raises(KernelError, match="no op"):
        probe.pin_kernels([("nonsense", "")])


def test_a_benchmark_measures_no_fallback(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(monkeypatch, {})
    with dispatch.strict():
        with pytest.raises(KernelError, match=f"{OP} would fall back to torch"):
            dispatch.choose(OP, GPU)
        with dispatch.pinned(OP, "torch"):
            assert dispatch.choose(OP, GPU) == "torch"
    assert dispatch.choose(OP, GPU) == "torch"


def test_a_library_that_is_missing_is_no_fallback(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(monkeypatch, {})
    monkeypatch.setattr(attention, "_package", lambda name: f"No module named {name!r}")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    with dispatch.strict():
        assert dispatch.choose("attention", GPU._replace(head_dim=128)) == "cudnn"


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_cold_call_compiles_as_one_graph(implementation: str) -> None:
    x, rows = parity.randn(0, 2, 6, 96), parity.randn(1, 2, 3, 96)
    compiled = torch.compile(
        lambda x, rows: 2 * module.norm_modulate(x, rows, rows, 1e-6), backend="aot_eager", fullgraph=True
    )
    with dispatch.pinned(OP, implementation):
        torch.testing.assert_close(compiled(x, rows), 2 * module.reference(x, rows, rows, 1e-6), rtol=0, atol=1e-5)


def test_every_op_is_listed_with_a_reason() -> None:
    dispatch.load()
    listed = {choice.op: choice for choice in dispatch.explain("cpu")}
    assert listed.keys() == dispatch.implementations().keys()
    for choice in listed.values():
        assert choice.name in dispatch.implementations()[choice.op]
        assert all(reason for _, reason in choice.passed_over)
