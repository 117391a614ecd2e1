"""The run directory: what every stage leaves behind, under the same names."""

import json
from pathlib import Path
from typing import Any

from reelforge.engine.core import config as configuration
from reelforge.engine.core.errors import ConfigError, StorageError
from reelforge.engine.core.hardware import git_revision, hardware, versions


class RunDir:
    """Paths of one run. ``open`` creates it, or continues it when the config is the same.

    Layout: ``config.resolved.toml``, ``run.json``, ``metrics.jsonl``, ``events.jsonl``,
    ``bad_samples.jsonl``, ``checkpoints/step-*/``, ``samples/step-*/``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.events = root / "events.jsonl"
        self.bad_samples = root / "bad_samples.jsonl"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"

    @classmethod
    def open(cls, root: Path, config: Any, kernels: dict[str, str] | None = None) -> "RunDir":
        """Create the folder and its headers.

        Args:
            root: the folder.
            config: the stage's config; a folder of another config is refused.
            kernels: which implementation each op resolved to, for the record.

        Raises:
            ConfigError: the folder belongs to a run with another config.
            StorageError: it cannot be written.
        """
        run = cls(root)
        header = root / "run.json"
        config_hash = configuration.fingerprint(config)
        if header.exists():
            known = json.loads(header.read_text(encoding="utf-8")).get("config_hash")
            if known != config_hash:
                raise ConfigError(
                    f"{root} holds a run with another config ({known}, not {config_hash}).",
                    f"Choose another folder, or compare with {root / 'config.resolved.toml'}.",
                )
            return run
        try:
            root.mkdir(parents=True, exist_ok=True)
            configuration.dump(config, root / "config.resolved.toml")
            facts = {
                "config_hash": config_hash,
                "git": git_revision(),
                "versions": versions(),
                "hardware": hardware(),
                "kernels": kernels or {},
            }
            header.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{root} cannot be written ({error.strerror}).", "Choose another folder.") from error
        return run
