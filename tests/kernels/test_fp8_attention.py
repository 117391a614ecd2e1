"""fp8 attention over pages: the kernel against the reference's rounding and against fp64, and both on hard rows."""

import math

import fp8_operands
import parity
import pytest
import torch
from fp8_operands import DIM, Operands, make, paged, plain, rel_l2
from torch import Tensor

from reelforge.kernels.errors import KernelError
from reelforge.kernels.fp8 import LARGEST, dequantise
from reelforge.kernels.fp8_attention import emulate, fp8_attention, fp8_attention_quantised, reference
from reelforge.kernels.fp8_attention_triton import forward

# bf16's rounding of the result is 2^-9 at most, 0.0017 in the mean square; the rest are values of p that fp32 and fp64
# see on either side of a tie.
SAME_ROUNDING = 0.0025
# p is rounded to three bits; with values that share a vector a few dozen keys average most of it away.
FP64 = 0.02


def run(operands: Operands) -> tuple[Tensor, Tensor]:
    with parity.triton("fp8_attention"):
        return fp8_attention(*operands.all())


def assert_right(operands: Operands, bound: float = FP64) -> Tensor:
    """Result of the kernel: the reference's in all its roundings, and near fp64 on the rounded operands."""
    out, lse = run(operands)
    assert out.dtype == torch.bfloat16 and out.is_contiguous() and out.isfinite().all()
    wide, wide_lse = emulate(*operands.wide())
    assert rel_l2(out, wide) < SAME_ROUNDING
    torch.testing.assert_close(lse.double(), wide_lse, rtol=1e-5, atol=1e-5)
    assert rel_l2(wide, fp8_operands.exact(operands)) < bound
    return out


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 127, 128, 129, 192, 255, 256])
def test_keys_around_a_tile(keys: int) -> None:
    assert_right(make([[keys]]), bound=0.03)


@pytest.mark.parametrize("queries", [1, 127, 128, 129])
def test_queries_around_a_tile(queries: int) -> None:
    assert_right(make([[100]], queries))


@pytest.mark.parametrize(
    "lengths",
    [
        [[256, 256, 70]],
        [[70, 256, 3]],
        [[130], [1], [256], [64]],
        [[256, 0, 40], [0, 0, 9]],
        [[0, 200], [200, 0]],
    ],
    ids=["full then tail", "short pages between", "ragged batch", "empty pages", "empty first"],
)
def test_pages(lengths: list[list[int]]) -> None:
    assert_right(make(lengths, heads=2))


def test_pages_are_no_more_than_where_keys_lie() -> None:
    """Full tiles in one page or in two: the same tiles in the same order, so the same bits."""
    q, k, v = plain(1, 5, 2, 512)
    k[..., 256:, :] *= k[..., :256, :].abs().amax() / k[..., 256:, :].abs().amax()
    whole, parts = paged(q, k, v, [[512]], 512), paged(q, k, v, [[256, 256]], 256)
    assert torch.equal(run(whole)[0], run(parts)[0])


def test_a_sample_that_sees_nothing_gets_zeros() -> None:
    out, lse = run(make([[100, 20], [0, 0]]))
    assert not out[1].any() and out[0].any() and (lse[1] == -math.inf).all()
    plain_out, _, plain_lse = reference(*make([[100, 20], [0, 0]]).all(), quantised=False)
    assert not plain_out[1].any() and (plain_lse[1] == -math.inf).all()


def test_log_of_the_sums_is_fp64s() -> None:
    operands = make([[200, 30]], heads=2)
    q = dequantise(operands.q.transpose(1, 2), operands.q_scale[..., None].double())[0]
    keys = []
    for page, length in zip(operands.table[0].tolist(), (200, 30), strict=True):
        scale = operands.key_scale[page].double().repeat_interleave(128, 1)[:, :length, None]
        keys.append(operands.keys[page, :, :length].double() * scale)
    lse = torch.logsumexp(q @ torch.cat(keys, 1).transpose(1, 2) / math.sqrt(DIM), -1)
    torch.testing.assert_close(run(operands)[1][0].double(), lse, rtol=1e-5, atol=1e-5)


# --- hard rows ---


