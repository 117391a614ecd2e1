"""What a distillation holds in memory, and its FLOPs: its own code, run on tensors that have shapes but no storage.

Weights, gradients, Adam's moments and averages are sums over parameters. The rest is what a :class:`Ledger` sees while
one chunk is rolled out and replayed behind a full cache, the teacher looks at a clip and the critic learns from one,
at full size and on the kernels that the device would choose; attention stands as torch's flash attention, which keeps
what the other libraries keep. Left out: the allocator's fragments, libraries' workspaces and the CUDA context.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelforge.engine.distill.self_forcing import Rollout, replay, roll_out
from reelforge.engine.distill.trainer import DmdTask
from reelforge.engine.flow.sampler import guided
from reelforge.engine.model.generation import ChunkDecoder, Guidance, half_precision
from reelforge.engine.model.layout import Layout, bidirectional
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig
from reelforge.engine.model.weights import storage_dtype
from reelforge.engine.train.loop import LoopConfig
from reelforge.engine.train.state import OptimizerConfig
from reelforge.kernels import dispatch

Parts = dict[str, tuple[int, str]]  # bytes and dtype by component


class Ledger(TorchDispatchMode):
    """Counts the storages of tensors that are made inside, each until it is freed.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._sizes:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address: int) -> None:
        self.now -= self._sizes.pop(address)

    def cost(self, call: Callable[[], Any]) -> tuple[Any, int, int]:
        """The result of ``call``, the bytes that it keeps alive, and those in use at its worst."""
        before = self.peak = self.now
        result = call()
        return result, self.now - before, self.peak - before


@contextmanager
def simulated(device: str) -> Iterator[Ledger]:
    """Inside, tensors have no storage, and ops take the path that they would take on ``device``."""
    dispatch.load()
    fused = {choice.op for choice in dispatch.explain(device) if choice.name == "triton"} - {"attention"}
    with ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True  # so that a kernel's shapes can be asked of CPU tensors; nothing runs
        for op in dispatch.implementations():
            other = "sdpa" if op == "attention" else dispatch.REFERENCE
            stack.enter_context(dispatch.pinned(op, "triton" if op in fused else other))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Ledger())


def network(config: WanConfig, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None) -> WanTransformer:
    """A model as it is loaded, inside :func:`simulated`; under an adapter ``dtype`` is that of the frozen weights."""
    with unset_fake_temporarily():  # an adapter's matrices cannot be made from fake tensors
        model = WanTransformer.from_config(config.to_dict(), device="meta")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(storage_dtype(name, dtype))
        if lora:
            inject(model, lora, seed=0)
    empty = {name: torch.empty_like(parameter, device="cpu") for name, parameter in model.named_parameters()}
    model.load_state_dict(empty, assign=True)
    model.rope((0,), 1, 1, torch.device("cpu"), torch.float32)  # makes its tables, which stay
    return model


@dataclass(frozen=True)
class Forecast:
    """A phase's price on one rank.

    Attributes:
        always: components that live throughout.
        moments: further components, by what happens while they live.
        flops: of one optimizer step, under distribution matching of one cycle, over all ranks: multiply and add
            counted apart, the blocks alone, what checkpointing recomputes not counted.
    """

    always: Parts
    moments: dict[str, Parts]
    flops: dict[str, float]

    def total(self, moment: str) -> int:
        """Bytes in use."""
        return sum(size for size, _ in (self.always | self.moments[moment]).values())

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(map(self.total, self.moments))

    def lines(self, memory: float) -> list[str]:
        """A table for a person to read; ``memory`` is the GPU's in bytes."""
        parts = {name: part for live in (self.always, *self.moments.values()) for name, part in live.items()}
        unit, word = (2**30, "GiB") if self.peak >= 2**30 else (2**20, "MiB")
        rows = [("", "dtype", *self.moments)]
        for name, (size, kind) in parts.items():
            alive = (name in self.always or name in live for live in self.moments.values())
            rows.append((name, kind, *(f"{size / unit:.2f}" if here else "-" for here in alive)))
        rows.append((f"sum, {word}", "", *(f"{self.total(moment) / unit:.2f}" for moment in self.moments)))
        spare = (memory - self.peak) / 2**30
        verdict = f"fits, {spare:.1f} GiB to spare" if spare >= 0 else f"does NOT fit, {-spare:.1f} GiB too many"
        work = ", ".join(f"{name} {flops / 1e15:.4g}" for name, flops in self.flops.items())
        return [
            *(f"{name:<34}{kind:<10}" + "".join(f"{cell:>15}" for cell in cells) for name, kind, *cells in rows),
            f"peak {self.peak / 2**30:.1f} of {memory / 2**30:.1f} GiB on one rank: {verdict}",
            f"PFLOP: {work}; {sum(self.flops.values()) / 1e15:.4g} in all",
        ]


