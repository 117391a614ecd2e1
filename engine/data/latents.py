"""The latent cache: every clip encoded once, every caption embedded once.

One folder holds one cache: its header names codec, text encoder, spec and precision, and a folder of another header
is refused. ``selection.json`` lists the clips that passed the filters of the last build; the statistics of all clips
are kept, so a build with other filters decodes and encodes only what it newly needs.
"""

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.progress import say, track
from reelforge.engine.core.types import TextEncoder, VideoCodec, VideoSpec, pad_text
from reelforge.engine.data.clips import Span, TooShort, load_clip, to_pixels
from reelforge.engine.data.filters import FilterConfig, Stats, first_fault, measure, write_report
from reelforge.engine.data.manifest import Manifest, Reject, Sample
from reelforge.engine.io.shards import Row, ShardReader, ShardWriter

SELECTION = "selection.json"
REPORT = "reject_report.json"
_POLICY = 1  # of clips.py and the statistics; a change there makes old caches stale
_TEXT_BATCH = 64

Precision = Literal["bfloat16", "float32"]
_DTYPES: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Preparation:
    """How clips become latents.

    Attributes:
        spec: what every clip is brought to.
        span: which part of a longer clip.
        precision: of stored latents and embeddings.
        batch_size: clips encoded together.
        decode_threads: clips decoded ahead of the codec.
    """

    spec: VideoSpec
    span: Span = "centre"
    precision: Precision = "bfloat16"
    batch_size: int = 4
    decode_threads: int = 2

    def header(self, codec: VideoCodec, text: TextEncoder) -> dict[str, Any]:
        """What the cached numbers depend on."""
        return {
            "codec": codec.fingerprint,
            "text": text.fingerprint,
            "max_tokens": text.max_tokens,
            "policy": _POLICY,
            "span": self.span,
            "precision": self.precision,
            **{f"video.{name}": value for name, value in dataclasses.asdict(self.spec).items()},
        }


@dataclass(frozen=True)
class _Decoded:
    """A clip brought to the spec, or why it could not be; ``frames`` is None where the cache already has it."""

    sample: Sample
    frames: np.ndarray | None = None
    stats: Stats | None = None
    fault: tuple[str, str] | None = None


def build_cache(
    folder: Path,
    manifest: Manifest,
    preparation: Preparation,
    filters: FilterConfig,
    codec: VideoCodec,
    text: TextEncoder,
) -> "LatentCache":
    """Encode what is new, select, report. Killed and run again, it goes on where it was.

    A clip is encoded again when its file's size or modification time changed.

    Raises:
        ConfigError: the codec cannot encode the spec.
        DataError: the folder holds another cache, or no clip passed (the report says why).
        StorageError: the folder cannot be written.
    """
    _check_spec(preparation.spec, codec)
    with ShardWriter(folder, preparation.header(codec, text)) as writer:
        rejects = _ClipEncoder(writer, preparation, filters, codec).run(manifest.samples)
        rejected = {reject.id for reject in rejects}
        selected = [sample for sample in manifest.samples if sample.id not in rejected]
        _embed(writer, [caption for sample in selected for caption in sample.captions], text, preparation)
    say(write_report(folder / REPORT, len(selected), [*manifest.rejects, *rejects]))
    if not selected:
        raise DataError(f"No clip passed into {folder}.", f"See {folder / REPORT} for the reasons.")
    clips = [{"id": sample.id, "captions": sample.captions} for sample in selected]
    replace_file(folder / SELECTION, json.dumps({"clips": clips}, ensure_ascii=False).encode())
    return LatentCache.open(folder)


def _check_spec(spec: VideoSpec, codec: VideoCodec) -> None:
    if (spec.num_frames - 1) % codec.temporal_stride:
        stride = codec.temporal_stride
        nearest = 1 + round((spec.num_frames - 1) / stride) * stride
        raise ConfigError(f"video.num_frames is {spec.num_frames}.", f"The codec needs 1 + {stride} k; try {nearest}.")
    if spec.height % codec.spatial_stride or spec.width % codec.spatial_stride:
        size = f"{spec.height} x {spec.width}"
        raise ConfigError(f"video.height x width is {size}.", f"The codec needs multiples of {codec.spatial_stride}.")


