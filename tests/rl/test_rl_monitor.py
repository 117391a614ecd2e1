"""When a held-out score has fallen: against numbers made by hand."""

import numpy as np
import pytest
import torch

from reelforge.engine.core.errors import ConfigError
from reelforge.engine.rl.monitor import HeldOutConfig, _against, fallen, summary


def facts(kind: str, drift: float | None, error: float | None = 0.0) -> dict:
    return {"kind": kind, "mean": 1.0, "start": 1.0, "missing": 0.0, "drift": drift, "error": error}


def test_drift_is_paired_and_in_units_of_the_start():
    rng = np.random.default_rng(0)
    start = rng.normal(5, 2, 40)
    now = start - 1 + rng.normal(0, 0.1, 40)
    now[3], start[7] = np.nan, np.nan
    found = _against(torch.tensor(now), torch.tensor(start))
    both = np.isfinite(now) & np.isfinite(start)
    spread = np.nanstd(start)
    assert found["mean"] == pytest.approx(np.nanmean(now)) and found["start"] == pytest.approx(np.nanmean(start))
    assert found["drift"] == pytest.approx((now - start)[both].mean() / spread)
    assert found["error"] == pytest.approx((now - start)[both].std(ddof=1) / both.sum() ** 0.5 / spread)
    assert found["missing"] == 1 / 40
    assert found["error"] < 0.02 < np.nanstd(now) / 40**0.5 / spread  # pairing removes what clips differ in


def test_undefined_is_none():
    same = torch.full((4,), 2.0, dtype=torch.float64)
    assert _against(same + 1, same)["drift"] is None and _against(same + 1, same)["mean"] == 3
    nothing = torch.full((4,), torch.nan, dtype=torch.float64)
    gone = _against(nothing, torch.arange(4.0, dtype=torch.float64))
    assert gone == {"mean": None, "start": 1.5, "missing": 1.0, "drift": None, "error": None}
    assert _against(nothing, nothing)["start"] is None


@pytest.mark.parametrize(
    ("compared", "worst"),
    [
        ({"r": facts("reward", 0.4), "h": facts("held_out", -0.6)}, "h"),
        ({"r": facts("reward", 0.4), "h": facts("held_out", -0.4)}, None),  # not far enough
        ({"r": facts("reward", -0.1), "h": facts("held_out", -0.6)}, None),  # everything fell: no gaming
        ({"r": facts("reward", 0.4), "h": facts("held_out", -0.6, 0.06)}, None),  # within two standard errors
        ({"r": facts("reward", 0.4), "h": facts("held_out", -0.6, 0.04)}, "h"),
        ({"r": facts("reward", 0.4), "p": facts("picture", -9.0)}, None),  # statistics have no direction
        ({"r": facts("reward", 0.4), "s": facts("reward", -0.6), "h": facts("held_out", -9.0)}, None),
        ({"r": facts("reward", 0.6), "s": facts("reward", -0.4), "h": facts("held_out", -9.0)}, "h"),
        ({"r": facts("reward", 0.4), "h": facts("held_out", -0.6), "g": facts("held_out", -0.9)}, "g"),
        ({"r": facts("reward", 0.4), "h": facts("held_out", None, None)}, None),
        ({"r": facts("reward", None, None), "h": facts("held_out", -0.6)}, None),
        ({}, None),
    ],
)
def test_the_rule(compared, worst):
    assert fallen(compared, 0.5) == worst


def test_the_line_names_scorers_and_what_the_picture_does():
    compared = {
        "r": facts("reward", 0.1, 0.05),
        "dull": facts("picture", 0.2),
        "loud": facts("picture", -2.0, 0.1),
        "new": facts("picture", None, None) | {"mean": 0.25, "start": 0.0},
        "never": facts("picture", None, None),
        "gone": facts("held_out", None, None) | {"mean": None},
    }
    assert summary(compared) == "r +0.10 +- 0.10, loud -2.00 +- 0.20, new 0 -> 0.25, gone has no score"


def test_settings_are_checked(tmp_path):
    for changes in ({"samples": 0}, {"max_fall": 0.0}, {"previews": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            HeldOutConfig(tmp_path, **changes)
