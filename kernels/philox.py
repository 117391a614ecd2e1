"""Counter-based normal noise, bit for bit the same on every device: Philox4x32-10, then Box-Muller.

Element i of a draw is word i % 4 of Philox (Salmon et al. 2011) at counter i // 4 under the draw's 64-bit key; words
(0, 1) and (2, 3) make pairs of normals, n0 = r cos(angle), n1 = r sin(angle), r = sqrt(-2 ln u). Layout and uniforms
are those of ``triton.language.randn4x``, but log, cos and sin here are polynomials in fp32 additions,
multiplications and square roots alone, each correctly rounded by IEEE 754 and none contracted. A library's functions
differ in the last bit between a CPU, a GPU and Triton; these agree, and are within 1e-6 of the exact value.

    ln u = exponent ln 2 + f Q(f), f = mantissa - 1 in [sqrt(1/2) - 1, sqrt(2) - 1)
    angle = (half turns + t) pi with t in [-1/2, 1/2), reduced exactly on the integer bits: half turns flip r's sign

``csrc/philox_normal.cuh`` is the same in CUDA C++. No compiler may fuse a multiplication with an addition here: run
the reference eagerly, and launch kernels that draw with ``enable_fp_fusion=False``.
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelforge.kernels import dispatch
from reelforge.kernels.custom_op import kernel_op
from reelforge.kernels.errors import KernelError

MAX_COUNT = 2**30
MAX_DRAWS = 65535  # rows of a launch: CUDA's limit of the grid's second axis
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_UNIT = tl.constexpr(4.6566127342e-10)  # 31 random bits to [0, 1)
_SMALLEST = tl.constexpr(1.0e-7)  # what u is clamped to before the logarithm
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_MANTISSA = tl.constexpr(0x7FFFFF)
_QUARTER_TURNS = tl.constexpr(2.0**-33)
_MINUS_2_LN_2 = tl.constexpr(-1.3862943649291992)
# Minimax in the radius, sin and cos; coefficients rounded to fp32 one after the other, the rest fitted again.
_LOG = tl.constexpr((
    -2.0, 1.0000075101852417, -0.6667107939720154, 0.4993724226951599,
    -0.397673100233078, 0.3450748324394226, -0.3269316256046295, 0.20478114485740662,
))  # fmt: skip
_COS = tl.constexpr((
    1.0, -19.739208221435547, 64.93928527832031, -85.4503402709961, 60.07904052734375, -24.538911819458008,
))  # fmt: skip
_SIN = tl.constexpr((6.283185005187988, -41.341617584228516, 81.59864807128906, -76.49604034423828, 39.13390350341797))
BLOCK, WARPS = 1024, 8  # one counter, four elements, a thread: wider tiles would exchange noise through shared memory


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal noise, one independent draw a key.

    Args:
        keys: int64 ``[R]``, on the device that gets the noise.
        count: elements of one draw.

    Returns:
        float32 ``[R, count]``; row r depends on ``keys[r]`` alone, and a longer draw continues a shorter one.

    Raises:
        KernelError: keys of another type or shape, or a count above :data:`MAX_COUNT`.
    """
    check_keys("philox", keys, count)
    if dispatch.choose("philox", dispatch.Query(keys.device.type, torch.float32)) == dispatch.REFERENCE:
        return reference(keys, count)
    return _op(keys, count)


def check_keys(op: str, keys: Tensor, count: int) -> None:
    """At most :data:`MAX_DRAWS` keys, int64 ``[R]``, contiguous, for draws of at most :data:`MAX_COUNT` elements.

    Raises:
        KernelError: they are anything else.
    """
    if keys.dtype != torch.int64 or keys.ndim != 1 or not keys.is_contiguous():
        raise KernelError(f"{op}: keys are {keys.dtype} {tuple(keys.shape)}.", "They must be contiguous int64 [R].")
    if len(keys) > MAX_DRAWS:
        raise KernelError(f"{op} got {len(keys)} keys.", f"A launch takes at most {MAX_DRAWS}.")
    if count > MAX_COUNT:
        raise KernelError(f"{op}: a draw has {count} elements.", f"A counter numbers at most {MAX_COUNT}.")


# -- the reference --------------------------------------------------------------------------------------------------


def reference(keys: Tensor, count: int) -> Tensor:
    """The definition in torch, on any device."""
    w0, w1, w2, w3 = words(keys, count)
    (n0, n2), (n1, n3) = _turn(_radius(torch.stack((w0, w2))), torch.stack((w1, w3)))
    return torch.stack((n0, n1, n2, n3), dim=-1).flatten(1)[:, :count]


def uniform(bits: Tensor) -> Tensor:
    """Random int32 bits to float32 in [0, 1)."""
    return _fold(bits).to(torch.float32).mul_(_UNIT.value)


