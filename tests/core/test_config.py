"""Recipes: strict, extendable, overridable, and written back equal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.engine.core import config
from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["euler", "unipc"] = "euler"
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "run"
    folder: Path | None = None
    sizes: tuple[int, ...] = ()
    flag: bool = False
    inner: Inner = Inner()


@dataclass(frozen=True)
class Chain:
    first: Outer
    second: Outer
    label: str = ""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_load_fills_every_type(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "a.toml",
        'steps = 3\nfolder = "x/y"\nsizes = [1, 2]\nflag = true\n[inner]\nrate = 1\nkind = "unipc"\nbetas = [0.5, 0.6]',
    )
    expected = Outer(3, "run", Path("x/y"), (1, 2), True, Inner(1.0, "unipc", (0.5, 0.6)))
    assert config.load(Outer, recipe) == expected


def test_extends_and_overrides(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "steps = 1\n[inner]\nrate = 0.1\nkind = 'unipc'")
    (tmp_path / "sub").mkdir()
    recipe = write(tmp_path / "sub/top.toml", "extends = '../base.toml'\n[inner]\nrate = 0.2")
    loaded = config.load(Outer, recipe, ["inner.betas=[0.1, 0.2]", "name=bare words", "steps=7"])
    assert loaded == Outer(7, "bare words", inner=Inner(0.2, "unipc", (0.1, 0.2)))


def test_a_table_extends_the_recipe_of_another_verb(tmp_path: Path) -> None:
    """What it says itself counts more; the file's own tables come with it; siblings are left alone."""
    write(tmp_path / "run.toml", "steps = 1\nname = 'run'\nsizes = [1, 2]\n[inner]\nrate = 0.1\nkind = 'unipc'")
    recipe = write(
        tmp_path / "chain.toml",
        "label = 'chain'\n[first]\nextends = 'run.toml'\nsizes = [3]\n[first.inner]\nrate = 0.2\n[second]\nsteps = 5",
    )
    first = Outer(1, "run", sizes=(3,), inner=Inner(0.2, "unipc"))
    assert config.load(Chain, recipe) == Chain(first, Outer(5), "chain")
    overridden = config.load(Chain, recipe, ["first.steps=9", "first.inner.kind=euler"])
    assert overridden.first == Outer(9, "run", sizes=(3,), inner=Inner(0.2, "euler"))


def test_every_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    """Through folders, from tables within extended recipes, and when the whole recipe extends another one."""
    for name in ("verbs/parts", "mine"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "verbs/parts/inner.toml", "rate = 0.3\nkind = 'unipc'")
    write(tmp_path / "verbs/run.toml", "steps = 1\n[inner]\nextends = 'parts/inner.toml'\nrate = 0.4")
    write(tmp_path / "chain.toml", "[first]\nextends = 'verbs/run.toml'\nname = 'one'\n[second]\nsteps = 2")
    recipe = write(tmp_path / "mine/top.toml", "extends = '../chain.toml'\n[second]\nextends = '../verbs/run.toml'")
    found = config.load(Chain, recipe)
    assert found.first == Outer(1, "one", inner=Inner(0.4, "unipc"))
    # The table's own file lies over what the whole recipe extends.
    assert found.second == Outer(1, inner=Inner(0.4, "unipc"))
    assert not any("extends" in table for table in tables(config.read_table(recipe)))


def tables(table: dict) -> list[dict]:
    """It and all within it."""
    return [table, *(found for inner in table.values() if isinstance(inner, dict) for found in tables(inner))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[first]\nextends = 'gone.toml'", "gone.toml cannot be read"),
        ("[first]\nextends = 3", "extends is 3 in a recipe of .* It must be a file's name"),
        ("extends = ['a.toml']", r"extends is \['a.toml'\]"),
        ("[first]\nextends = 'top.toml'", "chain of more than 8 recipes. Break the cycle"),
        ("[first.inner]\nextends = 'other.toml'", "'first.inner.steps'. Allowed: betas, kind, rate"),
    ],
)
def test_what_a_table_cannot_extend_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "other.toml", "steps = 1")
    with pytest.raises(ConfigError, match=message):
        config.load(Chain, write(tmp_path / "top.toml", text))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps = 1\nstep = 2", [], "Unknown key 'step'. Did you mean 'steps'"),
        ("steps = 1\n[inner]\nrat = 2", [], "Unknown key 'inner.rat'. Did you mean 'rate'"),
        ("name = 'x'", [], "'steps' is missing"),
        ("steps = 1.5", [], "'steps' is 1.5. It must be int"),
        ("steps = true", [], "'steps' is True. It must be int"),
        ("steps = 1\ninner = 3", [], r"'inner' is 3. It is a table"),
        ("steps = 1\n[inner]\nkind = 'unipd'", [], "'inner.kind' is 'unipd'. Did you mean 'unipc'"),
        ("steps = 1\n[inner]\nbetas = [1.0]", [], "'inner.betas' has 1 values. It needs 2"),
        ("steps = 1\nsizes = 3", [], "'sizes' is 3. It must be a list"),
        ("steps = ", [], "is not TOML"),
        ("steps = 1", ["inner.rate"], "has no '='"),
        ("steps = 1", ["steps.deep=1"], "'steps' is a value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Outer, write(tmp_path / "a.toml", text), overrides)


def test_a_missing_recipe_and_a_cycle_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.toml cannot be read"):
        config.load(Outer, tmp_path / "none.toml")
    write(tmp_path / "a.toml", "extends = 'a.toml'")
    with pytest.raises(ConfigError, match="cycle"):
        config.load(Outer, tmp_path / "a.toml")


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)


@given(
    steps=st.integers(-(2**60), 2**60),
    name=words,
    folder=st.none() | st.sampled_from(["a", "b/c"]).map(Path),
    rate=st.floats(allow_nan=False),
)
def test_dump_then_load_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps: int, name: str, folder: Path | None, rate: float
) -> None:
    written = Outer(steps, name, folder, (steps,), True, Inner(rate))
    path = tmp_path_factory.mktemp("config") / "resolved.toml"
    path.write_text(config.dumps(written), encoding="utf-8")
    assert config.load(Outer, path) == written
    assert config.fingerprint(config.load(Outer, path)) == config.fingerprint(written)


def test_fingerprint_sees_every_value() -> None:
    assert config.fingerprint(Outer(1)) != config.fingerprint(Outer(1, inner=Inner(0.25)))
