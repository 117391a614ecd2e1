"""Running a stage from a study, which stands below the stages. Imports nothing heavy."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# (verb, recipe, overrides, overlays): runs a stage as its verb does. Stages stand above, so they hand this in.
Drive = Callable[[str, Path, Sequence[str], Sequence[Path]], None]


def placed(files: Mapping[str, Path]) -> list[str]:
    """Paths as overrides of a recipe."""
    return [f"{name}={json.dumps(str(path))}" for name, path in files.items()]
