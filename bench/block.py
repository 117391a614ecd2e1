"""One Wan block at real sizes with random weights: eager, compiled, ours, in a CUDA graph, and where its time goes.

    eager      diffusers' structure in plain torch, attention left to torch
    compiled   the same compiled, cuDNN's attention forced
    ours       the engine's block, every op pinned to its kernel
    graph      ours, replayed

A block of ours takes and returns (x, h); the plain one has its first norm inside and leaves the last to the next
block, so both do the same work. Only x is compared. A setting of its own has the linears in e4m3: h then comes and
goes rounded, between neighbours that are rounded too.
"""

import argparse
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reelforge.bench import gaps, measure, samplers, tables, wan_cost
from reelforge.bench.arms import COMPILED, EAGER, FAILURES, Arm, compile_op
from reelforge.bench.cases import case as sizes
from reelforge.bench.cases.case import Case, Draw, Operands, Shape, Work
from reelforge.bench.plain_block import cudnn, plain_block, sdpa
from reelforge.bench.records import OURS, Record
from reelforge.bench.session import Session
from reelforge.engine.model.fp8_linear import Fp8Linear
from reelforge.engine.model.kv_cache import ChunkPass
from reelforge.engine.model.precision import Fp8Policy
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_block import Block, TokenSequence
from reelforge.kernels import dispatch
from reelforge.kernels.fp8 import dequantise, quantise

OP, GRAPH = "wan_block", f"{OURS}/graph"
CHUNK_FRAMES = 3
LATENT = (16, 60, 104)  # channels, height, width of 480 x 832
_SMALL_LATENT = (16, 4, 6)
_TOLERANCE, _FP8_TOLERANCE = 1e-2, 5e-2  # a dozen roundings to bf16 on the way; to e4m3, eight operands and weights
_LIBRARY_ATTENTION = "cudnn"


@dataclass(frozen=True)
class Setting:
    """A block at one length.

    Attributes:
        shape: the model's, at the query tokens.
        frames: latent frames of the forward.
        cached_frames: latent frames in the cache before it; None is bidirectional, without a cache.
        latent: channels, height, width.
        fp8: the default policy's linears in e4m3.
    """

    shape: Shape
    frames: int
    cached_frames: int | None
    latent: tuple[int, int, int]
    fp8: bool = False

    @property
    def kv_tokens(self) -> int:
        return self.shape.tokens * (self.frames + (self.cached_frames or 0)) // self.frames

    @property
    def label(self) -> str:
        lengths = f"{self.shape.name} {self.shape.tokens} x {self.kv_tokens}"
        return lengths + (" cached" if self.cached_frames else "") + (" fp8 linears" if self.fp8 else "")


def settings(*, small: bool = False) -> list[Setting]:
    """What to measure, the most telling first."""
    latent = _SMALL_LATENT if small else LATENT
    frame_tokens = latent[1] * latent[2] // 4
    lengths = [(CHUNK_FRAMES, 18), (21, None), (CHUNK_FRAMES, 0)]
    return [
        Setting(Shape(model, *sizes.MODELS[model], frames * frame_tokens), frames, cached, latent, fp8)
        for model in sizes.MODELS
        for fp8 in (False, True)
        for frames, cached in lengths
    ]


# -- the blocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """The engine's block and everything it is called with but (x, h)."""

    block: Block
    rest: tuple[Any, ...]

    def __call__(self, x: Tensor, *h: Tensor) -> Tensor:
        """h as one tensor, or as e4m3 and its scales."""
        return self.block(x, h[0] if len(h) == 1 else h, *self.rest)[0]

    @property
    def sequence(self) -> TokenSequence:
        return next(part for part in self.rest if isinstance(part, TokenSequence))

    def double(self) -> "Ours":
        """The same values in fp64."""
        return Ours(deepcopy(self.block).double(), tuple(_double(part) for part in self.rest))

    def rounded(self) -> "Ours":
        """The same with linears in e4m3, and a neighbour behind it that has them too."""
        twin, policy = deepcopy(self.block), Fp8Policy(spared=0)
        for name, module in self.block.named_modules():
            if isinstance(module, nn.Linear) and (sharing := policy.of(f"blocks.0.{name}", 1)):
                twin.set_submodule(name, Fp8Linear(module, sharing == "groups"))
        return Ours(twin, (*self.rest[:-1], twin.attn1.readers))


