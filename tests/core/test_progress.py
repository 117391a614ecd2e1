"""What a person at the terminal reads."""

import pytest

from reelforge.engine.core.progress import say, track


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("without [held_out] a reward that is gamed goes unnoticed; see [/tmp]")
    assert capsys.readouterr().err == "without [held_out] a reward that is gamed goes unnoticed; see [/tmp]\n"


def test_the_last_line_of_a_plain_progress_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "part [1]", total=5, done=2)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "part [1]: 5/5, 0 s left\n"