def price_dmd(ledger: Ledger, task: DmdTask, student: OptimizerConfig, critic: OptimizerConfig) -> Forecast:
    """Distribution matching, bidirectional or by self-forcing.

    Args:
        ledger: of :func:`simulated`.
        task: made inside; its text is that of one micro-batch, the negative prompt last.
        student, critic: their optimizers.
    """
    model, train, text = task.student.model, task.train, task.text[:-1]
    x, teacher = torch.empty(len(text), *task.student.shape), task.teacher or task.critic
    always = _learnt("student", model, student) | _learnt("critic", task.critic, critic)
    if task.teacher is not None:
        always["teacher: weights"] = _weights(teacher)
    always["latents, noise, text"] = (6 * x.nbytes + 2 * text.nbytes, "float32")

    def score(judge: WanTransformer, scale: float) -> Tensor:
        with torch.no_grad(), _half(judge, train):
            return guided(judge, text, text, scale)(x, torch.empty(len(x)))

    def again() -> Tensor:
        return replay(model, rolled, rolled.exits[-1], text, task.student.grid)

    (rolled, context), _, peak = ledger.cost(lambda: _last_chunk(task, text))
    kind, rest = _name(rolled.cache.keys), peak - context - rolled.cache.num_bytes
    scales = ((teacher, task.config.teacher_guidance), (task.critic, 1.0))
    scored = max(ledger.cost(partial(score, *judge))[2] for judge in scales)
    replayed = _trained(ledger, "replayed chunk", model, train, again)
    if not model.gradient_checkpointing:
        past = rolled.cache.upto(rolled.exits[-1].chunks_before).committed_tokens
        copies, (kept, mixed) = 2 * rolled.cache.keys[:, :, :past].nbytes, replayed["replayed chunk activations"]
        replayed |= {"replayed chunk activations": (kept - copies, mixed), "copies of its past": (copies, kind)}
    learning = _trained(ledger, "critic's", task.critic, train, lambda: task.critic(x, torch.empty(len(x)), text))
    cache: Parts = {"KV cache": (rolled.cache.num_bytes, kind)}
    moments = {
        "rollout": cache | {"text's keys and values": (context, kind), "rollout's working set": (rest, "mixed")},
        "teacher": cache | {"scores' working set": (scored, "mixed")},
        "replay": cache | replayed,
        "critic": learning | (cache if task.rollout.segments > 1 else {}),  # the video goes on
    }
    return Forecast(always, moments, {name: train.batch_size * flops for name, flops in _dmd_flops(task).items()})


def price_init(
    ledger: Ledger, student: WanTransformer, teacher: WanTransformer | None, shape: tuple[int, ...], layout: Layout,
    optimizer: OptimizerConfig, train: LoopConfig, text: Tensor,
) -> Forecast:  # fmt: skip
    """The causal initialisation's training; targets of consistency take less than the student's step after them.

    Args:
        ledger: of :func:`simulated`.
        student, teacher: made inside; the teacher of consistency, guided.
        shape: of a clip's latents, ``[C,T,H,W]``.
        layout: of the student's tokens.
        optimizer, train: of the phase.
        text: of one micro-batch, ``[B,S,E]``.
    """
    x = torch.empty(len(text), shape[0], len(layout.frame_index), *shape[2:])
    always = _learnt("student", student, optimizer)
    always["latents, noise, text"] = (8 * x.nbytes + 2 * text.nbytes, "float32")
    flops = {"student": 3 * _clip_flops(student, layout, x, text)}
    if teacher is not None:
        always["teacher: weights"] = _weights(teacher)
        flops |= {"teacher": 2 * _clip_flops(teacher, layout, x, text), "average": flops["student"] / 3}
    timestep = torch.empty(len(x), x.shape[2])
    step = _trained(ledger, "student's", student, train, lambda: student(x, timestep, text, layout=layout))
    return Forecast(always, {"step": step}, {name: train.batch_size * each for name, each in flops.items()})


def forward_flops(config: WanConfig, tokens: int, scores: int, text_tokens: int, text_cached: bool = False) -> float:
    """FLOPs of all blocks in one forward of one row.

    A block of width E and FFN width F: linears L E (12 E + 4 F), self-attention 4 E a score, cross-attention 4 L S E,
    and 4 S E^2 for the text's keys and values unless they are cached.

    Args:
        config: of the network.
        tokens: L.
        scores: visible pairs of query and key.
        text_tokens: S.
        text_cached: as in a rollout.
    """
    width = config.width
    linears = tokens * (12 * width + 4 * config.ffn_dim) + (0 if text_cached else 4 * text_tokens * width)
    return float(config.num_layers * width * (linears + 4 * scores + 4 * tokens * text_tokens))


