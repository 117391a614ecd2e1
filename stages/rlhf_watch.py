"""What an RLHF run does at its checkpoints: held-out clips, their scores, a contact sheet, an end when rewards lie."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.bench.judge.sheets import Row, Sheet, contact_sheet, webp
from reelforge.engine.core import distributed
from reelforge.engine.core.errors import DataError, StorageError, TrainingError
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.metrics import JsonlLog, read_jsonl
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.io import checkpoint
from reelforge.engine.io.video import read_video, write_video
from reelforge.engine.rl.monitor import Keep, Monitor, fallen, summary
from reelforge.engine.train.state import TrainState


class Watch:
    """A run's monitor in its run directory.

    Args:
        monitor: with the run's prompts embedded.
        state: whose averaged weights are judged.
        run_dir: where everything goes: ``held_out.json``, ``samples/step-*/``, ``metrics.jsonl``.
        fps: of the videos.
        export: writes the weights in place into a folder.
    """

    def __init__(
        self, monitor: Monitor, state: TrainState, run_dir: RunDir, fps: float, export: Callable[[Path], None]
    ) -> None:
        self.monitor, self.state, self.run_dir, self.fps, self.export = monitor, state, run_dir, fps, export

    def begin(self, origin: dict[str, str]) -> None:
        """The starting model's clips and scores, measured once; its weights must be in place."""
        measured = self.monitor.begin(self.run_dir.root / "held_out.json", origin, self._keep(0))
        if measured and self.monitor.start is not None and distributed.rank() == 0:
            with JsonlLog(self.run_dir.metrics) as log:
                log.write(step=0, held_out=self.monitor.compare(self.monitor.start))

    def look(self, step: int) -> dict[str, Any]:
        """Measure the averaged weights; what goes into metrics.jsonl."""
        start = time.monotonic()
        with self.state.ema.applied():
            scores = self.monitor.measure(self._keep(step))
        compared = self.monitor.compare(scores)
        distributed.barrier()
        say(f"held out at step {step}, in standard deviations of the start: {summary(compared)}")
        if distributed.rank() == 0:
            with best_effort():
                self._show(step)
        return {"held_out": compared, "held_out_s": time.monotonic() - start}

    def check(self, measured: dict[str, Any]) -> None:
        """End the run when the rewards rise on something that a held-out scorer dislikes.

        Raises:
            TrainingError: names the scorer, the numbers and what to go back to.
        """
        step, most = self.state.step, self.monitor.config.max_fall
        compared = measured.get("held_out", {})
        axis = fallen(compared, most)
        if axis is None:
            return
        facts, gains = compared[axis], [each["drift"] for each in compared.values() if each["kind"] == "reward"]
        raise TrainingError(
            f"By step {step} the held-out {axis} has fallen by {-facts['drift']:.2f} +- {2 * facts['error']:.2f}"
            f" standard deviations of the starting model's (held_out.max_fall {most:g}), while the rewards rose by"
            f" {sum(gains) / len(gains):.2f}: they are being gamed.",
            f"{self._way_back(step)} Look at {self.run_dir.samples}; raise held_out.max_fall to go on regardless.",
        )

    def check_again(self) -> None:
        """:meth:`check` of the checkpoint that a run is continued from."""
        for line in read_jsonl(self.run_dir.metrics):
            if line["step"] == self.state.step:
                self.check(line)

    def _way_back(self, step: int) -> str:
        """Export the averaged weights of the last checkpoint before ``step`` that was sound."""
        lines = [line for line in read_jsonl(self.run_dir.metrics) if 0 < line["step"] < step and "held_out" in line]
        for line in reversed(lines):
            folder = self.run_dir.checkpoints / f"step-{line['step']:08d}"
            if folder.exists() and not fallen(line["held_out"], self.monitor.config.max_fall):
                target = self.run_dir.root / f"sound-{folder.name}"
                if distributed.rank() == 0 and not target.exists():
                    average = checkpoint.load(folder).groups["ema"]
                    for name, parameter in self.state.parameters.items():
                        parameter.data.copy_(average[name])
                    self.export(target)
                return f"The last sound checkpoint is {folder}; its averaged weights are in {target}."
        return "No sound checkpoint is left: go back to the starting model."

    def _folder(self, step: int) -> Path:
        return self.run_dir.samples / f"step-{step:08d}"

    def _keep(self, step: int) -> Keep:
        def keep(prompt: int, frames: np.ndarray) -> None:
            with best_effort():
                write_video(self._folder(step) / f"{prompt:02d}.mp4", frames, self.fps)

        return keep

    def _show(self, step: int) -> None:
        """Starting model and now, side by side."""
        files = sorted(self._folder(step).glob("*.mp4"))
        pairs = [(int(file.stem), self._folder(0) / file.name, file) for file in files]
        rows = tuple(
            Row(
                self.monitor.prompts.prompts[prompt],
                self.monitor.sampling.seed,
                (read_video(before).frames, read_video(now).frames),
            )
            for prompt, before, now in pairs
            if before.exists()
        )
        if rows:
            page = contact_sheet(Sheet("held out", ("start", f"step {step}"), rows, self.fps))
            replace_file(self._folder(step) / "sheet.webp", webp([page], lossless=False))


@contextmanager
def best_effort() -> Iterator[None]:
    """A picture that cannot be written must not cost the checkpoint that comes after it."""
    try:
        yield
    except (DataError, StorageError) as error:
        say(f"{error.what} {error.hint} Training goes on.")
