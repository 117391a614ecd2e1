"""``reelforge bench rl-cost``: the arithmetic of an RLHF iteration as tables, for both models at 480 x 832 x 81."""

from collections.abc import Iterator

from reelforge.bench import rl_cost, wan_cost
from reelforge.bench.rl_cost import Layout, Memory
from reelforge.bench.tables import lines
from reelforge.engine.model.lora import LoraConfig

CLIP = (81, 480, 832)  # frames, height, width
DENSE_SHARE = 0.6  # of the steps that Flow-GRPO and DanceGRPO train
_RANKS = ((8, 6), (24, 2))  # processes and groups of each
_GROUPS, _CHOICES = (4, 8, 12, 24), (6, 10, 20)


def arms(layout: Layout) -> dict[str, Layout]:
    """The ways to spend the same samples, the dearest first."""
    group, steps, choices = layout.group_size, layout.num_steps, layout.choices
    return {
        f"every step stochastic, {DENSE_SHARE:g} trained": Layout(
            group, steps, choices, group, False, round(DENSE_SHARE * steps)
        ),
        "Flash-GRPO as coded": rl_cost.independent(layout),
        "shared prefix": Layout(group, steps, choices, 1, False),
        "shared prefix, collapsed training": Layout(group, steps, choices),
    }


def text(layout: Layout, prompts: int, tflops: float) -> str:
    """All tables.

    Args:
        layout: of a group.
        prompts: groups an iteration.
        tflops: of a GPU, sustained.
    """
    parts = [part for model in wan_cost.LAYERS for part in _model(model, layout, prompts, tflops)]
    return "\n".join([*parts, *_savings(layout.num_steps), *_ranks(layout)]).rstrip()


def _model(model: str, layout: Layout, prompts: int, tflops: float) -> Iterator[str]:
    size, layers = rl_cost.shape(model, *CLIP), wan_cost.LAYERS[model]
    forward, calls = rl_cost.forward_flops(size, layers), rl_cost.units()
    share = rl_cost.attention_share(size, layers)
    frames, height, width = CLIP
    yield (
        f"{model} at {height} x {width} x {frames}: {size.tokens} tokens, {forward / 1e15:.3g} PFLOP a forward,"
        f" {share:.0%} of them self-attention"
    )
    yield (
        f"{prompts} prompts x {layout.group_size} samples, {layout.num_steps} steps under guidance, one of the first"
        f" {layout.choices} stochastic; {tflops:g} TFLOP/s"
    )
    head = ("", "forwards a group", "of them training", "PFLOP an iteration", "GPU-hours", "Flash-GRPO over it")
    flash = rl_cost.independent(layout).mean(calls)
    rows = []
    for name, arm in arms(layout).items():
        total, trained = arm.mean(calls), arm.training(calls)
        work = prompts * total * forward
        hours = work / (tflops * 1e12) / 3600
        cells = (f"{total:.0f}", f"{trained:.0f}", f"{work / 1e15:.0f}", f"{hours:.3g}", f"{flash / total:.2f}")
        rows.append((name, *cells))
    yield from (*lines(head, rows), "", *_memory(model, layout.group_size), "")


def _memory(model: str, group: int) -> Iterator[str]:
    """Of one training forward and backward under guidance, in GB."""
    size, layers = rl_cost.shape(model, *CLIP), wan_cost.LAYERS[model]
    head = ("GB of a training step", "weights", "learnt", "block inputs", "one block", "sum")
    rows = []
    for kind, lora in (("LoRA, rank 32, bf16", LoraConfig()), ("all weights, fp32", None)):
        for name, states in (("collapsed", 1), (f"{group} samples at once", group)):
            found = rl_cost.memory(size, layers, 2 * states, lora)
            rows.append((f"{kind}, {name}", *(f"{value / 1e9:.3g}" for value in _columns(found))))
    yield from lines(head, rows)


def _columns(found: Memory) -> tuple[float, ...]:
    return found.weights, found.learnt, found.boundaries, found.block, found.total


def _savings(num_steps: int) -> Iterator[str]:
    head = (f"rollout saved by sharing, T = {num_steps}", *(f"K = {choices}" for choices in _CHOICES))
    kept = [choices for choices in _CHOICES if choices <= num_steps]
    rows = [
        (f"G = {group}", *(f"{rl_cost.saving(Layout(group, num_steps, choices)):.1%}" for choices in kept))
        for group in _GROUPS
    ]
    yield from (*lines(head[: len(kept) + 1], rows), "")


def _ranks(layout: Layout) -> Iterator[str]:
    costs = [layout.evaluations(k) for k in range(layout.choices)]
    yield (
        f"ranks: a group takes {costs[-1]} to {costs[0]} evaluations, {costs[0] / costs[-1]:.1f}x; a pair with steps k"
        f" and {layout.choices - 1} - k always {costs[0] + costs[-1]}"
    )
    rows = [
        (f"{ranks} ranks x {groups} groups", *(f"{rl_cost.slowest(layout, ranks, groups, paired):.2f}" for paired in
                                               (False, True)))
        for ranks, groups in _RANKS
    ]  # fmt: skip
    yield from lines(("busiest rank over the mean", "steps drawn alone", "mirrored pairs"), rows)
