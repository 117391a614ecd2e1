// The step of kernels/sde_step.py, operation by operation; plain C++ too, like philox_normal.cuh.

#pragma once

#include "philox_normal.cuh"

namespace reelforge {

// v_uncond + w (v_cond - v_uncond)
REELFORGE_INLINE float guide(float v_uncond, float v_cond, float w) {
  return add(v_uncond, mul(w, add(v_cond, -v_uncond)));
}

// a x + b v
REELFORGE_INLINE float step_mean(float a, float x, float b, float v) { return add(mul(a, x), mul(b, v)); }

// mean + std z; the ODE's std = 0 leaves the mean as it is
REELFORGE_INLINE float step(float mean, float std, float z) { return std == 0.0f ? mean : add(mean, mul(std, z)); }

}  // namespace reelforge
