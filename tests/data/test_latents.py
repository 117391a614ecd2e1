"""The cache with a codec that counts its calls: content, resumption, invalidation, and a folder full of dirt."""

import json
import os
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data.clips import load_clip, to_pixels
from reelforge.engine.data.filters import FilterConfig, Range
from reelforge.engine.data.latents import LatentCache, Preparation, build_cache
from reelforge.engine.data.manifest import read_manifest
from reelforge.engine.io import shards
from reelforge.engine.io.video import write_video
from reelforge.stages.cache import CacheConfig, run

SPEC = VideoSpec(num_frames=9, height=16, width=24, fps=12.0)
PREPARATION = Preparation(SPEC, precision="float32", batch_size=3)
KEEP_ALL = FilterConfig()


class PoolCodec:
    """Averages 4 x 8 x 8 boxes; the first frame stands alone."""

    latent_channels, temporal_stride, spatial_stride = 3, 4, 8

    def __init__(self, fingerprint: str = "pool") -> None:
        self.fingerprint = fingerprint
        self.batches: list[int] = []

    def encode(self, video: Tensor) -> Tensor:
        self.batches.append(len(video))
        first = functional.avg_pool3d(video[:, :, :1], (1, 8, 8))
        return torch.cat([first, functional.avg_pool3d(video[:, :, 1:], (4, 8, 8))], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class LetterEncoder:
    """One row per letter, its code point; an end mark of -1."""

    width, max_tokens = 4, 48

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.seen: list[str] = []

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        self.seen.extend(prompts)
        return [torch.tensor([[float(ord(c))] * 4 for c in prompt] + [[-1.0] * 4]) for prompt in prompts]


def write_clips(folder: Path, count: int) -> None:
    for index in range(count):
        frames = np.random.default_rng(index).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(folder / f"{index:03d}.mp4", frames, 12.0)
        (folder / f"{index:03d}.txt").write_text(f"clip {index}\nthe same words for all\n", encoding="utf-8")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 7)
    return folder


def build(
    data: Path,
    out: Path,
    codec: PoolCodec | None = None,
    text: LetterEncoder | None = None,
    filters: FilterConfig = KEEP_ALL,
    preparation: Preparation = PREPARATION,
) -> LatentCache:
    return build_cache(out, read_manifest(data), preparation, filters, codec or PoolCodec(), text or LetterEncoder())


def report_of(out: Path) -> dict[str, str]:
    report = json.loads((out / "reject_report.json").read_text(encoding="utf-8"))
    return {reject["id"]: reject["reason"] for reject in report["rejects"]}


def test_content(clips: Path, tmp_path: Path) -> None:
    codec, text = PoolCodec(), LetterEncoder()
    cache = build(clips, tmp_path / "cache", codec, text)
    assert cache.ids == [f"{k:03d}" for k in range(7)] and len(cache) == 7
    assert codec.batches == [3, 3, 1]
    for index in (0, 4, 6):
        pixels = to_pixels(load_clip(clips / f"{index:03d}.mp4", SPEC)[0])[None]
        assert torch.equal(cache.latents([index]), PoolCodec().encode(pixels))
        assert cache.shape_of(index) == (3, 2, 3)
        assert cache.stats(index).duration_s == 1.0
    batch = cache.latents([5, 0, 5])
    assert batch.shape == (3, 3, 3, 2, 3) and batch.dtype == torch.float32 and torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1], cache.latents([0])[0])


def test_text(clips: Path, tmp_path: Path) -> None:
    text = LetterEncoder()
    cache = build(clips, tmp_path / "cache", text=text)
    assert sorted(text.seen) == sorted(["", "the same words for all", *(f"clip {k}" for k in range(7))])
    assert cache.captions(3) == ["clip 3", "the same words for all"]
    rows = cache.text([3, 3, 3, 5], [0, 1, 2, None])
    assert rows.shape == (4, 48, 4) and rows.dtype == torch.float32
    assert rows[0, :, 0].tolist() == [float(ord(c)) for c in "clip 3"] + [-1.0] + [0.0] * 41
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert rows[3, :2, 0].tolist() == [-1.0, 0.0]
    assert torch.equal(cache.empty_text, torch.full((1, 4), -1.0))


def test_bfloat16(clips: Path, tmp_path: Path) -> None:
    exact = build(clips, tmp_path / "a")
    half = build(clips, tmp_path / "b", preparation=Preparation(SPEC, precision="bfloat16"))
    assert half.latents([2]).dtype == torch.float32
    assert torch.equal(half.latents([2]), exact.latents([2]).bfloat16().float())


def test_batch_size_and_threads_do_not_change_the_cache(clips: Path, tmp_path: Path) -> None:
    first = build(clips, tmp_path / "a", preparation=Preparation(SPEC, precision="float32", batch_size=1))
    other = build(clips, tmp_path / "b", preparation=Preparation(SPEC, "centre", "float32", 5, decode_threads=4))
    assert torch.equal(first.latents(range(7)), other.latents(range(7)))


