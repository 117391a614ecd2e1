"""The network under training, as the two paths that a rollout takes through it.

``train`` is the path that gradients take: the rollout's stochastic step runs through the very same call (same batch
rows, autocast, adapters, attention kernel), so that on policy v_theta - v_old is exactly 0. ``sample`` is for the
deterministic steps around it, which no ratio sees: it may run in lower precision, against text projected once.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.flow.sampler import guided
from reelforge.engine.model.generation import half_precision
from reelforge.engine.model.lora import adapted_linears, adapters_off
from reelforge.engine.model.precision import Fp8Policy, fp8_copy, requantise
from reelforge.engine.model.wan import TextContext, WanTransformer
from reelforge.kernels import dispatch
from reelforge.kernels.sde_step import guide

Precision = Literal["fp32", "bf16"]
SamplePrecision = Literal[Precision, "fp8"]


@dataclass(frozen=True)
class PathConfig:
    """What both paths share, and where the rollout may differ.

    Attributes:
        guidance_scale: of classifier-free guidance, in the rollout and in training; 1 trains a model that needs none.
        gradient_through_uncond: let gradients take the unconditional branch too.
        sample_precision: of the deterministic steps; ``fp8`` quantises a copy of the network once a batch of groups.
    """

    guidance_scale: float = 1.0
    gradient_through_uncond: bool = True
    sample_precision: SamplePrecision = "bf16"


@dataclass(frozen=True)
class TrainingPath:
    """What decides the bits of a training forward besides weights and inputs.

    Attributes:
        rows: of the batch, both branches of guidance counted.
        dtype: of the weights.
        autocast: its dtype, None without.
        adapters: linears with an adapter that is applied beside the weight.
        training: the module's mode.
        kernels: implementations that are forced, (op, name).
    """

    rows: int
    dtype: torch.dtype
    autocast: torch.dtype | None
    adapters: int
    training: bool
    kernels: tuple[tuple[str, str], ...]


class Policy:
    """A transformer with its prompts.

    Args:
        model: trained in place.
        text: ``[N + 1, S, E]``, padded, one row a prompt, the negative prompt last; stays where it is (a thousand
            prompts of Wan's are 4 GB), an iteration's rows are uploaded by :meth:`prepare`.
        config: guidance and precision.
        precision: of the training path.
        reference: frozen copy that a KL term compares with; None when adapters are switched off instead.
    """

    def __init__(
        self,
        model: WanTransformer,
        text: Tensor,
        config: PathConfig,
        precision: Precision,
        reference: WanTransformer | None = None,
    ) -> None:
        self.model, self.text = model, text
        self.config, self.precision, self.frozen = config, precision, reference
        self.device = model.proj_out.weight.device
        self._sampled = fp8_copy(model, Fp8Policy()) if config.sample_precision == "fp8" else model
        self._rows: dict[int, int] = {}  # prompt to its row among the iteration's; the negative prompt is row 0
        self._embeddings: Tensor | None = None
        self._contexts: TextContext | None = None

    @property
    def branches(self) -> int:
        """Network rows per velocity: 2 under guidance."""
        return 1 if self.config.guidance_scale == 1.0 else 2

    def train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        """Guided velocity ``[B,C,T,H,W]`` with gradient."""
        return self._trained_path(self.model, x, timestep, prompts)

    def detached_train(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        """:meth:`train` for the rollout: gradients are on, so that the same kernels run, and then dropped."""
        with torch.enable_grad():
            return self.train(x, timestep, prompts).detach()

    @torch.no_grad()
    def reference(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        """The guided velocity that training started from."""
        if self.frozen is not None:
            return self._trained_path(self.frozen, x, timestep, prompts)
        if not adapted_linears(self.model):
            raise ConfigError("A KL term needs the model that training started from.", "Keep a frozen copy of it.")
        with adapters_off(self.model):
            return self._trained_path(self.model, x, timestep, prompts)

    def _trained_path(self, model: WanTransformer, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        assert self._embeddings is not None, "prepare first"
        text = self._embeddings[[self._rows[prompt] for prompt in prompts]]
        with half_precision(x.device, self._autocasts(self.precision)):
            if self.branches == 1:
                return model(x, timestep, text)
            rows = torch.cat((self._embeddings[:1].expand_as(text), text))
            v_uncond, v_cond = model(torch.cat((x, x)), torch.cat((timestep, timestep)), rows).chunk(2)
        if not self.config.gradient_through_uncond:
            v_uncond = v_uncond.detach()
        return guide(v_uncond, v_cond, self.config.guidance_scale)

    def hold(self, prompts: Sequence[int]) -> Tensor:
        """Upload these prompts' text, which is all that training asks for: ``[1 + prompts, S, E]``."""
        unique = sorted(set(prompts))
        self._rows = {prompt: row for row, prompt in enumerate(unique, start=1)}
        self._embeddings = self.text[[-1, *unique]].to(self.device)
        self._contexts = None
        return self._embeddings

    @torch.no_grad()
    def prepare(self, prompts: Sequence[int]) -> None:
        """:meth:`hold`, and project the text once, under the current weights, for :meth:`sample`.

        Keys and values of all blocks are 94 MB a prompt for 1.3B and 420 MB for 14B: prepare one batch at a time.
        """
        embeddings = self.hold(prompts)
        requantise(self._sampled)
        with self._sampling():
            self._contexts = self._sampled.text_context(embeddings)

    @torch.no_grad()
    def sample(self, x: Tensor, timestep: Tensor, prompts: Sequence[int]) -> Tensor:
        """Guided velocity of prepared prompts, without gradient."""
        assert self._contexts is not None, "prepare first"
        rows = [self._rows[prompt] for prompt in prompts]
        if self.branches == 2:
            rows = [0] * len(rows) + rows
        index = torch.tensor(rows, device=x.device)
        context = TextContext(tuple((k[index], v[index]) for k, v in self._contexts.blocks))

        def call(latents: Tensor, timesteps: Tensor, _: Tensor) -> Tensor:
            return self._sampled(latents, timesteps, context)

        with self._sampling():
            return guided(call, x[:0], x[:0], self.config.guidance_scale)(x, timestep)

    def path(self, rows: int) -> TrainingPath:
        """What decides the bits of a training forward of ``rows`` states, besides weights and inputs."""
        adapters = adapted_linears(self.model).values()
        autocast = torch.get_autocast_dtype(self.device.type) if self._autocasts(self.precision) else None
        return TrainingPath(
            rows * self.branches,
            self.model.proj_out.weight.dtype,
            autocast,
            sum(linear.active for linear in adapters),
            self.model.training,
            dispatch.pins(),
        )

    def _sampling(self) -> AbstractContextManager[object]:
        return half_precision(self.device, self._autocasts(self.config.sample_precision))

    def _autocasts(self, precision: SamplePrecision) -> bool:
        return precision != "fp32" and self.model.proj_out.weight.dtype == torch.float32
