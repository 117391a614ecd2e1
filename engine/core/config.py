"""Strict configuration: frozen dataclasses filled from TOML.

A recipe, or a table in it, may start with ``extends = "other.toml"`` (relative to itself). ``--set a.b=value``
overrides one key, its value written as TOML (a bare word is a string). An unknown key is an error that names the
nearest right one.
"""

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from reelforge.engine.core.errors import ConfigError

T = TypeVar("T")  # a frozen dataclass
_MAX_EXTENDS = 8


def load(cls: type[T], path: Path | str, overrides: Sequence[str] = (), overlays: Sequence[Path] = ()) -> T:
    """Read a recipe into ``cls``.

    Args:
        cls: a frozen dataclass; nested dataclasses are tables.
        path: a TOML file.
        overrides: ``a.b=value`` strings, applied last.
        overlays: further files whose keys replace the recipe's.

    Raises:
        ConfigError: unreadable file, unknown key, missing key or wrong type.
    """
    table = read_table(Path(path))
    for overlay in overlays:
        table = merge(table, read_table(overlay))
    for assignment in overrides:
        override(table, assignment)
    return build(cls, table)


def read_table(path: Path, depth: int = 0) -> dict[str, Any]:
    """The recipe's table with every ``extends`` merged in."""
    if depth > _MAX_EXTENDS:
        raise ConfigError(f"{path} extends a chain of more than {_MAX_EXTENDS} recipes.", "Break the cycle.")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read ({error.strerror}).", "Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Recipe {path} is not TOML: {error}.", "Fix that line.") from error
    return _extended(table, path.parent, depth)


def _extended(table: dict[str, Any], folder: Path, depth: int) -> dict[str, Any]:
    base = table.pop("extends", None)
    table = {
        name: _extended(value, folder, depth) if isinstance(value, dict) else value for name, value in table.items()
    }
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(f"extends is {base!r} in a recipe of {folder}.", "It must be a file's name.")
    return merge(read_table(folder / base, depth + 1), table)


def merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``top``'s keys laid over it, table by table."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def override(table: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=value`` to ``table`` in place.

    Raises:
        ConfigError: no ``=``, or ``a`` is a value.
    """
    dotted, equals, text = assignment.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {assignment!r} has no '='.", "Write --set table.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = dotted.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment!r}: {parent!r} is a value, not a table.", "Check the dotted key.")
    table[leaf] = value


def build(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Fill dataclass ``cls`` from ``table``; ``where`` is the dotted prefix used in messages."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    for name in table:
        if name not in fields:
            raise ConfigError(f"Unknown key {where + name!r}.", nearest(name, fields))
    values = {name: _convert(hints[name], value, where + name) for name, value in table.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in values or not no_default:
            continue
        if dataclasses.is_dataclass(hints[name]):
            values[name] = build(cast(Any, hints[name]), {}, f"{where}{name}.")
        else:
            raise ConfigError(f"Key {where + name!r} is missing.", f"Set it ({_type_name(hints[name])}).")
    return cls(**values)


def require_positive(config: Any, *names: str) -> None:
    """For ``__post_init__``: refuse a field that is not above 0.

    Raises:
        ConfigError: names the field.
    """
    for name in names:
        if not vars(config)[name] > 0:
            raise ConfigError(f"{name} is {vars(config)[name]}.", "It must be above 0.")


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """A hint that names the closest allowed word, or all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Allowed: {', '.join(names)}."


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"Key {where!r} is {value!r}.", "It is a table: write [" + where + "].")
        return build(cast(Any, hint), value, where + ".")
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"Key {where!r} is {value!r}.", nearest(str(value), map(str, args)))
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"Key {where!r} is {value!r}.", "It must be a table.")
        return {name: _convert(args[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if type(value) is not hint:
        raise ConfigError(f"Key {where!r} is {value!r}.", f"It must be {_type_name(hint)}.")
    return value


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"Key {where!r} is {value!r}.", "It must be a list.")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"Key {where!r} has {len(value)} values.", f"It needs {len(args)}.")
    return tuple(_convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)


def to_table(config: Any) -> dict[str, Any]:
    """The config as plain TOML types; ``None`` becomes ``"none"``."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None:
            return "none"
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def dumps(config: Any) -> str:
    """The resolved config as TOML; :func:`load` reads it back equal."""
    import tomli_w  # not on every machine that only measures

    return tomli_w.dumps(to_table(config))


def fingerprint(config: Any) -> str:
    """sha256 of the config's canonical JSON, 16 hex digits."""
    canonical = json.dumps(to_table(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