@dataclass(frozen=True)
class _ClipEncoder:
    writer: ShardWriter
    preparation: Preparation
    filters: FilterConfig
    codec: VideoCodec

    def run(self, samples: Sequence[Sample]) -> list[Reject]:
        """Store the latents of every sample that passes; return the others."""
        rejects, batch = [], []
        with ThreadPoolExecutor(self.preparation.decode_threads) as pool:
            decoded = _ahead(pool, self._decode, samples, self.preparation.batch_size + 1)
            for clip in track(decoded, "caching clips", total=len(samples)):
                if clip.fault is not None:
                    rejects.append(Reject(clip.sample.id, str(clip.sample.path), *clip.fault))
                    self._remember(clip)
                elif clip.frames is not None:
                    batch.append(clip)
                if len(batch) == self.preparation.batch_size:
                    self._encode(batch)
                    batch = []
        if batch:
            self._encode(batch)
        return rejects

    def _known(self, sample: Sample) -> Row | None:
        row = self.writer.rows.get(_clip_key(sample.id))
        return row if row is not None and row.facts["file"] == _file_state(sample.path) else None

    def _decode(self, sample: Sample) -> _Decoded:
        """Runs in a thread: reads the index, never writes it."""
        known = self._known(sample)
        if known is not None:
            if known.facts["fault"] is not None:
                return _Decoded(sample, fault=tuple(known.facts["fault"]))
            stats = Stats(**known.facts["stats"])
            fault = first_fault(sample, stats, self.filters)
            if fault is not None or known.tensors:
                return _Decoded(sample, stats=stats, fault=fault)
        try:
            frames, info = load_clip(sample.path, self.preparation.spec, self.preparation.span)
        except DataError as error:
            return _Decoded(sample, fault=("too_short" if isinstance(error, TooShort) else "unreadable", error.what))
        stats = measure(frames, info)
        return _Decoded(sample, frames, stats, first_fault(sample, stats, self.filters))

    def _remember(self, clip: _Decoded) -> None:
        """Note why a clip could not be read, or the statistics of one that the filters set aside."""
        if self._known(clip.sample) is None:
            fault = clip.fault if clip.stats is None else None
            self.writer.add(_clip_key(clip.sample.id), self._facts(clip) | {"fault": fault})

    def _encode(self, batch: Sequence[_Decoded]) -> None:
        pixels = torch.stack([to_pixels(clip.frames) for clip in batch if clip.frames is not None])
        with torch.no_grad():
            latents = self.codec.encode(pixels).to(_DTYPES[self.preparation.precision])
        for clip, latent in zip(batch, latents, strict=True):
            facts = self._facts(clip) | {"shape": list(latent.shape)}
            self.writer.add(_clip_key(clip.sample.id), facts, {"latents": latent})

    @staticmethod
    def _facts(clip: _Decoded) -> dict[str, Any]:
        stats = dataclasses.asdict(clip.stats) if clip.stats is not None else None
        return {"file": _file_state(clip.sample.path), "stats": stats, "fault": None}


