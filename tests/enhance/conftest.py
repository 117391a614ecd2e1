"""A tiny language model for tests of the rewriter's parts, untrained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig

TEXTS = (
    "a red ball rolls slowly to the left over a wooden floor while the camera stands still",
    "two dogs run through tall grass at sunset, warm light, handheld camera",
    "Details are open.",
)


def make_tiny(folder: Path, seed: int = 0, layers: int = 2) -> LanguageModel:
    """Width 64, some 300 tokens, 256 positions."""
    return LanguageModel.create(TinyLanguageModelConfig(64, layers, 320, 256), TEXTS, seed, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Not to be written to."""
    return make_tiny(tmp_path_factory.mktemp("language")).folder


@pytest.fixture(scope="session")
def language(folder) -> LanguageModel:
    """Not to be changed."""
    return LanguageModel.load(folder)


@pytest.fixture
def make(tmp_path) -> Callable[..., LanguageModel]:
    """A language model of one's own: ``make(seed, layers)``."""
    return lambda seed=0, layers=2: make_tiny(tmp_path / f"language-{seed}-{layers}", seed, layers)
