"""A measuring process's surroundings, and the records it makes of what it finds there."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reelforge.bench import cost, machine, peaks, stamps, timing
from reelforge.bench.arms import Arm
from reelforge.bench.cases import case as sizes
from reelforge.bench.cases.case import Case, Draw, Operands
from reelforge.bench.records import Hardware, Record, Software, Verdict, Workload

Kind = Literal["rate", "accuracy"]
WHOLE = "case"  # the arm of what belongs to no arm: inputs, the exact result, interleaved times
_LABEL = re.compile(r"(?P<model>[\d.]+B) (?P<tokens>\d+)(?:\s?x\s?(?P<kv_tokens>\d+))?")


@dataclass(frozen=True)
class Session:
    """The machine that cases run on, and how.

    Attributes:
        device: where.
        nvml: its clocks, or why there are none.
        hardware, software: facts for the records.
        measured: peaks of this process; None where nothing is rated.
        datasheet: the vendor's, where this GPU's are known.
        begin: is told what comes next, as the record to write should this process die of it.
        wants: whether to run an arm of a case.
        rounds: of interleaved timing.
        seed: of the inputs.
        draw: makes the inputs.
    """

    device: torch.device
    nvml: stamps.Nvml | str
    hardware: Hardware
    software: Software
    measured: cost.Peak | None = None
    datasheet: cost.Peak | None = None
    begin: Callable[[Record], None] = lambda record: None
    wants: Callable[[str, str], bool] = lambda case, arm: True
    rounds: int = timing.ROUNDS
    seed: int = 0
    draw: type[Draw] = Draw

    @classmethod
    def open(cls, device: torch.device, *, rated: bool = True, **options: Any) -> "Session":
        """Find out about the machine and, where times will be ``rated``, measure its peaks."""
        nvml = stamps.connect()
        known = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
        return cls(
            device,
            nvml,
            machine.hardware(nvml),
            machine.software(),
            peaks.measure(device, nvml) if rated else None,
            cost.H200 if known else None,
            **options,
        )

    def operands(self, case: Case) -> Operands:
        """The case's inputs, the same at every call; they want gradients where there is a backward pass."""
        made = case.inputs(self.draw(self.device, torch.Generator(self.device).manual_seed(self.seed)))
        if case.backward:
            return made
        return tuple(None if tensor is None else tensor.detach() for tensor in made)

    def record(self, case: Case, operands: Operands, arm: Arm, kind: Kind, **groups: Any) -> Record:
        """A record of an arm; ``groups`` are the record's own."""
        settings = {"rounds": self.rounds, "seed": self.seed}
        identity = machine.identity(case.name, arm.name, case.op, arm.impl, settings, kind)
        about = workload(case, operands, self.seed)
        return Record(identity, about, self.hardware, self.software, **groups)

    def announce(self, case: Case, operands: Operands = (), arm: Arm | None = None, kind: Kind = "rate") -> None:
        """Say what comes next, as the record to write should this process die of it."""
        verdict = Verdict(status="did not finish")
        self.begin(self.record(case, operands, arm or WHOLE_CASE, kind, verdict=verdict))


def _no_op(*_: object) -> tuple[()]:
    return ()


WHOLE_CASE = Arm(WHOLE, WHOLE, _no_op)


def workload(case: Case, operands: Operands, seed: int) -> Workload:
    """What the case computes; model and tokens are read off its label."""
    first = next((tensor for tensor in operands if tensor is not None), None)
    named = _LABEL.search(case.label)
    facts = {} if named is None else named.groupdict()
    dim, heads, _ = sizes.MODELS.get(facts.get("model") or "", (None, None, None))
    return Workload(
        op=case.op,
        label=case.label,
        backward=case.backward,
        dtype_in="unknown" if first is None else str(first.dtype).removeprefix("torch."),
        seed=seed,
        inside_timer=("forward", "backward") if case.backward else ("forward",),
        bytes=case.work.bytes,
        flops=case.work.flops,
        model=facts.get("model"),
        tokens=int(facts["tokens"]) if facts.get("tokens") else None,
        kv_tokens=int(facts["kv_tokens"]) if facts.get("kv_tokens") else None,
        heads=heads,
        dim=dim,
    )
