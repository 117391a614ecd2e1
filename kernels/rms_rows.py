"""RMSNorm of a row in a Triton kernel, with or without a rotation of its interleaved pairs, and its gradients.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and the output n * weight, rotated or not, let u be the gradient of the
output turned back by the rotation. Then

    dweight = sum over tokens of u n;  dx = r (u weight - n mean(u weight n))
"""

import triton
import triton.language as tl

from reelforge.kernels.tiling import STAGES, cast_row, load_row, store_row, sum_row, wide_row, zero_row


@triton.jit
def norm_tokens(
    x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps, first, end,
    E: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Norm the tokens from ``first`` to ``end`` of one sample and rotate them by its angles; D = 0 rotates nothing."""
    weight = wide_row(load_row(weight_ptr, E, W))
    for token in tl.range(first, end, num_stages=STAGES):
        normed, _ = _rms_norm(wide_row(load_row(x_ptr + token * x_row, E, W)), eps, E)
        out = _multiply(normed, weight)
        if D > 0:
            if ROUND:
                out = wide_row(cast_row(out, x_ptr.dtype.element_ty))
            cos, sin = _load_angles(cos_ptr, token, E, D, W), _load_angles(sin_ptr, token, E, D, W)
            out = _rotate(out, cos, sin, 1.0, W)
        store_row(out_ptr + token * E, out, E, W)


@triton.jit
def norm_tokens_backward(
    x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, dout_ptr, dx_ptr, dweight_ptr, eps, first, end,
    E: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradients at those tokens, and at ``dweight_ptr`` the sum over them."""
    weight = wide_row(load_row(weight_ptr, E, W))
    dweight = zero_row(E, W)
    for token in tl.range(first, end, num_stages=STAGES):
        x = wide_row(load_row(x_ptr + token * x_row, E, W))
        du = wide_row(load_row(dout_ptr + token * E, E, W))
        if D > 0:
            cos, sin = _load_angles(cos_ptr, token, E, D, W), _load_angles(sin_ptr, token, E, D, W)
            du = _rotate(du, cos, sin, -1.0, W)
        normed, scale = _rms_norm(x, eps, E)
        dx, dweight = _rms_norm_backward(normed, scale, weight, du, dweight, E)
        store_row(dx_ptr + token * E, dx, E, W)
    store_row(dweight_ptr, dweight, E, W)


@triton.jit
def _rms_norm(x, eps, E: tl.constexpr):
    """The normed row and 1 / root mean square."""
    scale = 1.0 / tl.sqrt(sum_row(_multiply(x, x)) / E + eps)
    normed = ()
    for i in tl.static_range(len(x)):
        normed = normed + (x[i] * scale,)
    return normed, scale


@triton.jit
def _rms_norm_backward(normed, scale, weight, du, dweight, E: tl.constexpr):
    dn = _multiply(du, weight)
    mean = sum_row(_multiply(dn, normed)) / E
    dx, new_dweight = (), ()
    for i in tl.static_range(len(du)):
        dx = dx + ((dn[i] - normed[i] * mean) * scale,)
        new_dweight = new_dweight + (dweight[i] + du[i] * normed[i],)
    return dx, new_dweight


@triton.jit
def _multiply(row, factors):
    product = ()
    for i in tl.static_range(len(row)):
        product = product + (row[i] * factors[i],)
    return product


@triton.jit
def _load_angles(ptr, token, E: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """A token's cosines or sines for the pairs of each chunk, once for all chunks where they hold whole heads."""
    pair = tl.arange(0, W // 2)
    angles = ()
    for i in tl.static_range(1 if W % D == 0 else (E + W - 1) // W):
        column = (i * (W // 2) + pair) % (D // 2)
        angles = angles + (tl.load(ptr + token * (D // 2) + column).to(tl.float32),)
    return angles


@triton.jit
def _rotate(row, cos, sin, direction: tl.constexpr, W: tl.constexpr):
    """The pairs ``(2i, 2i + 1)`` turned by their angles, or back."""
    turned = ()
    for i in tl.static_range(len(row)):
        c, s = cos[i % len(cos)], sin[i % len(cos)] * direction
        even, odd = tl.split(tl.reshape(row[i], (W // 2, 2)))
        turned = turned + (tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (W,)),)
    return turned
