"""Transformer weights on disk: diffusers' ``transformer/`` folder and original Wan checkpoints.

A folder is ``config.json`` plus one safetensors file, or several with an index. Names may be those of diffusers'
``WanTransformer3DModel`` or those of the Wan2.1, Self-Forcing and CausVid repositories, behind any wrapper
(FSDP, ``torch.compile``, ``generator.``); every name is checked against the model before a byte of data is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reelforge.engine.core.config import nearest
from reelforge.engine.core.errors import CheckpointError
from reelforge.engine.core.files import staged_folder
from reelforge.engine.io.model_files import open_weights, read_json, write_json
from reelforge.engine.model.wan import WanTransformer

WEIGHTS_NAME = "diffusion_pytorch_model"
_INDEX_NAME = f"{WEIGHTS_NAME}.safetensors.index.json"
# The first release whose WanTransformer3DModel has every key that we write.
DIFFUSERS_VERSION = "0.36.0"
_SHARD_BYTES = 5_000_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")
# diffusers' WanTransformer3DModel._keep_in_fp32_modules: matched against every dotted part of a name.
_KEEP_FP32 = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})

_LEADING_WRAPPERS = frozenset(
    ["model", "module", "net", "generator", "generator_ema", "diffusion_model", "transformer", "state_dict"]
)
_ANYWHERE_WRAPPERS = frozenset(["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
_TOP_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK_MODULES = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    # The affine norm in front of cross-attention is the third in the original's order, the second in diffusers'.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_NAME = re.compile(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?")
# The original repository's config.json; the keys it lacks are the same for every Wan2.1 model.
_ORIGINAL_CONFIG = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
_ORIGINAL_CONFIG |= {name: name for name in ("freq_dim", "text_dim", "ffn_dim", "num_layers", "eps")}


def diffusers_name(name: str) -> str:
    """A tensor's name in diffusers, from its name in any Wan checkpoint; diffusers' own names stay."""
    parts = [part for part in name.split(".") if part not in _ANYWHERE_WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING_WRAPPERS:
        del parts[0]
    return _mapped(".".join(parts), _TOP_MODULES, _BLOCK_MODULES)


def original_name(name: str) -> str:
    """The inverse of :func:`diffusers_name`, without a wrapper."""
    tops, blocks = ({theirs: ours for ours, theirs in table.items()} for table in (_TOP_MODULES, _BLOCK_MODULES))
    return _mapped(name, tops, blocks)


def _mapped(name: str, tops: Mapping[str, str], blocks: Mapping[str, str]) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, module, kind = match.groups("")
    return block + (blocks if block else tops).get(module, module) + kind


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of one tensor in a model of ``dtype``: diffusers keeps time embedder, modulation and norms in fp32."""
    return dtype if _KEEP_FP32.isdisjoint(name.split(".")) else torch.float32


