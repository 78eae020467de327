// The instruction roof of the scan: its arithmetic in registers, with nothing loaded or stored.

#include "vector.h"

using namespace zigflow;

namespace {

typedef Vec<float> F;
constexpr int STATES = 8;

// Per state: 2^(dt A), the recurrence h = decay h + drive B, the output y += C h.
float forward(int64_t tokens) {
  F h[STATES], rate[STATES], step = splat<float>(0.3f), drive = splat<float>(0.1f), y{};
  for (int n = 0; n < STATES; n++) h[n] = F{}, rate[n] = splat<float>(-0.1f * (n + 1));
  for (int64_t i = 0; i < tokens; i++) {
    F even{}, odd{};
    __asm__ volatile("" : : "r"(&step), "r"(&drive) : "memory");
#pragma GCC unroll 8
    for (int n = 0; n < STATES; n++) {
      h[n] = exp2(step * rate[n]) * h[n] + drive * 0.37f;
      (n % 2 ? odd : even) += h[n] * 0.21f;
    }
    y += even + odd;
  }
  return y[0];
}

// Per state: the decay and the state again, their two sums, and the seven products of the adjoint recurrence.
float backward(int64_t tokens) {
  constexpr int some = STATES / 2;
  F h[some], g[some], rate[some], grad_A[some];
  F step = splat<float>(0.3f), drive = splat<float>(0.1f), gy = splat<float>(0.2f), total{};
  for (int n = 0; n < some; n++) h[n] = g[n] = grad_A[n] = F{}, rate[n] = splat<float>(-0.1f * (n + 1));
  for (int64_t i = 0; i < tokens; i++) {
    F y{}, gdt{}, gdtu{}, sum_B{}, sum_C{};
    __asm__ volatile("" : : "r"(&step), "r"(&drive), "r"(&gy) : "memory");
#pragma GCC unroll 8
    for (int n = 0; n < some; n++) {
      const F decay = exp2(step * rate[n]), carried = decay * h[n];
      h[n] = carried + drive * 0.37f;
      sum_C += gy * h[n];
      y += h[n] * 0.21f;
      g[n] += gy * 0.21f;
      sum_B += drive * g[n];
      gdtu += g[n] * 0.37f;
      const F exponent = g[n] * carried;
      grad_A[n] += exponent * step;
      gdt += exponent * rate[n];
      g[n] *= decay;
    }
    total += y + gdt + gdtu + sum_B + sum_C;
  }
  for (int n = 0; n < some; n++) total += grad_A[n];
  return total[0];
}

}  // namespace

// Runs `tokens` tokens on each of `threads` threads; returns the states that one of them computed.
extern "C" int64_t zigflow_roof(int64_t parallel, int64_t threads, int64_t tokens, int64_t with_gradient) {
  volatile float sink = 0;
  parallel_for(reinterpret_cast<Parallel>(parallel), threads, threads,
               [&](int64_t, int64_t) { sink = with_gradient ? backward(tokens) : forward(tokens); });
  return tokens * Lanes<float>::count * (with_gradient ? STATES / 2 : STATES);
}
