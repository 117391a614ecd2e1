// One step of P states to the members of their groups: kernels/sde_step.py `fork`, the same bits.
//
// A thread owns four elements, one Philox counter: it reads a state and its velocity once, then writes one next state
// for each member. With float4 accesses where every row is 16-byte aligned, element by element elsewhere.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sde_formula.cuh"

#define REELFORGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kThreads = 256;

struct Fork {
  const float* x;
  const void* velocity;
  const void* v_uncond;    // null: no guidance
  const float *a, *b, *std;
  const int64_t* keys;     // null: the mean
  const int32_t* offsets;  // null: one member a state
  float* out;
  float* guided;           // null: not kept
  float guidance_scale;
  int64_t count;
  int members;
};

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

template <bool kVector, typename T>
__device__ __forceinline__ void load(const T* from, int valid, float (&to)[4]) {
  if constexpr (kVector) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = widen(quad.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < valid ? widen(from[i]) : 0.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void store(float* to, int valid, const float (&from)[4]) {
  if constexpr (kVector) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid) to[i] = from[i];
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) fork_kernel(const Fork op) {
  const int64_t counter = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, element = 4 * counter;
  if (element >= op.count) return;
  const int valid = static_cast<int>(op.count - element < 4 ? op.count - element : 4);
  const int group = blockIdx.y;
  const int64_t at = group * op.count + element;
  float x[4], v[4], mean[4];
  load<kVector>(op.x + at, valid, x);
  load<kVector>(static_cast<const T*>(op.velocity) + at, valid, v);
  if (op.v_uncond != nullptr) {
    float u[4];
    load<kVector>(static_cast<const T*>(op.v_uncond) + at, valid, u);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = reelforge::guide(u[i], v[i], op.guidance_scale);
    if (op.guided != nullptr) store<kVector>(op.guided + at, valid, v);
  }
  const float a = op.a[group], b = op.b[group], std = op.std[group];
#pragma unroll
  for (int i = 0; i < 4; ++i) mean[i] = reelforge::step_mean(a, x[i], b, v[i]);
  if (op.keys == nullptr) {
    store<kVector>(op.out + at, valid, mean);
    return;
  }
  const int first = op.offsets != nullptr ? max(op.offsets[group], 0) : group;
  const int end = op.offsets != nullptr ? min(op.offsets[group + 1], op.members) : group + 1;
  for (int member = first; member < end; ++member) {
    float next[4] = {mean[0], mean[1], mean[2], mean[3]};
    if (std != 0.0f) {
      const reelforge::Normals z = reelforge::normals(op.keys[member], static_cast<uint32_t>(counter));
#pragma unroll
      for (int i = 0; i < 4; ++i) next[i] = reelforge::step(mean[i], std, z.value[i]);
    }
    store<kVector>(op.out + member * op.count + element, valid, next);
  }
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T>
cudaError_t launch(const Fork& op, int groups, cudaStream_t stream) {
  if (!aligned(op.velocity, sizeof(T)) || !aligned(op.v_uncond, sizeof(T))) return cudaErrorMisalignedAddress;
  const bool vector = op.count % 4 == 0 && aligned(op.x, 16) && aligned(op.out, 16) && aligned(op.guided, 16) &&
                      aligned(op.velocity, 4 * sizeof(T)) && aligned(op.v_uncond, 4 * sizeof(T));
  const int64_t quads = (op.count + 3) / 4;
  const dim3 grid(static_cast<unsigned>((quads + kThreads - 1) / kThreads), groups);
  if (vector) {
    fork_kernel<T, true><<<grid, kThreads, 0, stream>>>(op);
  } else {
    fork_kernel<T, false><<<grid, kThreads, 0, stream>>>(op);
  }
  return cudaGetLastError();
}

}  // namespace

// velocity_dtype: 0 float32, 1 bfloat16, 2 float16, of the velocity and of v_uncond. Returns a cudaError_t.
REELFORGE_EXPORT int reelforge_sde_fork(const float* x, const void* velocity, const void* v_uncond, const float* a,
                                        const float* b, const float* std, const int64_t* keys, const int32_t* offsets,
                                        float* out, float* guided, float guidance_scale, int64_t count, int groups,
                                        int members, int velocity_dtype, cudaStream_t stream) {
  const Fork op{x, velocity, v_uncond, a, b, std, keys, offsets, out, guided, guidance_scale, count, members};
  if (count < 0 || count > INT32_MAX || groups < 0 || groups > 65535 || members < 0) return cudaErrorInvalidValue;
  if (count == 0 || groups == 0) return cudaSuccess;
  switch (velocity_dtype) {
    case 0: return launch<float>(op, groups, stream);
    case 1: return launch<__nv_bfloat16>(op, groups, stream);
    case 2: return launch<__half>(op, groups, stream);
  }
  return cudaErrorInvalidValue;
}
