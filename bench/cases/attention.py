"""Cases of attention: the whole video, a chunk against its cache, one frame against it, text."""

import torch
from torch import Tensor

from reelforge.bench.cases.case import MODELS, Case, Draw, Operands, Work
from reelforge.kernels.attention import attention, reference

HEAD_DIM = 128
SAMPLED_ROWS = 256
TEXT = 512
# Queries and keys. A chunk is three latent frames; its cache grows from itself to all 21.
SIZES = [(32760, 32760), (4680, 4680), (4680, 18720), (4680, 32760), (1560, 32760), (32760, TEXT), (4680, TEXT)]
LARGE_SIZES = [(32760, 32760), (4680, 32760), (4680, TEXT)]


def _case(model: str, queries: int, keys: int) -> Case:
    heads = MODELS[model][1]

    def inputs(draw: Draw) -> Operands:
        return tuple(draw(1, length, heads, HEAD_DIM) for length in (queries, keys, keys))

    scores = queries * keys * heads
    work = Work(bytes=2 * 2 * (queries + keys) * heads * HEAD_DIM, flops=4 * scores * HEAD_DIM, exponentials=scores)
    peers = {"aten cudnn": _cudnn, "aten flash": _flash}
    return Case(
        "attention", f"{model} {queries} x {keys}", inputs, attention, reference, work, peers=peers, exact=_exact
    )


def _exact(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Some rows of queries, spread over all, against every key."""
    q, k, v = (operand for operand in operands if operand is not None)
    rows = torch.linspace(0, q.shape[1] - 1, SAMPLED_ROWS, device=q.device).long()
    return outputs[0][:, rows], reference(q[:, rows].double(), k.double(), v.double())


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2)


CASES = [_case("1.3B", *size) for size in SIZES] + [_case("14B", *size) for size in LARGE_SIZES]