def words(keys: Tensor, count: int) -> tuple[Tensor, ...]:
    """The four words of counters 0 up to ``(count + 3) // 4``: int32 ``[R, (count + 3) // 4]`` each."""
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=keys.device)[None]
    zero = torch.zeros_like(counters)
    out = philox((counters, zero, zero, zero), keys[:, None] & _MASK32, (keys[:, None] >> 32) & _MASK32)
    return tuple(word.to(torch.int32) for word in out)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key_lo: Tensor, key_hi: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds on int64 tensors that hold unsigned 32-bit values."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # A 32x32 product wraps in int64 but keeps its 64 bits; what stands above bit 31 is masked off before use.
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = ((product_b >> 32) ^ c1 ^ key_lo) & _MASK32
        c2 = ((product_a >> 32) ^ c3 ^ key_hi) & _MASK32
        c1, c3 = product_b, product_a
        key_lo, key_hi = (key_lo + _WEYL_A) & _MASK32, (key_hi + _WEYL_B) & _MASK32
    return c0, c1 & _MASK32, c2, c3 & _MASK32


def _fold(bits: Tensor) -> Tensor:
    """31 random bits: negative values are complemented."""
    return bits ^ (bits >> 31)


def _radius(bits: Tensor) -> Tensor:
    """sqrt(-2 ln u) of the uniforms that ``bits`` make."""
    u = uniform(bits).clamp_min_(_SMALLEST.value)
    scaled = u.view(torch.int32) - _SQRT_HALF_BITS.value
    f = (scaled & _MANTISSA.value).add_(_SQRT_HALF_BITS.value).view(torch.float32).sub_(1.0)
    exponent = (scaled >> 23).to(torch.float32)
    square = _horner(f, _LOG.value).mul_(f).add_(exponent.mul_(_MINUS_2_LN_2.value))
    # torch's fp32 root on a CPU is MKL's, an ulp off in one case of seven; through fp64 it is the rounded one.
    return square.double().sqrt_().float()


def _turn(r: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """r cos and r sin of the angle that ``bits`` make."""
    folded = _fold(bits)
    remainder = folded << 2  # wraps: the half turns leave, and bit 29 becomes the sign
    t = remainder.to(torch.float32).mul_(_QUARTER_TURNS.value)
    odd = (remainder ^ (folded << 1)) & -(2**31)
    r = (r.view(torch.int32) ^ odd).view(torch.float32)
    square = t * t
    return _horner(square, _COS.value).mul_(r), _horner(square, _SIN.value).mul_(t).mul_(r)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial, every multiplication and addition a kernel of its own: ``addcmul`` may fuse them."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])


# -- the kernel -----------------------------------------------------------------------------------------------------


@triton.jit
def _polynomial(x, C: tl.constexpr, N: tl.constexpr):
    value = x * C[N - 1]
    for i in tl.static_range(N - 2):
        value = (value + C[N - 2 - i]) * x
    return value + C[0]


@triton.jit
def _fold_words(word):
    bits = word.to(tl.int32, bitcast=True)
    return bits ^ (bits >> 31)


@triton.jit
def _box_muller(first, second):
    """Two normals from two words; see the module."""
    u = tl.maximum(_fold_words(first).to(tl.float32) * _UNIT, _SMALLEST)
    scaled = u.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    f = ((scaled & _MANTISSA) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    r = tl.sqrt_rn(_polynomial(f, _LOG, 8) * f + (scaled >> 23).to(tl.float32) * _MINUS_2_LN_2)
    folded = _fold_words(second)
    remainder = folded << 2
    odd = (remainder ^ (folded << 1)) & -2147483648
    r = (r.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    t = remainder.to(tl.float32) * _QUARTER_TURNS
    square = t * t
    return _polynomial(square, _COS, 6) * r, _polynomial(square, _SIN, 5) * t * r


@triton.jit
def normals(key, tile, BLOCK: tl.constexpr):
    """Elements ``tile * BLOCK`` up to ``(tile + 1) * BLOCK`` of the draw under ``key``; BLOCK is divisible by 4."""
    counter = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(key, counter, zero, zero, zero)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _kernel(keys_ptr, out_ptr, count, BLOCK: tl.constexpr):
    tile, row = tl.program_id(0), tl.program_id(1)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    values = normals(tl.load(keys_ptr + row), tile, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * count + element, values, element < count)


@kernel_op("philox_normal", fake=lambda keys, count: keys.new_empty(len(keys), count, dtype=torch.float32))
def _op(keys: Tensor, count: int) -> Tensor:
    out = keys.new_empty(len(keys), count, dtype=torch.float32)
    grid = (triton.cdiv(count, BLOCK), len(keys))
    _kernel[grid](keys, out, count, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return out


dispatch.register("philox", "triton", dispatch.needs_triton(torch.float32), sys.modules[__name__])
