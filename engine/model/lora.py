"""Low-rank adapters (Hu et al. 2021), stored as PEFT and diffusers store them.

    y = W x + b + (alpha / rank) B A x,    A [rank, in] seeded, B [out, rank] zero

An adapted linear keeps ``weight`` and ``bias`` under their names and adds ``lora_A.weight`` and ``lora_B.weight``: with
the prefix ``base_model.model.`` these are PEFT's names, with ``transformer.`` those of diffusers' pipelines.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from reelforge.engine.core import rng
from reelforge.engine.core.config import build, nearest
from reelforge.engine.core.errors import CheckpointError, ConfigError
from reelforge.engine.core.files import staged_folder
from reelforge.engine.io.model_files import open_weights, parse_json, read_json, write_json

_PEFT_PREFIX, _PIPELINE_PREFIX = "base_model.model.", "transformer."
_PEFT_FILE, _PIPELINE_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_BASE_HINT = "Use the base model that the adapter was trained on."
_METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
# PEFT options that change what an adapter computes; each must be off.
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("layer_replication", "trainable_token_indices", "fan_in_fan_out", "target_parameters"),
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoraConfig:
    """Which linears are adapted, and how.

    Attributes:
        rank: of the update, >= 1.
        alpha: the update is scaled by alpha / rank.
        targets: ends of module names, as PEFT's ``target_modules``.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"The LoRA rank is {self.rank}.", "It must be at least 1; 32 is usual.")

    def matches(self, name: str) -> bool:
        """Whether the module is a target."""
        return any(f".{name}".endswith(f".{target}") for target in self.targets)


class LoraLinear(nn.Linear):
    """A frozen linear with a float32 adapter, which is applied in the input's type (or autocast's)."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.config = base.weight, base.bias, config
        self.active = True
        shared: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, config.rank, **shared)
        self.lora_B = nn.utils.skip_init(nn.Linear, config.rank, base.out_features, **shared)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.config.alpha / self.config.rank

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not self.active:
            return super().forward(x)
        inner = functional.linear(x, self.lora_A.weight.to(x.dtype))
        return super().forward(x) + self.scale * functional.linear(inner, self.lora_B.weight.to(inner.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear with W + (alpha / rank) B A, summed in float32 and rounded once."""
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = (self.weight.float() + update).to(self.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain


def inject(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze the model and give every target an adapter that as yet changes nothing.

    Args:
        model: without adapters.
        config: what is adapted.
        seed: names A, which is uniform in +-1 / sqrt(in) (Kaiming with a = sqrt 5, as PEFT).

    Raises:
        ConfigError: a target names no linear of the model.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert not any(isinstance(module, LoraLinear) for module in linears.values()), "already injected"
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            raise ConfigError(f"LoRA target {target!r} names no linear of the model.", nearest(target, linears))
    model.requires_grad_(False)
    for name, linear in linears.items():
        if config.matches(name):
            adapted = LoraLinear(linear, config)
            key = rng.key(f"lora.{name}", seed)
            uniform = rng.uniform(key, config.rank * linear.in_features, linear.weight.device)
            adapted.lora_A.weight.data = (2 * uniform - 1).view(config.rank, -1) * linear.in_features**-0.5
            adapted.lora_B.weight.data.zero_()
            model.set_submodule(name, adapted)


def adapted_linears(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as it did before :func:`inject`."""
    linears = adapted_linears(model).values()
    for linear in linears:
        linear.active = False
    try:
        yield
    finally:
        for linear in linears:
            linear.active = True


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and values of the adapters' matrices, the only parameters that train."""
    for name, linear in adapted_linears(model).items():
        yield f"{name}.lora_A.weight", linear.lora_A.weight
        yield f"{name}.lora_B.weight", linear.lora_B.weight


def merge(model: nn.Module) -> None:
    """Add every adapter to its weight and drop it; names are the transformer's again."""
    for name, linear in adapted_linears(model).items():
        model.set_submodule(name, linear.merged())


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the adapter twice, for PEFT's ``PeftModel`` and for diffusers' ``load_lora_weights``.

    Files: ``adapter_config.json`` and ``adapter_model.safetensors``; ``pytorch_lora_weights.safetensors``. The folder
    appears, or replaces an older one, only when it is complete.

    Raises:
        StorageError: the disk refused.
    """
    config = next(iter(adapted_linears(model).values())).config
    settings = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_parameters(model)}
    metadata = json.dumps({_PIPELINE_PREFIX + name: value for name, value in settings.items()})
    with staged_folder(Path(folder)) as staging:
        write_json(staging / "adapter_config.json", {**settings, "inference_mode": True})
        save_file(_prefixed(_PEFT_PREFIX, tensors), staging / _PEFT_FILE, {"format": "pt"})
        pipeline = {"format": "pt", _METADATA_KEY: metadata}
        save_file(_prefixed(_PIPELINE_PREFIX, tensors), staging / _PIPELINE_FILE, pipeline)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path | str) -> LoraConfig:
    """Inject the adapter that we, PEFT or diffusers wrote.

    Args:
        model: without adapters; frozen by this.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``, or diffusers'
            ``pytorch_lora_weights.safetensors`` (without metadata, alpha is the rank, as in diffusers).

    Returns:
        The adapter's config; its targets are full module names.

    Raises:
        CheckpointError: damaged files, an option other than plain LoRA, or tensors that do not fit the model.
    """
    folder = Path(folder)
    settings, tensors = _read_adapter(folder)
    for option in _UNSUPPORTED:
        if settings.get(option):
            hint = "Only plain LoRA of one rank is read; merge it with PEFT first."
            raise CheckpointError(f"{folder} sets {option} = {settings[option]!r}.", hint)
    config = _adapter_config(folder, settings, tensors)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in config.targets:
        if name not in linears:
            raise CheckpointError(f"{folder} adapts {name!r}, which the model lacks.", _BASE_HINT)
    inject(model, config, seed=0)
    for name, parameter in lora_parameters(model):
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(f"{folder}: {name!r} is {found}, not {list(parameter.shape)}.", _BASE_HINT)
        parameter.copy_(tensors[name])
    return config


def _adapter_config(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The targets are the modules that the file has tensors for."""
    modules = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    known = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    if not modules or not tensors.keys() <= known:
        stray = min(tensors.keys() - known, default="nothing")
        raise CheckpointError(f"{folder} holds {stray!r}.", "A LoRA file holds lora_A.weight and lora_B.weight only.")
    rank = len(tensors[f"{modules[0]}.lora_A.weight"])
    table = {"rank": rank, "alpha": settings.get("lora_alpha", rank), "targets": modules}
    return build(LoraConfig, table, f"{folder}: ")


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    peft = folder / _PEFT_FILE
    path = peft if peft.exists() else folder / _PIPELINE_FILE
    with open_weights(path) as reader:
        stored = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  (no mapping)
        metadata = (reader.metadata() or {}).get(_METADATA_KEY, "{}")
    settings = read_json(folder / "adapter_config.json") if path == peft else parse_json(metadata, path)
    return _bare(settings), _bare(stored)


def _bare(table: Mapping[str, Value]) -> dict[str, Value]:
    """Names without either prefix."""
    return {name.removeprefix(_PEFT_PREFIX).removeprefix(_PIPELINE_PREFIX): value for name, value in table.items()}
