"""The run directory: what every stage leaves behind, under the same names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.hardware import git_revision, hardware, versions
from reelforge.engine.core.probe import cuda_library, kernels

Recipe = TypeVar("Recipe")  # a stage's


class RunDir:
    """Paths of one run. ``open`` creates it, or continues it when the config is the same.

    Layout: ``config.resolved.toml``, ``run.json``, ``metrics.jsonl``, ``events.jsonl``,
    ``checkpoints/step-*/``, ``samples/step-*/``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.events = root / "events.jsonl"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"

    @classmethod
    def open(cls, root: Path, config: Any, config_hash: str | None = None) -> "RunDir":
        """Create the folder and its headers.

        Args:
            root: the folder.
            config: the stage's config, for the record.
            config_hash: of what decides the run's results; None is all of ``config``. Another hash is refused.

        Raises:
            ConfigError: the folder belongs to a run with another config.
            StorageError: it cannot be written.
        """
        run = cls(root)
        header = root / "run.json"
        config_hash = config_hash or configuration.fingerprint(config)
        if header.exists():
            known = _recorded_hash(header)
            if known != config_hash:
                raise ConfigError(
                    f"{root} holds a run with another config ({known}, not {config_hash}).",
                    f"Choose another folder, or compare with {root / 'config.resolved.toml'}.",
                )
            return run
        make_folder(root)
        facts = {
            "config_hash": config_hash,
            "git": git_revision(),
            "versions": versions(),
            "hardware": hardware(),
            "kernels": {finding.subject: finding.state for finding in (*kernels(), cuda_library())},
        }
        replace_file(root / "config.resolved.toml", configuration.dumps(config))
        replace_file(header, json.dumps(facts, indent=2))
        return run


def _recorded_hash(header: Path) -> str:
    try:
        return json.loads(header.read_text(encoding="utf-8"))["config_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{header} is no run's header.", "Remove the folder, or choose another one.") from error


def check_same(config: Recipe, resolved: Path, decisive: Callable[[Recipe], Recipe]) -> None:
    """Refuse to continue a run under settings that would make it another one.

    Args:
        config: of now.
        resolved: the recipe that the run directory keeps; none is there before the first start.
        decisive: keeps what decides the run's results.

    Raises:
        ConfigError: names the first setting that differs.
    """
    if not resolved.exists():
        return
    tables = [_flat(configuration.to_table(decisive(c))) for c in (configuration.load(type(config), resolved), config)]
    before, now = tables
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{resolved.parent} was started with {name} = {before.get(name)!r}, now it is {now.get(name)!r}.",
                f"Continue with {resolved}, or choose another output folder.",
            )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
