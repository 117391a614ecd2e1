"""The recipe of ``reelforge judge``: what is compared, on what, by whom."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelforge.engine.core.config import nearest, require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.rewards.scoring import ScoringConfig

Asked = Literal["prompts", "requests", "rewritten"]
SECOND = "-second-noise"  # what the first column's other clips are filed under


@dataclass(frozen=True)
class ColumnConfig:
    """A column of the report.

    Attributes:
        name: on the page.
        model: model folder.
        against: columns that it is compared with, clip by clip.
        asked: for ``prompts``, for the ``requests`` as users wrote them, or for these ``rewritten``.
        transformer: of another run in place of the folder's, as ``generate --transformer``.
        adapter: a LoRA adapter to merge in, as ``generate --adapter``.
        settings: ``key=value`` laid over the folder's defaults, as ``generate --set``.
        metrics: ``metrics.jsonl`` of the runs that made it, for cost and curves.
    """

    name: str
    model: Path
    against: tuple[str, ...] = ()
    asked: Asked = "prompts"
    transformer: Path | None = None
    adapter: Path | None = None
    settings: tuple[str, ...] = ()
    metrics: tuple[Path, ...] = ()

    @property
    def slug(self) -> str:
        """Names its folders."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "column"

    @property
    def judged_by(self) -> Literal["prompts", "requests"]:
        """Whose words its clips are scored against, and name their noise: rewriting changes neither."""
        return "prompts" if self.asked == "prompts" else "requests"


@dataclass(frozen=True)
class JudgeConfig:
    """The whole comparison.

    Attributes:
        output: clips, scores, results.json and report.html.
        prompts: held out from every training; a text file, one a line.
        voters: scorers that no training saw; higher must be better on every axis of theirs.
        rewards: scorers that training optimised.
        requests: prompts in users' words, for columns that are asked for them.
        rewriter: its folder, for ``rewritten`` columns.
        columns: in order; the first is what changes are told against, and whose noise makes the dead zone.
        video: size of all clips; None is that of the first column's model.
        samples: clips a prompt.
        batch_size: clips a forward.
        seed: names noise and every bootstrap.
        device: ``auto`` takes the GPU if there is one.
        scoring: patience with scorers.
    """

    output: Path
    prompts: Path
    voters: tuple[str, ...]
    rewards: tuple[str, ...] = ()
    requests: Path | None = None
    rewriter: Path | None = None
    columns: tuple[ColumnConfig, ...] = ()
    video: VideoSpec | None = None
    samples: int = 2
    batch_size: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scoring: ScoringConfig = ScoringConfig()

    def __post_init__(self) -> None:
        require_positive(self, "samples", "batch_size")
        if not self.voters:
            raise ConfigError("voters is empty.", "Name a scorer that no training optimised, e.g. pick=FOLDER.")
        seen: dict[str, ColumnConfig] = {}
        slugs = {f"{column.slug}{SECOND}": f"{column.name}, second noise" for column in self.columns[:1]}
        for column in self.columns:
            if column.slug in slugs:
                raise ConfigError(
                    f"Columns {slugs[column.slug]!r} and {column.name!r} are both filed as {column.slug!r}.",
                    "Give them names that differ in letters or digits.",
                )
            slugs[column.slug] = column.name
            self._check(column, seen)
            seen[column.name] = column

    def _check(self, column: ColumnConfig, before: dict[str, ColumnConfig]) -> None:
        """Of a column and those left of it."""
        what = f"Column {column.name!r} is"
        for other in column.against:
            if other not in before:
                raise ConfigError(f"{what} against {other!r}, which is no column before it.", nearest(other, before))
            if before[other].judged_by != column.judged_by:
                raise ConfigError(
                    f"{what} asked for {column.asked}, {other!r} for {before[other].asked}.",
                    "Only clips of the same words can be compared.",
                )
        if any(setting.startswith("video") for setting in column.settings):
            raise ConfigError(f"{what} of a size of its own.", "Set video for all columns, in a table [video].")
        if column.asked != "prompts" and self.requests is None:
            raise ConfigError(f"{what} asked for {column.asked}.", "Set requests to a text file, a request a line.")
        if column.asked == "rewritten" and self.rewriter is None:
            raise ConfigError(f"{what} asked for rewritten requests.", "Set rewriter to a rewriter's folder.")
