"""Progress with time left; plain lines where there is no terminal."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reelforge.engine.core.settings import settings

T = TypeVar("T")
console = Console(stderr=True, highlight=False, no_color=settings().plain_output or None)
_PLAIN_INTERVAL_S = 10.0


def track(items: Iterable[T], label: str, total: int, done: int = 0) -> Iterator[T]:
    """Iterate with a progress line.

    Args:
        items: what is left to do.
        total: all steps, the finished ones included.
        done: steps that an earlier run finished.
    """
    if settings().rank != 0:
        yield from items
    elif console.is_terminal and not settings().plain_output:
        yield from _bar(items, label, total, done)
    else:
        yield from _lines(items, label, total, done)


def _bar(items: Iterable[T], label: str, total: int, done: int) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


def _lines(items: Iterable[T], label: str, total: int, done: int) -> Iterator[T]:
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _PLAIN_INTERVAL_S or done + count == total:
            left_s = (now - start) / count * (total - done - count)
            say(f"{label}: {done + count}/{total}, {left_s:.0f} s left")
            last = now


def say(message: str) -> None:
    """One line for the person at the terminal (stderr)."""
    if settings().rank == 0:
        console.print(message, soft_wrap=True, markup=False)  # brackets are tables of a recipe
