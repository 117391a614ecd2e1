"""Which linears run in e4m3, and a copy of a transformer in which they do.

The copy shares every other parameter with its original, which stays as it is: masters for training, for a LoRA merge
and for the checkpoint. After either changed, :func:`requantise` brings the copy up to date; adapters are merged in
fp32 before they are rounded. The copy is for forwards that no gradient takes: a rollout's deterministic steps, a
teacher, a served model.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.fp8_linear import Fp8Linear
from reelforge.engine.model.wan import WanTransformer

Sharing = Literal["rows", "groups"]


@dataclass(frozen=True)
class Fp8Policy:
    """Ends of the names of linears within a block, by how they share scales; what no list names stays as it is.

    Attributes:
        rows: inputs that a norm made even.
        groups: inputs with heavy tails.
        spared: blocks at each end of the model that stay as they are.
    """

    rows: tuple[str, ...] = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj")
    groups: tuple[str, ...] = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
    spared: int = 1

    def of(self, name: str, num_layers: int) -> Sharing | None:
        """How linear ``name`` of a model is quantised, if it is."""
        first, _, rest = name.partition(".")
        block, _, linear = rest.partition(".")
        if first != "blocks" or not self.spared <= int(block) < num_layers - self.spared:
            return None
        return "rows" if linear in self.rows else "groups" if linear in self.groups else None

    def table(self, model: WanTransformer) -> list[tuple[str, Sharing | None]]:
        """Every linear of the model by name."""
        layers = len(model.blocks)
        return [
            (name, self.of(name, layers)) for name, module in model.named_modules() if isinstance(module, nn.Linear)
        ]


def fp8_copy(model: WanTransformer, policy: Fp8Policy) -> WanTransformer:
    """The model with the policy's linears in e4m3, sharing all else.

    Raises:
        ConfigError: the policy leaves no linear.
        KernelError: a linear's size that e4m3 does not take.
    """
    if not any(sharing for _, sharing in policy.table(model)):
        raise ConfigError(
            f"fp8 would quantise nothing: the model has {len(model.blocks)} blocks, and {policy.spared} at each end "
            "stay as they are.",
            'Set the precision to "bf16".',
        )
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for name, sharing in policy.table(model):
        if sharing is not None:
            source = model.get_submodule(name)
            assert isinstance(source, nn.Linear), "the table names linears"
            twin.set_submodule(name, Fp8Linear(source, sharing == "groups"))
    return twin


def requantise(twin: WanTransformer) -> None:
    """Bring the copy up to date with the model it was made of; a model that is no copy has nothing to do."""
    for linear in fp8_linears(twin):
        linear.requantise()


def fp8_linears(model: nn.Module) -> Iterator[Fp8Linear]:
    return (module for module in model.modules() if isinstance(module, Fp8Linear))