def _ahead(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """``map`` in order, at most ``depth`` items ahead of the consumer."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _embed(writer: ShardWriter, captions: Sequence[str], text: TextEncoder, preparation: Preparation) -> None:
    """Embed the empty prompt and every caption that the cache does not hold yet."""
    wanted = dict.fromkeys(["", *captions])
    new = [caption for caption in wanted if _text_key(caption) not in writer.rows]
    batches = [new[i : i + _TEXT_BATCH] for i in range(0, len(new), _TEXT_BATCH)]
    for batch in track(batches, "embedding captions", total=len(batches)):
        with torch.no_grad():
            embeddings = text.encode(batch)
        for caption, embedding in zip(batch, embeddings, strict=True):
            stored = {"embedding": embedding.to(_DTYPES[preparation.precision])}
            writer.add(_text_key(caption), {"caption": caption}, stored)


def _clip_key(sample_id: str) -> str:
    return f"clip:{sample_id}"


def _text_key(caption: str) -> str:
    return f"text:{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


def _file_state(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


class LatentCache:
    """Reads a finished cache: selected clips by index, in the manifest's order.

    Attributes:
        ids: of the clips.
        header: what the cache was built with; see :meth:`Preparation.header`.
        empty_text: float32 ``[S, E]`` of the empty prompt, for classifier-free guidance dropout.
    """

    def __init__(self, store: ShardReader, clips: Sequence[dict[str, Any]]) -> None:
        self._store, self._clips = store, clips
        self.header = store.header
        self.ids = [clip["id"] for clip in clips]
        self.empty_text = self._embedding("")

    @classmethod
    def open(cls, folder: Path) -> "LatentCache":
        """Open a cache for reading.

        Raises:
            DataError: missing, unfinished or damaged.
        """
        store = ShardReader(folder)
        try:
            clips = json.loads((folder / SELECTION).read_bytes())["clips"]
        except (OSError, ValueError) as error:
            raise DataError(f"Cache {folder} is not finished.", "Run the cache stage again; it continues.") from error
        missing = [clip["id"] for clip in clips if _clip_key(clip["id"]) not in store.rows]
        if missing:
            raise DataError(f"Cache {folder} lost clip {missing[0]!r}.", "Run the cache stage again; it continues.")
        return cls(store, clips)

    def check(self, codec: VideoCodec, text: TextEncoder | None = None) -> None:
        """Refuse a cache that another codec, or another text encoder if one is given, made.

        Raises:
            DataError: names the one that differs.
        """
        found = {"codec": codec.fingerprint} | ({"text": text.fingerprint} if text is not None else {})
        for name, fingerprint in found.items():
            if self.header[name] != fingerprint:
                raise DataError(
                    f"{self._store.folder} was built with {name} {self.header[name]}, not {fingerprint}.",
                    "Run the cache stage with this model into a new folder.",
                )

    @property
    def fingerprint(self) -> str:
        """Of codec, preparation and selected clips, 16 hex digits: another cache is another training set."""
        known = json.dumps([self.header, self._clips], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Compare every shard with its sha256; reads the whole cache."""
        self._store.verify()

    def __len__(self) -> int:
        return len(self._clips)

    def shape_of(self, index: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip."""
        _, frames, height, width = self._store.rows[_clip_key(self.ids[index])].facts["shape"]
        return frames, height, width

    def stats(self, index: int) -> Stats:
        return Stats(**self._store.rows[_clip_key(self.ids[index])].facts["stats"])

    def captions(self, index: int) -> list[str]:
        """Alternative captions of a clip, at least one."""
        return self._clips[index]["captions"]

    def latents(self, indexes: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """float32 ``[B,C,T,H,W]`` of clips of one shape (one bucket)."""
        rows = [self._store.tensors(_clip_key(self.ids[index]))["latents"] for index in indexes]
        return torch.stack(rows).to(device).float()

    def text(self, indexes: Sequence[int], choices: Sequence[int | None], device: torch.device | str = "cpu") -> Tensor:
        """float32 ``[B, max_tokens, E]``, zero rows behind each caption's end.

        Args:
            choices: per clip, an integer >= 0 (modulo its number of captions), or None for the empty prompt.
        """
        embeddings = []
        for index, choice in zip(indexes, choices, strict=True):
            captions = self.captions(index)
            embeddings.append(self.empty_text if choice is None else self._embedding(captions[choice % len(captions)]))
        return pad_text(embeddings, self.header["max_tokens"]).to(device)

    def _embedding(self, caption: str) -> Tensor:
        return self._store.tensors(_text_key(caption))["embedding"].float()
