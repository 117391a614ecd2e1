// Normals from a key and a counter, bit for bit those of kernels/philox.py, where the transform is explained.
//
// Also plain C++: compiled on the host (with -ffp-contract=off) it lets a machine without a GPU compare the bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define REELFORGE_INLINE __host__ __device__ __forceinline__
#else
#define REELFORGE_INLINE inline
#endif

namespace reelforge {

// Rounded each by itself: nvcc contracts a * b + c into one rounding, but never these.
#ifdef __CUDA_ARCH__
REELFORGE_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
REELFORGE_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
REELFORGE_INLINE float root(float a) { return __fsqrt_rn(a); }
#else
REELFORGE_INLINE float mul(float a, float b) { return a * b; }
REELFORGE_INLINE float add(float a, float b) { return a + b; }
REELFORGE_INLINE float root(float a) { return std::sqrt(a); }
#endif

REELFORGE_INLINE uint32_t bits_of(float value) {
  uint32_t out;
  memcpy(&out, &value, sizeof(out));
  return out;
}

REELFORGE_INLINE float float_of(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

struct Words {
  uint32_t word[4];
};

// Philox4x32 with 10 rounds at counter (counter, 0, 0, 0).
REELFORGE_INLINE Words philox(uint64_t key, uint32_t counter) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ low;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ high;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <int N>
REELFORGE_INLINE float polynomial(float x, const float (&coefficient)[N]) {
  float sum = mul(x, coefficient[N - 1]);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = N - 2; i > 0; --i) sum = mul(add(sum, coefficient[i]), x);
  return add(sum, coefficient[0]);
}

// 31 random bits: negative values are complemented.
REELFORGE_INLINE uint32_t fold(uint32_t word) { return word ^ (0u - (word >> 31)); }

REELFORGE_INLINE float from_int(uint32_t bits) { return static_cast<float>(static_cast<int32_t>(bits)); }

// Two normals from two words.
REELFORGE_INLINE void box_muller(uint32_t first, uint32_t second, float& n0, float& n1) {
  const float log_coefficient[] = {-2.0f, 1.0000075101852417f, -0.6667107939720154f, 0.4993724226951599f,
                                   -0.397673100233078f, 0.3450748324394226f, -0.3269316256046295f, 0.20478114485740662f};
  const float cos_coefficient[] = {1.0f, -19.739208221435547f, 64.93928527832031f, -85.4503402709961f,
                                   60.07904052734375f, -24.538911819458008f};
  const float sin_coefficient[] = {6.283185005187988f, -41.341617584228516f, 81.59864807128906f, -76.49604034423828f,
                                   39.13390350341797f};
  float u = mul(from_int(fold(first)), 4.6566127342e-10f);
  u = u < 1.0e-7f ? 1.0e-7f : u;
  const uint32_t scaled = bits_of(u) - 0x3F3504F3u;
  const float f = add(float_of((scaled & 0x7FFFFFu) + 0x3F3504F3u), -1.0f);
  const float exponent = static_cast<float>(static_cast<int32_t>(scaled) >> 23);
  float r = root(add(mul(polynomial(f, log_coefficient), f), mul(exponent, -1.3862943649291992f)));
  const uint32_t folded = fold(second), remainder = folded << 2;
  r = float_of(bits_of(r) ^ ((remainder ^ (folded << 1)) & 0x80000000u));
  const float t = mul(from_int(remainder), 0x1p-33f), square = mul(t, t);
  n0 = mul(polynomial(square, cos_coefficient), r);
  n1 = mul(mul(polynomial(square, sin_coefficient), t), r);
}

struct Normals {
  float value[4];
};

// Elements 4 * counter up to 4 * counter + 3 of the draw under `key`.
REELFORGE_INLINE Normals normals(uint64_t key, uint32_t counter) {
  const Words words = philox(key, counter);
  Normals out;
  box_muller(words.word[0], words.word[1], out.value[0], out.value[1]);
  box_muller(words.word[2], words.word[3], out.value[2], out.value[3]);
  return out;
}

}  // namespace reelforge