def _double(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.double()
    if isinstance(part, tuple):
        return tuple(_double(entry) for entry in part)
    if isinstance(part, TokenSequence):
        return replace(part, rotation=_double(part.rotation), chunk=_double(part.chunk))
    if isinstance(part, ChunkPass):
        cache = copy(part.cache)
        cache.keys, cache.values = cache.keys.double(), cache.values.double()
        return replace(part, cache=cache)
    return part


def build(setting: Setting, device: torch.device, dtype: torch.dtype) -> tuple[Ours, Operands]:
    """A one-layer model's block, as its forward calls it, and the (x, h) it is called with."""
    shape = setting.shape
    config = {
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.width // shape.heads,
        "ffn_dim": shape.ffn_dim,
        "num_layers": 1,
    }
    model = WanTransformer.from_config(config, device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    draw = Draw(device, generator)
    chunk = None if setting.cached_frames is None else _chunk(model, setting, draw)
    captured: list[tuple[Any, ...]] = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: captured.append(arguments))
    channels, height, width = setting.latent
    with torch.no_grad():
        text = model.text_context(draw(1, wan_cost.TEXT_TOKENS, model.config.text_dim, dtype=dtype))
        latents = draw(1, channels, setting.frames, height, width, dtype=dtype)
        model(latents, torch.full((1,), 500.0, device=device), text, chunk=chunk)
    x, h, *rest = captured[0]
    block = model.blocks[0]
    assert isinstance(block, Block), "a WanTransformer is made of blocks"
    block._forward_pre_hooks.clear()
    return Ours(block.requires_grad_(False), tuple(rest)), (x, h)


def _chunk(model: WanTransformer, setting: Setting, draw: Draw) -> ChunkPass:
    """A denoising pass over the next chunk behind ``cached_frames`` of random keys and values."""
    _, height, width = setting.latent
    frames, cached = setting.frames, setting.cached_frames or 0
    cache = model.new_cache(1, frames, cached + frames, height, width)
    for buffer in (cache.keys, cache.values):
        buffer.copy_(draw(*buffer.shape, dtype=buffer.dtype))
    for _ in range(cached // frames):
        cache.commit(cache.clean(frames, setting.shape.tokens))
    return cache.denoising(frames, setting.shape.tokens)


class Replayed:
    """An op as a CUDA graph over the tensors it was last called with."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        self._op = op
        self._addresses: tuple[int, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._held: tuple[Tensor, ...] = ()

    def __call__(self, *operands: Tensor) -> Tensor:
        addresses = tuple(tensor.data_ptr() for tensor in operands)
        if self._graph is None or addresses != self._addresses:
            self._graph, self._result = None, None
            self._addresses, self._held = addresses, operands
            self._graph = samplers.capture(self._launch)
        self._graph.replay()
        assert self._result is not None, "captured before it was replayed"
        return self._result

    def _launch(self) -> None:
        self._result = self._op(*self._held)


# -- the case ----------------------------------------------------------------------------------------------------------


def arms(ours: Ours, wide: Ours, device: torch.device) -> list[Arm]:
    """The ways to run a block, peers from the weights of ``wide``; without a GPU those that a CPU has."""
    block, rest = wide.block, wide.rest
    modulation, _, text, sequence = rest[:4]
    plain = plain_block(block, modulation, sequence.rotation, text, sequence.chunk, sdpa)
    found = [Arm(EAGER, EAGER, lambda x, *_: plain(x))]
    if device.type != "cuda":
        return [*found, Arm(OURS, "torch", ours, pins=pins("torch", "torch"))]
    peer = compile_op(plain_block(block, modulation, sequence.rotation, text, sequence.chunk, cudnn))
    fused = pins("triton", _LIBRARY_ATTENTION)
    return [
        Arm(OURS, "triton", ours, ours=True, pins=fused),
        Arm(GRAPH, "graph", Replayed(ours), pins=fused, graph=False),
        Arm(f"{OURS}/triton attention", "triton attention", ours, pins=pins("triton", "triton")),
        *found,
        Arm(COMPILED, COMPILED, lambda x, *_: peer(x)),
    ]


def pins(implementation: str, attention: str) -> tuple[tuple[str, str], ...]:
    """Every op that has ``implementation`` to it, attention and e4m3 products to libraries; others to the reference."""
    chosen = {
        op: implementation if implementation in names else dispatch.REFERENCE
        for op, names in dispatch.implementations().items()
    }
    product = "scaled_mm" if implementation == "triton" else dispatch.REFERENCE
    return tuple((chosen | {"attention": attention, "fp8_linear": product}).items())


def case(setting: Setting) -> Case:
    """The block's case; what builds its inputs is :func:`build`."""
    ops = wan_cost.block_ops(setting.shape, setting.kv_tokens, torch.bfloat16)
    total = Work(*(sum(getattr(op.work, part) for op in ops) for part in ("bytes", "flops", "exponentials")))

    def unbuilt(*_: object) -> Any:
        raise AssertionError("a block's operands come with its build")

    tolerance = _FP8_TOLERANCE if setting.fp8 else _TOLERANCE
    return Case(OP, setting.label, unbuilt, unbuilt, unbuilt, total, tolerance)


def events(
    session: Session, setting: Setting, affordable: Callable[[list[Arm]], list[Arm]] = list
) -> Iterator[dict[str, Any]]:
    """Records and notes of one setting, of the arms that ``affordable`` leaves."""
    plain = case(setting)
    session.announce(plain)
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    wide, operands = build(setting, session.device, dtype)
    ours, exact = wide, wide.double()
    if setting.fp8:
        x, h = operands
        assert h is not None, "a block is called with both"
        ours, operands = wide.rounded(), (x, *quantise(h))
    reference_arm = Arm(EAGER, EAGER, exact, pins=pins(dispatch.REFERENCE, dispatch.REFERENCE))

    def reference(x: Tensor, *h: Tensor) -> Tensor:
        with reference_arm.active(False):
            return exact(x, h[0] if len(h) == 1 else dequantise(*h))

    ready = replace(plain, inputs=lambda _: operands, reference=reference)
    found = [arm for arm in affordable(arms(ours, wide, session.device)) if session.wants(ready.name, arm.name)]
    records = []
    for record in measure.rates(session, ready, found):
        records.append(with_floor(record, session, setting))
        yield {"record": records[-1].table()}
    yield {"note": f"{tables.rates(ready, records)}\n  {predictions(setting)}"}
    graph = next((arm for arm in found if arm.name == GRAPH), None)
    timed = next((r.timing for r in records if r.identity.arm == GRAPH and r.timing and r.timing.l2 == "warm"), None)
    if graph is not None and timed is not None:
        yield _gap(graph, operands, ready.name, timed.median_us / 1e6)


def predictions(setting: Setting) -> str:
    """What the arithmetic model expected of an H200."""
    found = (
        f"{name} {1e3 * wan_cost.predicted_block(setting.shape, setting.kv_tokens, plan):.3g} ms"
        for name, plan in wan_cost.PLANS.items()
    )
    return "predicted for an H200: " + "; ".join(found)


def _gap(graph: Arm, operands: Operands, name: str, replay_s: float) -> dict[str, Any]:
    try:
        with graph.active(False):
            found = gaps.breakdown(lambda: graph.op(*operands), replay_s)
    except FAILURES as error:  # a machine without CUPTI
        return {"note": f"{name}: no profile, so its gaps are not known ({error})"}
    if found is None:
        return {"note": f"{name}: the profiler saw no kernels, so its gaps are not known"}
    return {"page": found.markdown(f"{name}, one replay of its CUDA graph")}


def with_floor(record: Record, session: Session, setting: Setting) -> Record:
    """The record held against the sum of its ops' floors: one op cannot hide behind another."""
    if record.timing is None or session.measured is None:
        return record
    best = session.datasheet or session.measured
    micro = {peak.name: 1e6 * wan_cost.block_floor(setting.shape, setting.kv_tokens, peak)
             for peak in (best, session.measured)}  # fmt: skip
    derived = replace(
        record.derived,
        floor_us=micro[best.name],
        bound="sum of its ops",
        pct_datasheet=100 * micro[best.name] / record.timing.median_us if session.datasheet else None,
        pct_measured_peak=100 * micro["measured"] / record.timing.median_us,
    )
    return replace(record, derived=derived)


def main(arguments: argparse.Namespace) -> int:
    """``reelforge bench block``."""
    from reelforge.bench import runner

    return runner.run_kind("block", arguments.out)
