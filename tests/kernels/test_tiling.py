"""How tokens are shared out among programs, and the fixed-order sum of what they write."""

import parity
import pytest
import torch

from reelforge.kernels import tiling


@pytest.mark.parametrize(("width", "warps"), [(96, 1), (1536, 2), (3072, 4), (5120, 4)])
def test_wans_widths_fill_their_chunks(width: int, warps: int) -> None:
    walk = tiling.plan("op", torch.empty(1, 8, width, device="meta"))
    assert (walk.chunk, walk.warps) == (256 * warps, warps)
    assert width % walk.chunk == 0 or width < walk.chunk


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (33, 1), (32760, 1), (32760, 21), (32760, 32760), (75601, 1)])
def test_programs_cover_a_row_whatever_the_batch(tokens: int, rows: int, backward: bool) -> None:
    one, many = (
        tiling.plan("op", torch.empty(batch, tokens, 96, device="meta"), rows, backward=backward) for batch in (1, 7)
    )
    assert one == many
    assert (one.parts - 1) * one.steps < one.tokens <= one.parts * one.steps and one.tokens * rows == tokens


@pytest.mark.parametrize("count", [1, 64, 130])
def test_terms_are_summed_the_same_in_any_company(count: int) -> None:
    terms = parity.randn(0, 3, 2, count, 37)
    total = tiling.sum_terms(terms)
    parity.assert_close(total, terms.double().sum(2), torch.float32)
    assert torch.equal(tiling.sum_terms(terms[1:2].contiguous()), total[1:2])
