"""A tiny model folder and tiny clips, real in every part, for tests that go through whole stages."""

from pathlib import Path

import pytest
from tiny_model import TINY_VIDEO, make_model_folder

from reelforge.bench.toy import render


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 mp4 files with caption twins."""
    folder = tmp_path_factory.mktemp("clips")
    render.write_flawed(folder, 24, seed=0, rates=render.CLEAN, spec=TINY_VIDEO)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`tiny_model.make_model_folder`."""
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")
