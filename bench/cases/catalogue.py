"""All benchmark cases: whatever module of this package has a list ``CASES``."""

import importlib
import pkgutil

import reelforge.bench.cases
from reelforge.bench.cases.case import Case
from reelforge.kernels import dispatch


def all_cases() -> list[Case]:
    """The cases of every family, with every op's module imported."""
    dispatch.load()
    names = sorted(entry.name for entry in pkgutil.iter_modules(reelforge.bench.cases.__path__))
    modules = [importlib.import_module(f"reelforge.bench.cases.{name}") for name in names]
    return [case for module in modules for case in getattr(module, "CASES", [])]
