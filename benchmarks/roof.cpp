// The instruction roof of the scan at 16 states: its arithmetic in registers, with nothing of a tensor loaded or stored.
// First what belongs to a state, then what belongs to a token and a channel alone (softplus of the step, gate, their
// gradients): apart, as the kernel has them, so that neither waits for the other.

#include "vector.h"

using namespace zigflow;

namespace {

typedef Vec<float> F;
constexpr int STATES = 16, FORWARD = 8, BACKWARD = 4;

// Values that the compiler knows nothing about, so that nothing is computed ahead.
struct Inputs {
  F step = splat<float>(0.3f), drive = splat<float>(0.1f), gy = splat<float>(0.2f), raw = splat<float>(-2.0f),
    u = splat<float>(0.5f), z = splat<float>(0.7f);
  INLINE void change() { __asm__ volatile("" : : "r"(this) : "memory"); }
};

INLINE float coefficient(int n) { return 0.21f + 0.02f * float(n); }

// Per state: 2^(dt A), the recurrence h = decay h + drive B, the output y += C h.
float forward(int64_t tokens) {
  Inputs in;
  F h[FORWARD], rate[FORWARD], total{};
  for (int n = 0; n < FORWARD; n++) h[n] = F{}, rate[n] = splat<float>(-0.1f * (n + 1));
  for (int64_t i = 0; i < tokens * (STATES / FORWARD); i++) {
    F even{}, odd{};
    in.change();
#pragma GCC unroll 8
    for (int n = 0; n < FORWARD; n++) {
      h[n] = exp2(in.step * rate[n]) * h[n] + in.drive * coefficient(n);
      (n % 2 ? odd : even) += h[n] * coefficient(n + 1);
    }
    total += even + odd;
  }
  for (int64_t i = 0; i < tokens; i++) {
    in.change();
    const F step = softplus<float>(in.raw + in.gy, nullptr);
    total += step + step * in.u + (in.u * in.gy + in.step) * in.z / (exp<float>(-in.z) + 1.0f);
  }
  return total[0];
}

// Per state: the decay and the state again, the sums of C's gradient and of the output, and the seven products of the
// adjoint recurrence. Per token: step and gate again, their slopes, and the gradients made of them.
float backward(int64_t tokens) {
  Inputs in;
  F h[BACKWARD], g[BACKWARD], rate[BACKWARD], grad_A[BACKWARD], total{};
  for (int n = 0; n < BACKWARD; n++) h[n] = g[n] = grad_A[n] = F{}, rate[n] = splat<float>(-0.1f * (n + 1));
  for (int64_t i = 0; i < tokens * (STATES / BACKWARD); i++) {
    F y{}, gdt{}, gdtu{}, sum_B{}, sum_C{};
    in.change();
#pragma GCC unroll 8
    for (int n = 0; n < BACKWARD; n++) {
      const F decay = exp2(in.step * rate[n]), carried = decay * h[n];
      h[n] = carried + in.drive * coefficient(n);
      sum_C += in.gy * h[n];
      y += h[n] * coefficient(n + 1);
      g[n] += in.gy * coefficient(n + 1);
      sum_B += in.drive * g[n];
      gdtu += g[n] * coefficient(n);
      const F exponent = g[n] * carried;
      grad_A[n] += exponent * in.step;
      gdt += exponent * rate[n];
      g[n] *= decay;
    }
    total += y + gdt + gdtu + sum_B + sum_C;
  }
  for (int n = 0; n < BACKWARD; n++) total += grad_A[n];
  for (int64_t i = 0; i < tokens; i++) {
    in.change();
    F slope;
    const F step = softplus<float>(in.raw + in.step, &slope), sigma = sigmoid<float>(in.z);
    total += in.gy * sigma * (1.0f + in.z * (1.0f - sigma)) * (in.drive + in.step * in.u) + in.gy * (in.z * sigma);
    total += (in.drive + in.step * in.u) * slope + in.drive * step + in.gy * in.u + step * in.u;
  }
  return total[0];
}

}  // namespace

// Runs `tokens` tokens on each of `threads` threads; returns the states that one of them computed.
extern "C" int64_t zigflow_roof(int64_t parallel, int64_t threads, int64_t tokens, int64_t with_gradient) {
  volatile float sink = 0;
  parallel_for(reinterpret_cast<Parallel>(parallel), threads, threads,
               [&](int64_t, int64_t) { sink = with_gradient ? backward(tokens) : forward(tokens); });
  return tokens * Lanes<float>::count * STATES;
}