def hard(case: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = plain(1, 9, 1, 300)
    if case == "peaked":
        q *= 4
    elif case == "uniform":
        k = k[..., :1, :].expand_as(k).contiguous()
    elif case == "one hot":
        k[..., 290, :] = q[..., 3, :] * 8
    elif case in ("rising", "falling"):
        q[..., 0] = 8
        k[..., 0] = torch.arange(300) / 24 * (1 if case == "rising" else -1)
    elif case == "outlier channels":
        k[..., :4] += 20
    elif case == "zero rows":
        q[..., ::2, :], k[..., ::3, :], v[..., 5] = 0, 0, 0
    return q, k, v


@pytest.mark.parametrize("case", ["peaked", "uniform", "one hot", "rising", "falling", "outlier channels", "zero rows"])
def test_hard_rows(case: str) -> None:
    assert_right(paged(*hard(case), [[256, 44]], 256), bound=0.04)


def test_equal_keys_average_the_values() -> None:
    operands = paged(*hard("uniform"), [[256, 44]], 256)
    mean = torch.cat([operands.values[page, 0, :, :n].double() for page, n in ((1, 256), (0, 44))], 1).mean(1)
    assert rel_l2(run(operands)[0][0, :, 0], (mean * operands.value_scale[0, 0]).expand(9, DIM)) < SAME_ROUNDING


def test_scores_as_large_as_scales_allow_do_not_overflow() -> None:
    q, k, v = plain(1, 5, 1, 130)
    out, lse = run(paged(q * 1e4, k * 1e3, v, [[130]], 256))
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("keys", [32760, 160000])
def test_many_keys(keys: int) -> None:
    """The reference alone: Triton's interpreter takes seconds for a thousand tiles."""
    operands = make([[keys]], queries=4, size=-(-keys // 128) * 128)
    wide, _ = emulate(*operands.wide())
    assert rel_l2(wide, fp8_operands.exact(operands)) < 0.002


# --- what a result does not depend on ---


def test_bytes_beyond_the_lengths_are_never_read_into_a_result() -> None:
    """They are NaN in :func:`make`; any other filling gives the same bits."""
    operands = make([[130, 70]])
    out, lse = run(operands)
    zeroed = operands.but(
        keys=torch.where(operands.keys.float().isnan(), 0, operands.keys.float()).to(operands.keys.dtype),
        values=torch.where(operands.values.float().isnan(), 0, operands.values.float()).to(operands.values.dtype),
    )
    again, lse_again = run(zeroed)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_lengths_are_read_when_the_kernel_runs() -> None:
    operands = make([[130, 70]])
    before, _ = run(operands)
    operands.lengths[0, 1] = 0
    fewer, _ = run(operands)
    assert not torch.equal(before, fewer)
    operands.lengths[0, 1] = 70
    assert torch.equal(before, run(operands)[0])


def test_a_sample_does_not_depend_on_the_batch() -> None:
    operands = make([[130, 70], [9, 256], [64, 0]], heads=2)
    whole, _ = run(operands)
    for i in range(3):
        one = operands.but(**{
            name: getattr(operands, name)[i : i + 1] for name in ("q", "q_scale", "value_scale", "table", "lengths")
        })  # fmt: skip
        assert torch.equal(whole[i : i + 1], run(one)[0])


# --- e4m3 results ---


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_quantised_output(implementation: str) -> None:
    operands = make([[130, 70], [9, 0]], queries=130, heads=2)
    with parity.triton("fp8_attention", implementation):
        out, scale, _ = fp8_attention_quantised(*operands.all())
    wide, _ = emulate(*operands.wide())
    assert scale.shape == (2, 130, 2) and scale.stride() == (130, 1, 260), "tokens contiguous, as a GEMM's 1 x 128"
    torch.testing.assert_close(scale.double(), wide.abs().amax(-1) / LARGEST, rtol=0.02, atol=0)
    assert rel_l2(dequantise(out, scale[..., None]), wide) < 0.03


def test_quantised_zeros_are_no_nan() -> None:
    with parity.triton("fp8_attention"):
        out, scale, _ = fp8_attention_quantised(*make([[0]]).all())
    assert not out.float().any() and (scale > 0).all()


# --- errors, registration ---


def test_the_custom_op_is_registered_right() -> None:
    operands = make([[70]], queries=3)
    for quantised in (False, True):
        # Its other checks compare e4m3 operands by torch.allclose, which torch has not for them.
        torch.library.opcheck(forward, (*operands.all(), quantised), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda x: x[..., :64]}, "got q .*64.*takes q"),
        ({"keys": lambda x: x[:, :, :200]}, "keys .*128 dividing T"),
        ({"q": lambda x: x.to(torch.bfloat16)}, "q is torch.bfloat16.*float8_e4m3fn"),
        ({"key_scale": lambda x: x[..., :1]}, r"key_scale is .*It must be contiguous torch.float32 \(1, 1, 2\)"),
        ({"values": lambda x: x.view(torch.uint8).transpose(2, 3).view(x.dtype)}, "values is"),
        ({"table": lambda x: x.long()}, "table is torch.int64"),
        ({"lengths": lambda x: x[:, :0]}, "lengths is"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    operands = make([[70]])
    changed = operands.but(**{name: made(getattr(operands, name)) for name, made in change.items()})
    with pytest.raises(KernelError, match=message):
        fp8_attention(*changed.all())
