"""``reelforge judge``: models filmed on the same prompts and noise, scored, compared; one page with all columns.

Nothing is held but scores: clips go to mp4 files, the scores of each to a file of its own. Stopped, the same command
makes what is missing; a clip of other weights, words, noise or sampling is made again. Ranks share the clips.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from reelforge.bench.judge import columns
from reelforge.bench.judge.columns import Column, Training
from reelforge.bench.judge.config import ColumnConfig, JudgeConfig
from reelforge.bench.judge.filming import Film, Studio, how_sampled
from reelforge.bench.judge.gsb import Panel, Verifier, compare, fix_panel
from reelforge.bench.judge.results import Results, score_clips
from reelforge.bench.judge.sheets import Row, Sheet, thumbnail
from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed, hardware
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.progress import say
from reelforge.engine.enhance.rewriter import Enhanced, RewriterConfig, load_rewriter
from reelforge.engine.io.video import read_video
from reelforge.engine.model.folder import load_text_encoder
from reelforge.engine.rewards.registry import build_scorers
from reelforge.engine.rl.prompts import read_prompts

_PATIENCE = RewriterConfig(timeout_s=600.0)  # a slow answer is still the rewriter's answer here
_NOTE = (
    "Columns are sampled on the same prompts and noise. Intervals are 95 % bootstraps over prompts. Rewards are what "
    "training optimised: they are shown and never vote. Votes come from scorers that no training saw; a pair ties when "
    "it differs less than half of the first column's clips do from those of another noise."
)


def run(config: JudgeConfig) -> Path:
    """Film what is missing, score, compare, write; returns the page's path.

    Raises:
        ConfigError: there is no column, too few prompts, or a scorer that cannot be made.
        DataError, CheckpointError, StorageError: as named.
        Interrupted: a signal asked to stop; calling again makes what is missing.
        TrainingError: too many clips lack a score.
    """
    if not config.columns:
        raise ConfigError("There is no column.", "Add [[columns]] with a name and a model.")
    words = read_words(config)
    video = [how_sampled(config, column) for column in config.columns][0].video  # of all; a wrong setting is found now
    rewards, voters = build_scorers(config.rewards, video), build_scorers(config.voters, video)
    verifiers = [Verifier(axis, "higher", target=True) for scorer in rewards for axis in scorer.axes]
    verifiers += [Verifier(axis, "higher", target=False) for scorer in voters for axis in scorer.axes]
    studio = Studio(config, [*rewards, *voters])
    rewritten = _rewritten(config, words.get("requests", ()))
    given = {**words, "rewritten": [made.prompt for made in rewritten]}

    def film(column: ColumnConfig, draw: int = 0) -> Film:
        return studio.film(column, words[column.judged_by], given[column.asked], draw)

    films = {column.name: film(column) for column in config.columns}
    again = film(config.columns[0], 1)
    if distributed.rank() == 0:
        _report(config, films, again, verifiers, words, rewritten)
    distributed.barrier()
    return config.output / "report.html"


def read_words(config: JudgeConfig) -> dict[str, tuple[str, ...]]:
    """What is asked for: ``prompts``, and ``requests`` if there are any.

    Raises:
        ConfigError, DataError: a file cannot be read, or holds fewer than two.
    """
    words = {"prompts": _lines(config.prompts)}
    return {**words, "requests": _lines(config.requests)} if config.requests else words


def _lines(path: Path) -> tuple[str, ...]:
    found = read_prompts(path).prompts
    if len(found) < 2:
        raise ConfigError(f"{path} holds {len(found)} prompt.", "Intervals are over prompts: write at least 2.")
    return found


def _rewritten(config: JudgeConfig, requests: Sequence[str]) -> list[Enhanced]:
    """The requests through the rewriter, on one rank, remembered in ``output``; empty when no column wants them."""
    wanted = [column for column in config.columns if column.asked == "rewritten"]
    if not wanted or config.rewriter is None:
        return []
    path = make_folder(config.output) / "rewritten.json"
    if distributed.rank() == 0:
        encoder = load_text_encoder(wanted[0].model)
        rewriter = load_rewriter(
            config.rewriter, _PATIENCE, distributed.pick_device(config.device),
            lambda prompt: encoder.num_tokens(prompt) <= encoder.max_tokens, config.output / "rewriter.jsonl",
        )  # fmt: skip
        replace_file(path, json.dumps([vars(made) for made in rewriter(requests)], ensure_ascii=False, indent=1))
    distributed.barrier()
    return [Enhanced(**facts) for facts in json.loads(path.read_text(encoding="utf-8"))]


def _report(
    config: JudgeConfig,
    films: Mapping[str, Film],
    again: Film,
    verifiers: Sequence[Verifier],
    words: Mapping[str, Sequence[str]],
    rewritten: Sequence[Enhanced],
) -> None:
    first, base = next(iter(films.items()))
    panel = fix_panel(base.scores, again.scores, verifiers)
    made = {column.name: _column(column, films[column.name], rewritten) for column in config.columns}

    def table(name: str, below: str | None) -> dict[str, columns.Score]:
        reference = made[below].scores if below else None
        return score_clips(made[name].scores, made[name].labels, verifiers, config.seed, reference)

    outcome = Results(
        stages=columns.stage_results(made, table, panel, config.seed),
        seed=config.seed,
        prompts=len(words["prompts"]),
        clips=len(base.clips),
        self_check=compare(base.scores, again.scores, base.labels, panel, first, config.seed),
        note=_NOTE,
        versions=hardware.versions(),
        hardware=hardware.hardware(),
        config=configuration.to_table(config),
    )
    sheets = [sheet for asked in words for sheet in _sheets(config, films, panel, asked, words[asked], rewritten)]
    page = columns.publish(outcome, sheets, {name: column.training for name, column in made.items()}, config.output)
    say(f"{page} is written")


def _column(column: ColumnConfig, film: Film, rewritten: Sequence[Enhanced]) -> Column:
    return Column(
        film.scores, film.labels, film.nfe, film.token_forwards, film.seconds_per_video, column.against,
        column.judged_by, Training(column.metrics) if column.metrics else None,
        _rewrite_note(rewritten) if column.asked == "rewritten" else "",
    )  # fmt: skip


def _rewrite_note(rewritten: Sequence[Enhanced]) -> str:
    kept = [made for made in rewritten if made.prompt == made.request]
    example = next((made for made in rewritten if made.prompt != made.request), rewritten[0])
    return (
        f"{len(kept)} of {len(rewritten)} requests stay as they are. E.g. \u201c{example.request}\u201d becomes "
        f"\u201c{example.prompt}\u201d."
    )


def _sheets(
    config: JudgeConfig,
    films: Mapping[str, Film],
    panel: Panel,
    asked: str,
    texts: Sequence[str],
    rewritten: Sequence[Enhanced],
) -> list[Sheet]:
    """The columns that were asked for these words side by side, and the last one's worst clips."""
    shown = {column.name: films[column.name] for column in config.columns if column.judged_by == asked}
    if not shown:
        return []
    last, samples = list(shown.values())[-1], config.samples

    def row(clip: int, note: str = "") -> Row:
        pictures = tuple(thumbnail(read_video(film.clips[clip]).frames) for film in shown.values())
        told = f"rewritten: {rewritten[clip // samples].prompt}" if asked == "requests" and rewritten else ""
        return Row(texts[clip // samples], clip % samples, pictures, " ".join(filter(None, (told, note))))

    rows = tuple(row(clip) for clip in columns.spread(len(last.clips), samples))
    # Rows keep some of the frames; the clip lasts as long.
    fps = last.fps * len(rows[0].clips[0]) / len(read_video(last.clips[0]).frames)
    title = "Same prompts, same noise" if asked == "prompts" else "In users' words"
    page = Sheet(title, tuple(shown), rows, fps)
    return [page, columns.failures(tuple(shown), panel.rating(last.scores), row, fps, f"Failures on {asked}")]