def test_a_second_run_does_nothing(clips: Path, tmp_path: Path) -> None:
    build(clips, tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    codec, text = PoolCodec(), LetterEncoder()
    build(clips, tmp_path / "cache", codec, text)
    assert codec.batches == [] and text.seen == []
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")} == before


class Killed(Exception):
    pass


def test_killed_while_encoding_then_resumed(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of three clips; death in the third batch keeps the first two."""
    expected = build(clips, tmp_path / "whole").latents(range(7))

    class Mortal(PoolCodec):
        def encode(self, video: Tensor) -> Tensor:
            if len(self.batches) == 2:
                raise Killed
            return super().encode(video)

    monkeypatch.setattr(shards, "_SHARD_ROWS", 3)
    with pytest.raises(Killed):
        build(clips, tmp_path / "cache", Mortal())
    with pytest.raises(DataError, match="not finished"):
        LatentCache.open(tmp_path / "cache")
    codec = PoolCodec()
    cache = build(clips, tmp_path / "cache", codec)
    assert codec.batches == [1]
    assert torch.equal(cache.latents(range(7)), expected)


def test_a_changed_file_is_encoded_again(clips: Path, tmp_path: Path) -> None:
    data = shutil.copytree(clips, tmp_path / "data")
    old = build(data, tmp_path / "cache").latents([2, 3])
    shutil.copy(data / "005.mp4", data / "002.mp4")
    codec = PoolCodec()
    cache = build(data, tmp_path / "cache", codec)
    assert codec.batches == [1]
    assert torch.equal(cache.latents([2]), cache.latents([5])) and not torch.equal(cache.latents([2])[0], old[0])
    assert torch.equal(cache.latents([3])[0], old[1])


def test_new_deleted_and_recaptioned_clips(clips: Path, tmp_path: Path) -> None:
    data = shutil.copytree(clips, tmp_path / "data")
    build(data, tmp_path / "cache")
    (data / "000.mp4").unlink()
    (data / "001.txt").write_text("new words\n")
    shutil.copy(data / "005.mp4", data / "zzz.mp4")
    (data / "zzz.txt").write_text("last\n")
    codec, text = PoolCodec(), LetterEncoder()
    cache = build(data, tmp_path / "cache", codec, text)
    assert cache.ids == [*(f"{k:03d}" for k in range(1, 7)), "zzz"]
    assert codec.batches == [1] and text.seen == ["new words", "last"]
    assert cache.captions(0) == ["new words"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": PoolCodec("other")}, "codec = 'pool', not 'other'"),
        ({"text": LetterEncoder("other")}, "text = 'letters', not 'other'"),
        ({"preparation": Preparation(VideoSpec(5, 16, 24, 12.0), precision="float32")}, "video.num_frames = 9, not 5"),
        ({"preparation": Preparation(SPEC, precision="bfloat16")}, "precision"),
        ({"preparation": Preparation(SPEC, span="first", precision="float32")}, "span"),
    ],
)
def test_a_cache_of_another_key_is_refused(clips: Path, tmp_path: Path, change: dict, words: str) -> None:
    build(clips, tmp_path / "cache")
    with pytest.raises(DataError, match=words):
        build(clips, tmp_path / "cache", **change)


def test_check_names_the_wrong_model(clips: Path, tmp_path: Path) -> None:
    cache = build(clips, tmp_path / "cache")
    cache.check(PoolCodec(), LetterEncoder())
    with pytest.raises(DataError, match="codec pool, not other"):
        cache.check(PoolCodec("other"), LetterEncoder())


def test_filters_change_without_encoding_again(clips: Path, tmp_path: Path) -> None:
    everything = build(clips, tmp_path / "cache")
    contrasts = [everything.stats(k).contrast for k in range(7)]
    middle = float(np.median(contrasts))
    strict, codec = FilterConfig(contrast=Range(min=middle)), PoolCodec()
    cache = build(clips, tmp_path / "cache", codec, filters=strict)
    assert cache.ids == [f"{k:03d}" for k in range(7) if contrasts[k] >= middle] and codec.batches == []
    assert set(report_of(tmp_path / "cache").values()) == {"filter:contrast"}
    assert len(build(clips, tmp_path / "cache", codec)) == 7 and codec.batches == []

    # Strict first: what it set aside is known but not encoded; a loose build then encodes just that.
    codec = PoolCodec()
    assert len(build(clips, tmp_path / "other", codec, filters=strict)) == 4 and sum(codec.batches) == 4
    codec = PoolCodec()
    cache = build(clips, tmp_path / "other", codec)
    assert sum(codec.batches) == 3
    assert torch.equal(cache.latents(range(7)), everything.latents(range(7)))


def test_nothing_left_is_an_error_that_names_the_report(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reject_report\.json"):
        build(clips, tmp_path / "cache", filters=FilterConfig(brightness=Range(min=256)))
    assert len(report_of(tmp_path / "cache")) == 7


@pytest.mark.parametrize("spec", [VideoSpec(10, 16, 24, 12.0), VideoSpec(9, 20, 24, 12.0), VideoSpec(9, 16, 25, 12.0)])
def test_a_spec_that_the_codec_cannot_do(clips: Path, tmp_path: Path, spec: VideoSpec) -> None:
    with pytest.raises(ConfigError, match="video"):
        build(clips, tmp_path / "cache", preparation=Preparation(spec))


def test_a_lost_shard_is_rebuilt(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_ROWS", 3)
    expected = build(clips, tmp_path / "cache").latents(range(7))
    victim = tmp_path / "cache" / "shard-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(DataError, match="shard-00001"):
        LatentCache.open(tmp_path / "cache")
    victim.unlink()
    victim.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="lost clip '003'"):
        LatentCache.open(tmp_path / "cache")
    codec = PoolCodec()
    assert torch.equal(build(clips, tmp_path / "cache", codec).latents(range(7)), expected)
    assert codec.batches == [3]
    LatentCache.open(tmp_path / "cache").verify()


def test_dirty_data_is_quarantined_with_reasons(clips: Path, tmp_path: Path) -> None:
    """Two hundred faulty entries beside five good ones: every fault has its reason, and the run ends."""
    rng = np.random.default_rng(0)
    whole = (clips / "000.mp4").read_bytes()
    rows, expected = [], {}

    def entry(name: str, reason: str | None, payload: bytes | None, **fields: object) -> None:
        if payload is not None:
            (tmp_path / f"{name}.mp4").write_bytes(payload)
        rows.append({"path": f"{name}.mp4", "caption": name, **fields})
        if reason is not None:
            expected[name] = reason

    for index in range(5):
        entry(f"good {index}", None, (clips / f"{index:03d}.mp4").read_bytes())
    for index in range(40):
        entry(f"cut-{index}", "unreadable", whole[: 1 + index * (len(whole) - 200) // 40])
        entry(f"random-{index}", "unreadable", rng.bytes(int(rng.integers(1, 4000))))
    for index in range(20):
        entry(f"empty-{index}", "unreadable", b"")
        entry(f"text-{index}", "unreadable", b"A cat sits on a wall.\n" * (index + 1))
        entry(f"gone-{index}", "missing_file", None)
        entry(f"mute-{index}", "missing_caption", whole, caption=[None, "", "  \n", 7][index % 4])
        entry(f"score-{index}", "bad_score", whole, scores={"s": [float("nan"), float("inf"), "high", None][index % 4]})
    for name, frames in (("short", 3), ("single", 1)):
        write_video(tmp_path / f"{name}.mp4", np.zeros((frames, 32, 48, 3), np.uint8), 12.0)
        entry(name, "too_short", None)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows.extend([{**rows[0], "caption": "again"}] * 20)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    cache = build(tmp_path / "list.jsonl", tmp_path / "cache")
    assert cache.ids == [f"good {index}" for index in range(5)]
    found = json.loads((tmp_path / "cache" / "reject_report.json").read_text())
    assert {r["id"]: r["reason"] for r in found["rejects"] if r["reason"] != "duplicate_id"} == expected
    assert found["counts"]["duplicate_id"] == 20 and found["total"] == len(rows) and len(found["rejects"]) > 200
    assert all(reject["detail"] for reject in found["rejects"])
    codec = PoolCodec()
    build(tmp_path / "list.jsonl", tmp_path / "cache", codec)
    assert codec.batches == [] and json.loads((tmp_path / "cache" / "reject_report.json").read_text()) == found


def test_a_repaired_file_is_taken_up(clips: Path, tmp_path: Path) -> None:
    data = shutil.copytree(clips, tmp_path / "data")
    whole = (data / "004.mp4").read_bytes()
    (data / "004.mp4").write_bytes(whole[:100])
    build(data, tmp_path / "cache")
    assert report_of(tmp_path / "cache") == {"004": "unreadable"}
    (data / "004.mp4").write_bytes(whole)
    assert len(build(data, tmp_path / "cache")) == 7


def test_the_stage(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver with stand-ins for the model folder's loaders."""
    folder = types.ModuleType("folder")
    folder.load_codec = lambda root, device: PoolCodec(str(root))
    folder.load_text_encoder = lambda root, device: LetterEncoder(str(root))
    monkeypatch.setitem(sys.modules, "reelforge.engine.model.folder", folder)
    cache = run(CacheConfig(clips, Path("model"), tmp_path / "cache", SPEC))
    assert len(cache) == 7 and cache.header["codec"] == "model" and cache.header["precision"] == "bfloat16"
    assert os.listdir(tmp_path) == ["cache"]
