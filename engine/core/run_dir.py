"""The run directory: what every stage leaves behind, under the same names."""

import json
from pathlib import Path
from typing import Any

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.core.files import make_folder, replace_file
from reelforge.engine.core.hardware import git_revision, hardware, versions
from reelforge.engine.core.probe import cuda_library, kernels


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
