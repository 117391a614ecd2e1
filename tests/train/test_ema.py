"""The weight average against its recurrence in numpy."""

import numpy as np
import torch

from reelforge.engine.core import rng
from reelforge.engine.train.ema import Ema

YES, NO = torch.tensor(True), torch.tensor(False)


def live() -> dict[str, torch.Tensor]:
    return {f"w{i}": rng.normal([i], (3, i + 1))[0] for i in range(34)}


def test_follows_the_recurrence_with_warm_up():
    weights = live()
    ema = Ema(weights, 0.6)
    expected = {name: w.double().numpy().copy() for name, w in weights.items()}
    for n in range(30):
        for i, w in enumerate(weights.values()):
            w += rng.normal([1000 + 100 * n + i], w.shape)[0]
        ema.update(YES)
        decay = min(0.6, (1 + n) / (10 + n))
        for name, w in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * w.double().numpy()
    assert ema.updates == 30
    for name in weights:
        np.testing.assert_allclose(ema.shadow[name].numpy(), expected[name], rtol=0, atol=1e-5)


def test_a_bad_step_changes_no_bit():
    weights = live()
    ema = Ema(weights, 0.99)
    weights["w3"] += 1.0
    ema.update(YES)
    before = {name: t.clone() for name, t in ema.shadow.items()}
    weights["w3"] += 1.0
    ema.update(NO)
    assert ema.updates == 1 and all(torch.equal(before[name], t) for name, t in ema.shadow.items())


def test_applied_swaps_and_restores():
    parameter = torch.nn.Parameter(torch.ones(3))
    ema = Ema({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter += 1.0
    pointer = parameter.data_ptr()
    with ema.applied():
        assert parameter.tolist() == [1.0, 1.0, 1.0] and ema.shadow["w"].tolist() == [2.0, 2.0, 2.0]
    assert parameter.tolist() == [2.0, 2.0, 2.0] and parameter.data_ptr() == pointer
