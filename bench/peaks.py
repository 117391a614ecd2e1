"""What this machine does best at plain work, as cases: the roofs that kernels are held against, and launch costs.

    copy        device to device, bytes read plus bytes written
    bf16, fp8   8192 x 8192 x 8192 products on random data; zeros would draw less power and run faster
    l2 read     a quarter of L2, read again and again past L1
    launch      one tiny kernel, by torch and by Triton: warm is its place in a CUDA graph, ``host_us`` what it costs
                the host

:func:`measure` is the short form that every measuring process begins with: its peaks are of the same run as its
cases, and the clocks are up when those begin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.bench import cost, samplers, timing
from reelforge.bench.accuracy import step
from reelforge.bench.cases.case import Case, Draw, Operands, Work
from reelforge.bench.stamps import Nvml
from reelforge.bench.stamps import Sampler as ClockSampler

OP = "peak"
FP8 = torch.float8_e4m3fn
COPY_BYTES, PRODUCT = 4 << 30, 8192
_CPU_COPY_BYTES, _CPU_PRODUCT = 1 << 20, 64
_CHECKED_ROWS = 64
_BLOCK, _READS, _PROGRAMS_PER_SM = 4096, 64, 8


def roofs(device: torch.device) -> list[Case]:
    """Copy and products; in miniature on a CPU."""
    cuda = device.type == "cuda"
    cases = [_copy(COPY_BYTES if cuda else _CPU_COPY_BYTES)]
    size = PRODUCT if cuda else _CPU_PRODUCT
    cases.append(_product("bf16", size, torch.bfloat16))
    if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        cases.append(_product("fp8", size, FP8))
    return cases


def cases(device: torch.device) -> list[Case]:
    """All plain work."""
    found = [*roofs(device), Case(OP, "launch torch", _one, _add_one, _plus_one, Work(8.0))]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.append(Case(OP, "launch Triton", _one, _launch_tiny, _plus_one, Work(8.0)))
        programs = _PROGRAMS_PER_SM * properties.multi_processor_count
        found.append(_l2_read(properties.L2_cache_size // 4 // (4 * _BLOCK), programs))
    return found


def measure(device: torch.device, nvml: Nvml | str, seed: int = 0, rounds: int = 5) -> cost.Peak:
    """The machine's peak; a product that does not run in fp8 counts as bf16's."""
    reached: dict[str, float] = {}
    clocks = {}
    for case in roofs(device):
        operands = case.inputs(Draw(device, torch.Generator(device).manual_seed(seed)))
        with torch.no_grad(), ClockSampler(nvml) as watcher:
            arm = {case.label: samplers.sampler(step(case.run, operands, False), device, "warm", graph=False)}
            seconds = timing.interleave(arm, rounds, watcher.arm)[case.label].seconds.median
        clocks.update(watcher.stamps())
        reached[case.label] = (case.work.flops or case.work.bytes) / seconds
        del operands, arm
    if device.type == "cuda":
        torch.cuda.empty_cache()
    clock = clocks["bf16"].sm_clock_mhz
    flops = cost.tensor_core_rates(reached["bf16"], reached.get("fp8", reached["bf16"]))
    return cost.Peak(
        "measured",
        reached["copy"],
        flops,
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
        cost.PLAN.sm_clock_hz if clock is None else clock.med * 1e6,
    )


def _copy(size: int) -> Case:
    def inputs(draw: Draw) -> Operands:
        source = draw(size // 2)
        return source, torch.empty_like(source)

    def run(source: Tensor, target: Tensor) -> Tensor:
        return target.copy_(source)

    def exact(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        assert operands[0] is not None
        return outputs[0], operands[0]

    return Case(OP, "copy", inputs, run, run, Work(2.0 * size), tolerance=0.0, exact=exact)


def _product(label: str, size: int, dtype: torch.dtype) -> Case:
    def inputs(draw: Draw) -> Operands:
        a, b = draw(size, size), draw(size, size)
        return a.to(dtype), b.to(dtype), torch.ones((), device=draw.device)

    def plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return a @ b.t()

    def scaled(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    def exact(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        a, b, _ = operands
        assert a is not None and b is not None
        return outputs[0][:_CHECKED_ROWS], a[:_CHECKED_ROWS].double() @ b.t().double()

    run = scaled if dtype == FP8 else plain
    return Case(OP, label, inputs, run, plain, cost.gemm(size, size, size, dtype), tolerance=2e-2, exact=exact)


# -- L2 and launches ---------------------------------------------------------------------------------------------------


def _one(draw: Draw) -> Operands:
    return (draw(1, dtype=torch.float32),)


def _plus_one(x: Tensor) -> Tensor:
    return x + 1.0


def _add_one(x: Tensor) -> Tensor:
    return x.add_(1.0)


@triton.jit
def _tiny_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


def _launch_tiny(x: Tensor) -> Tensor:
    _tiny_kernel[(1,)](x)
    return x


@triton.jit
def _read_kernel(x_ptr, sums_ptr, blocks, READS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every program sums blocks that other programs read too, one launch's width apart."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(READS):
        block = (program + turn * programs) % blocks
        total += tl.load(x_ptr + block * BLOCK + column, cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


def _l2_read(blocks: int, programs: int) -> Case:
    def run(x: Tensor) -> Tensor:
        sums = x.new_empty(programs)
        _read_kernel[(programs,)](x, sums, blocks, READS=_READS, BLOCK=_BLOCK, num_warps=8)
        return sums

    def reference(x: Tensor) -> Tensor:
        program, turn = torch.arange(programs, device=x.device), torch.arange(_READS, device=x.device)
        read = (program[:, None] + turn * programs) % blocks
        return x.view(blocks, _BLOCK).sum(1)[read].sum(1)

    def inputs(draw: Draw) -> Operands:
        return (draw(blocks * _BLOCK, dtype=torch.float32, mean=0.1),)

    return Case(OP, "l2 read", inputs, run, reference, Work(4.0 * _BLOCK * _READS * programs), tolerance=1e-5)
