"""SIGKILL anywhere inside saving and purging: nothing committed is lost, nothing unreadable is offered."""

import os
import random
import signal
import struct
import time
from pathlib import Path

import torch

from reelforge.engine.core.errors import CheckpointError
from reelforge.engine.io import checkpoint

KILLS = 60


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"t": torch.full((4000,), float(step))} for name in ("weights", "ema", "adam")}


def save_forever(folder: Path, step: int, report: int) -> None:
    """Child: save step after step and report each one once it is committed."""
    while True:
        step += 1
        checkpoint.save(folder, step, tensors(step), {}, "cafe", keep_last=2)
        os.write(report, struct.pack("<q", step))


def committed_before_kill(folder: Path, step: int, delay_s: float) -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_forever(folder, step, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the saving child failed by itself"
    with os.fdopen(reader, "rb") as pipe:
        reports = pipe.read()
    return struct.unpack("<q", reports[-8:])[0] if reports else step


def test_kills_lose_nothing(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), {}, "cafe")
    begin = time.perf_counter()
    checkpoint.save(tmp_path, 2, tensors(2), {}, "cafe")
    save_s = time.perf_counter() - begin
    chance, step, damaged = random.Random(0), 2, []

    def on_damaged(path: Path, error: CheckpointError) -> None:
        damaged.append((path.name, error.what))

    for _ in range(KILLS):
        committed = committed_before_kill(tmp_path, step, chance.uniform(0.3, 3.0) * save_s)
        newest = checkpoint.latest(tmp_path, on_damaged)
        assert newest is not None
        loaded = checkpoint.load(newest, "cafe")
        assert loaded.step >= committed >= step
        assert all((group["t"] == loaded.step).all() for group in loaded.groups.values())
        step = loaded.step
    assert damaged == []
    checkpoint.save(tmp_path, step + 1, tensors(step + 1), {}, "cafe", keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{step + 1:08d}"], "leftovers were not cleared"