def _clip_flops(model: WanTransformer, layout: Layout, x: Tensor, text: Tensor) -> float:
    """Of a clip under a layout."""
    frame, parts = model.tokens_per_frame(*x.shape[-2:]), layout.rectangles
    pairs = sum(
        (q[1] - q[0]) * (stop - start) for q, keys in ((p.queries, p.keys) for p in parts) for start, stop in keys
    )
    return forward_flops(model.config, len(layout.frame_index) * frame, pairs * frame**2, text.shape[1])


def _dmd_flops(task: DmdTask) -> dict[str, float]:
    """Of a cycle on one video, the mean over segments and exit steps."""
    student, segments, critic_steps = task.student, task.rollout.segments, task.config.critic_steps
    frame, steps = student.model.tokens_per_frame(*student.shape[2:]), student.grid.num_steps
    x, teacher = torch.empty(student.shape), task.teacher or task.critic
    evaluations = steps if task.rollout.exit_policy == "last" else (steps + 1) / 2
    frames, end, rolled, replayed = sum(student.pattern), 0, 0.0, 0.0
    clean = task.rollout.context.kind == "clean"
    for size in student.pattern * segments:
        start, end = end, end + size
        work = (student.model.config, size * frame, size * end * frame**2, task.text.shape[1])
        rolled += (
            (evaluations + (clean and end < frames * segments)) * forward_flops(*work, text_cached=True) / segments
        )
        replayed += 3 * forward_flops(*work) * (start % frames >= frames - student.shape[1]) / segments
    judged, taught = (_clip_flops(m, bidirectional(student.shape[1]), x, task.text) for m in (task.critic, teacher))
    return {
        "rollout": (critic_steps + 1) * rolled,
        "teacher": (1 + (task.config.teacher_guidance != 1)) * taught,
        "replay": replayed,
        "critic": (1 + 3 * critic_steps) * judged,
    }


def _last_chunk(task: DmdTask, text: Tensor) -> tuple[Rollout, int]:
    """The last chunk of the longest rollout; and the bytes of the text's keys and values."""
    student, (*past, last) = task.student, task.student.pattern * task.rollout.segments
    size = student.shape[2:]
    with _half(student.model, task.train):
        guidance = Guidance(text, text[:0], 1.0)
        decoder = ChunkDecoder(student.model, guidance, max(student.pattern), sum(past) + last, size)
        for frames in past:
            decoder.cache.commit(decoder.cache.clean(frames, frames * decoder.tokens_per_frame))
        noise = torch.empty(len(text), student.shape[0], last, *size)
        rolled = roll_out(decoder, noise, student.grid, lambda _: noise, (last,), (0,), goes_on=True)
    return rolled, sum(tensor.nbytes for pair in decoder.text.blocks for tensor in pair)


def _trained(
    ledger: Ledger, what: str, model: WanTransformer, train: LoopConfig, forward: Callable[[], Tensor]
) -> Parts:
    """A forward and backward, with gradients there from an earlier one."""
    for parameter in _trainable(model):
        parameter.grad = torch.empty_like(parameter)

    def loss() -> Tensor:
        with _half(model, train):
            return forward().float().square().mean()

    total, kept, peak = ledger.cost(loss)
    rest = max(peak - kept, ledger.cost(total.backward)[2])
    return {f"{what} activations": (kept, "mixed"), f"{what} working set": (rest, "mixed")}


def _trainable(model: WanTransformer) -> list[Tensor]:
    return [parameter for _, parameter in lora_parameters(model)] or list(model.parameters())


def _weights(model: WanTransformer) -> tuple[int, str]:
    return sum(parameter.nbytes for parameter in model.parameters()), _name(model.proj_out.weight)


def _learnt(who: str, model: WanTransformer, optimizer: OptimizerConfig) -> Parts:
    size = sum(parameter.nbytes for parameter in _trainable(model))
    sizes = {"gradients": size, "Adam's moments": 2 * size} | ({"average": size} if optimizer.ema_decay else {})
    return {f"{who}: weights": _weights(model)} | {f"{who}: {name}": (n, "float32") for name, n in sizes.items()}


def _half(model: WanTransformer, train: LoopConfig) -> AbstractContextManager[object]:
    weight = model.proj_out.weight
    return half_precision(weight.device, train.precision == "bf16" and weight.dtype == torch.float32)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