def load_transformer(
    folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> WanTransformer:
    """Read a transformer, in eval mode.

    Args:
        folder: diffusers' ``transformer/``, or an original Wan2.1 checkout; safetensors only.
        dtype: floating type of the weights, with diffusers' exceptions (:func:`storage_dtype`); None is float32.
        device: where the weights go.

    Raises:
        CheckpointError: no such folder, a damaged file, or a tensor that is missing, unexpected or misshapen.
        ConfigError: the architecture is not Wan2.1 text to video.
    """
    folder = Path(folder)
    model = WanTransformer.from_config(_model_config(folder / "config.json"), device="meta")
    stored = _stored_tensors(folder)
    _check_fits(stored, model.state_dict(), folder)
    model.load_state_dict(_read(stored, dtype or torch.float32, str(device)), assign=True)
    return model.eval()


def _model_config(path: Path) -> dict[str, Any]:
    """The config in diffusers' keys, whichever of the two conventions wrote it."""
    table = read_json(path)
    kind = table.get("_class_name")
    if kind == "WanTransformer3DModel":
        return table
    if kind not in ("WanModel", "CausalWanModel"):
        raise CheckpointError(f"{path} describes a {kind}.", "Give a folder of a WanTransformer3DModel.")
    for name in ("dim", *_ORIGINAL_CONFIG):
        if name not in table and name != "text_dim":  # 4096, left out in Wan2.1's own files
            raise CheckpointError(f"{path} lacks {name!r}.", "Download it again.")
    renamed = {theirs: table[ours] for ours, theirs in _ORIGINAL_CONFIG.items() if ours in table}
    return {**renamed, "attention_head_dim": table["dim"] // table["num_heads"]}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, from its file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in weight_files(folder):
        with open_weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                view = tensors.get_slice(name)
                entry = _Stored(file, name, tuple(view.get_shape()), view.get_dtype())
                ours = diffusers_name(name)
                if ours in stored:
                    clash = f"{stored[ours].name!r} in {stored[ours].file.name} and {name!r} in {file.name}"
                    raise CheckpointError(f"{folder}: {clash} are both {ours!r}.", "Keep one of the two.")
                stored[ours] = entry
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of its index, or all there are."""
    index = folder / _INDEX_NAME
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
    else:
        weight_map = read_json(index).get("weight_map")
        names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        files = [folder / name for name in sorted(names)]
    if not files:
        raise CheckpointError(
            f"{folder} holds no safetensors file.",
            f"Put the weights there as {WEIGHTS_NAME}.safetensors; pickled .pt, .pth or .bin files are not read.",
        )
    for file in files:
        if file.parent != folder or not file.is_file():
            raise CheckpointError(f"{index} lists {file}, which is not a file beside it.", "Download it again.")
    return files


def _check_fits(stored: Mapping[str, _Stored], wanted: Mapping[str, Tensor], folder: Path) -> None:
    """Same names, same shapes, floating types; the first offender in the model's order is named."""
    for name, tensor in wanted.items():
        if name not in stored:
            raise CheckpointError(f"{folder} lacks tensor {name!r} {list(tensor.shape)}.", _config_hint(name, stored))
        entry = stored[name]
        if entry.shape != tuple(tensor.shape):
            shapes = f"{list(entry.shape)}, the config asks for {list(tensor.shape)}"
            raise CheckpointError(f"{entry.file}: {entry.name!r} is {shapes}.", "Use the config.json of these weights.")
        if entry.kind not in _FLOATS:
            hint = f"Dequantise it first; {', '.join(_FLOATS)} are read."
            raise CheckpointError(f"{entry.file}: {entry.name!r} is stored as {entry.kind}.", hint)
    for name, entry in stored.items():
        if name not in wanted:
            what = f"{entry.file} holds {entry.name!r} {list(entry.shape)}, which the model does not have."
            raise CheckpointError(what, _config_hint(name, wanted))


def _config_hint(name: str, names: Iterable[str]) -> str:
    close = nearest(name, names)
    close = close if close.startswith("Did") else "Is it another model's file?"
    return f"{close} The config.json (num_layers, image_dim, ...) must be that of the weights."


def _read(stored: Mapping[str, _Stored], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted({entry.file for entry in stored.values()}):
        with open_weights(file, device) as reader:
            for name, entry in stored.items():
                if entry.file == file:
                    tensors[name] = reader.get_tensor(entry.name).to(storage_dtype(name, dtype))
    return tensors


def save_transformer(model: WanTransformer, folder: Path | str, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write a ``transformer/`` folder that diffusers' ``WanTransformer3DModel.from_pretrained`` reads.

    The folder appears, or replaces an older one, only when it is complete.

    Args:
        model: without adapters (merge them first).
        folder: the ``transformer/`` folder itself.
        shard_bytes: largest file, unless one tensor is larger.

    Raises:
        StorageError: the disk refused.
    """
    state = model.state_dict()
    assert not any(".lora_" in name for name in state), "merge the adapters first"
    header = {"_class_name": "WanTransformer3DModel", "_diffusers_version": DIFFUSERS_VERSION}
    with staged_folder(Path(folder)) as staging:
        write_json(staging / "config.json", {**header, **model.config.to_dict()})
        shards = _shards(state, shard_bytes)
        files = [f"{WEIGHTS_NAME}.safetensors"]
        if len(shards) > 1:
            files = [f"{WEIGHTS_NAME}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            metadata = {"total_size": sum(tensor.nbytes for tensor in state.values())}
            write_json(staging / _INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
        for file, shard in zip(files, shards, strict=True):
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
            save_file(on_host, staging / file, {"format": "pt"})


def _shards(state: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Consecutive tensors, as many per shard as fit."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards
