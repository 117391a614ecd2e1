"""What each way to run attention in e4m3 costs: ours stays near its floor, and two known faults are seen to fail."""

import pytest
import torch

from reelforge.bench.fp8_schemes import SCHEMES, attend, error, exact, floor, inputs
from reelforge.kernels.fp8 import quantise, round_e4m3, scale_of
from reelforge.kernels.fp8_attention import emulate

QUERIES = 16


@pytest.mark.parametrize("scheme", ["ours", "block", "key_token", "hadamard"])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_two_levels_stay_near_what_the_operands_allow(scheme: str, outliers: bool, spread: float) -> None:
    given = inputs("", 32760, spread, outliers, QUERIES)
    assert error(SCHEMES[scheme], given) <= 1.2 * floor(SCHEMES[scheme], given)


def test_one_level_of_accumulation_fails_and_worse_with_more_keys() -> None:
    few, many = (inputs("", keys, queries=QUERIES) for keys in (4680, 32760))
    assert error(SCHEMES["one_level"], few) > 5 * floor(SCHEMES["one_level"], few)
    assert error(SCHEMES["one_level"], many) > 20 * floor(SCHEMES["one_level"], many)
    assert error(SCHEMES["one_level"], many) > 2 * error(SCHEMES["one_level"], few)


def test_a_stale_maximum_fails_with_an_offset_of_8_and_not_with_4() -> None:
    given = inputs("", 32760, 3.0, True, QUERIES)
    assert error(SCHEMES["stale"], given) > 4 * floor(SCHEMES["stale"], given)
    assert error(SCHEMES["stale_offset_4"], given) < 1.2 * floor(SCHEMES["stale_offset_4"], given)


def test_the_mean_of_the_keys_matters_where_they_share_a_vector() -> None:
    given = inputs("", 32760, 3.0, True, QUERIES)
    assert error(SCHEMES["ours"], given) < 0.8 * error(SCHEMES["block"], given)
    assert error(SCHEMES["block"], given) < error(SCHEMES["tensor"], given)


def test_the_floor_and_the_exact_result_are_softmax() -> None:
    given = inputs("", 200, queries=QUERIES)
    scores = given.q @ given.k.T / 128**0.5
    weights = (scores - scores.logsumexp(1, keepdim=True)).exp()
    torch.testing.assert_close(exact(given), weights @ given.v)
    assert floor(SCHEMES["bf16"], given) < 0.1 * floor(SCHEMES["ours"], given)


def test_ours_is_what_the_kernel_computes() -> None:
    """The table's row against the kernel's reference on the same operands; the tensor core's bits are the rest."""
    given = inputs("", 640, queries=QUERIES)
    q8, q_scale = quantise(given.q.float())
    k = given.k.float() - given.k.float().mean(0)
    k8, k_scale = quantise(k.reshape(5, -1))
    v = given.v.float()
    value_scale = scale_of(v.abs().amax(0))
    out, _ = emulate(
        q8[None, :, None], q_scale.T[None], k8.view(1, 1, 640, 128), k_scale.T[None],
        round_e4m3((v / value_scale).T).contiguous()[None, None], value_scale[None, None],
        torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 640, dtype=torch.int32),
    )  # fmt: skip
    found = attend(SCHEMES["ours"], given)
    assert (found - out[0, :, 0]).norm() / found.norm() < 5e-4
