// What a block does to single tokens around its mixer: add, norm, modulate on the way in, gate and add on the way out,
// each with the step along the scan order folded into the rows that it writes or reads.
//
// A task is a run of TOKENS tokens of one row of the batch. Every token's row passes through memory once; the passes
// over it that a norm needs run in the first cache. Sums over tokens and batch are made per task, then in the order of
// the tasks, and how the work is cut follows from its shape alone: the number of threads changes no bit.
//
// Shapes: B batch, L tokens, D width. Types: R of the stream, T of what the mixer reads and writes.

#include <cmath>
#include <vector>

#include "vector.h"

using namespace zigflow;

namespace {

constexpr int64_t TOKENS = 64;

// Every field is 8 bytes; the caller packs them in this order. Tensors are contiguous but for the rows of shift, scale
// and gate. rows[l] is the place of the raster's token l in the mixer's sequence; null: l.
struct Call {
  int64_t batch, length, width, threads, types, centered;
  double eps;
  Parallel parallel;
  const int64_t* rows;
  const void *hidden, *residual, *weight, *shift, *scale;  // (B,L,D) T or null, R; (D,) state or null; (B,D) T or null
  const void *base, *y, *gate;                             // (B,L,D) R, T; (B,D) T
  int64_t shift_row, scale_row, gate_row;
  const void *grad_x, *grad_normed, *grad_stream;  // (B,L,D) T, T, R, or null
  void *x, *normed, *stream;                       // (B,L,D) T, T or null, R or null; out of gated_add: stream
  void *grad_residual, *grad_weight, *grad_shift, *grad_scale, *grad_y, *grad_gate;
  void* workspace;
};

template <class S>
constexpr int64_t V = Lanes<S>::count;

template <class S>
INLINE int lanes_at(int64_t e, int64_t width) {
  return int(least_of<int64_t>(V<S>, width - e));
}

// In halves: as many additions, but four or five of them wait for each other instead of all.
template <class S>
INLINE S sum_of(Vec<S> v) {
  S lanes[V<S>];
  store_full(lanes, v);
#pragma GCC unroll 8
  for (int64_t half = V<S> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Four sums, so that an addition need not wait for the one before.
template <class S, class Term>
INLINE S sum_over(int64_t width, const Term& term) {
  Vec<S> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * V<S> <= width; e += 4 * V<S>)
    for (int k = 0; k < 4; k++) sums[k] += term(e + k * V<S>, int(V<S>));
  for (; e < width; e += V<S>) sums[0] += term(e, lanes_at<S>(e, width));
  return sum_of<S>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The mean (0 where the norm does not center) and 1 / sqrt(mean square + eps) of a row.
template <class S>
struct Moments {
  S mean, scale;
};

template <class R, class S = State<R>>
INLINE Moments<S> moments(const R* row, const Call& c) {
  const int64_t D = c.width;
  const S mean = c.centered ? sum_over<S>(D, [&](int64_t e, int n) { return load(row + e, n); }) / S(D) : S(0);
  const S square = sum_over<S>(D, [&](int64_t e, int n) {
    Vec<S> v = load(row + e, n) - mean;
    if (n < V<S>)
      for (int i = n; i < V<S>; i++) v[i] = 0;  // lanes past the width are not -mean
    return v * v;
  });
  return {mean, S(1) / std::sqrt(square / S(D) + S(c.eps))};
}

template <class T>
INLINE T* from(void* p, int64_t offset) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}
template <class T>
INLINE const T* from(const void* p, int64_t offset) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}

INLINE int64_t place(const Call& c, int64_t token) { return c.rows ? c.rows[token] : token; }

template <class R, class T>
void read_token(const Call& c, int64_t row, int64_t token) {
  using S = State<R>;
  const int64_t D = c.width, at = (row * c.length + token) * D;
  const R* stream = from<R>(c.residual, at);
  if (c.hidden) {
    const T* hidden = from<T>(c.hidden, at);
    R* sum = from<R>(c.stream, at);
    for (int64_t e = 0; e < D; e += V<S>) {
      const int n = lanes_at<S>(e, D);
      store(sum + e, load(stream + e, n) + load(hidden + e, n), n);
    }
    stream = sum;
  }
  const Moments<S> m = moments(stream, c);
  const S* weight = static_cast<const S*>(c.weight);
  const T *shift = from<T>(c.shift, row * c.shift_row), *scale = from<T>(c.scale, row * c.scale_row);
  T *x = static_cast<T*>(c.x) + (row * c.length + place(c, token)) * D, *normed = from<T>(c.normed, at);
  for (int64_t e = 0; e < D; e += V<S>) {
    const int n = lanes_at<S>(e, D);
    Vec<S> value = (load(stream + e, n) - m.mean) * m.scale;
    if (weight) value *= load(weight + e, n);
    if (c.normed) store(normed + e, value, n);
    if (c.scale) value = value * (load(scale + e, n) + S(1)) + load(shift + e, n);
    store(x + e, value, n);
  }
}

// Sums of a task over its tokens, [3][width rounded up]: of the weight, the shift, the scale.
template <class R, class T>
void read_token_backward(const Call& c, int64_t row, int64_t token, State<R>* sums, int64_t stride, State<R>* scratch) {
  using S = State<R>;
  const int64_t D = c.width, at = (row * c.length + token) * D;
  const R *stream = from<R>(c.residual, at), *grad_stream = from<R>(c.grad_stream, at);
  const Moments<S> m = moments(stream, c);
  const S* weight = static_cast<const S*>(c.weight);
  const T* scale = from<T>(c.scale, row * c.scale_row);
  const T* grad_x = from<T>(c.grad_x, (row * c.length + place(c, token)) * D);
  const T* grad_normed = from<T>(c.grad_normed, at);
  Vec<S> along{}, total{};
  for (int64_t e = 0; e < D; e += V<S>) {
    const int n = lanes_at<S>(e, D);
    const Vec<S> unit = (load(stream + e, n) - m.mean) * m.scale;
    const Vec<S> w = weight ? load(weight + e, n) : splat<S>(1);
    Vec<S> g = c.grad_x ? load(grad_x + e, n) : Vec<S>{};
    if (c.scale) {
      store_full(sums + stride + e, load_full(sums + stride + e) + g);
      store_full(sums + 2 * stride + e, load_full(sums + 2 * stride + e) + g * (unit * w));
      g *= load(scale + e, n) + S(1);
    }
    if (c.grad_normed) g += load(grad_normed + e, n);
    if (weight) {
      store_full(sums + e, load_full(sums + e) + g * unit);
      g *= w;
    }
    store_full(scratch + e, g);
    along += g * unit;
    total += g;
  }
  const S slope = sum_of<S>(along) / S(D), level = c.centered ? sum_of<S>(total) / S(D) : S(0);
  R* grad = from<R>(c.grad_residual, at);
  for (int64_t e = 0; e < D; e += V<S>) {
    const int n = lanes_at<S>(e, D);
    const Vec<S> unit = (load(stream + e, n) - m.mean) * m.scale;
    Vec<S> g = (load_full(scratch + e) - unit * slope - level) * m.scale;
    if (c.grad_stream) g += load(grad_stream + e, n);
    store(grad + e, g, n);
  }
}

template <class R, class T>
void write_token(const Call& c, int64_t row, int64_t token) {
  using S = State<R>;
  const int64_t D = c.width, at = (row * c.length + token) * D;
  const R* base = from<R>(c.base, at);
  const T *y = static_cast<const T*>(c.y) + (row * c.length + place(c, token)) * D, *gate = from<T>(c.gate, row * c.gate_row);
  R* out = from<R>(c.stream, at);
  for (int64_t e = 0; e < D; e += V<S>) {
    const int n = lanes_at<S>(e, D);
    store(out + e, load(base + e, n) + load(gate + e, n) * load(y + e, n), n);
  }
}

template <class R, class T>
void write_token_backward(const Call& c, int64_t row, int64_t token, State<R>* sums) {
  using S = State<R>;
  const int64_t D = c.width, at = (row * c.length + token) * D, there = (row * c.length + place(c, token)) * D;
  const R* grad = from<R>(c.grad_stream, at);
  const T *y = from<T>(c.y, there), *gate = from<T>(c.gate, row * c.gate_row);
  T* grad_y = from<T>(c.grad_y, there);
  for (int64_t e = 0; e < D; e += V<S>) {
    const int n = lanes_at<S>(e, D);
    const Vec<S> g = load(grad + e, n);
    store_full(sums + e, load_full(sums + e) + g * load(y + e, n));
    store(grad_y + e, g * load(gate + e, n), n);
  }
}

// out[e] = the sum of parts[task][e] over tasks from `first` on, in their order.
template <class S, class T>
void add_up(const S* parts, int64_t first, int64_t tasks, int64_t part, int64_t e, int64_t width, T* out) {
  const int n = lanes_at<S>(e, width);
  Vec<S> sum{};
  for (int64_t task = first; task < first + tasks; task++) sum += load_full(parts + task * part + e);
  store(out + e, sum, n);
}

template <class R, class T>
int64_t run(const Call& c, bool writes, bool with_gradient, bool count_only) {
  using S = State<R>;
  const int64_t D = c.width, blocks = ceil_div(c.length, TOKENS), tasks = c.batch * blocks;
  const int64_t stride = ceil_div(D, V<S>) * V<S>, part = (writes ? 1 : 3) * stride;
  const int64_t threads = c.threads > 1 ? c.threads : 1;
  if (count_only) return with_gradient ? (tasks * part + threads * stride) * int64_t(sizeof(S)) + 64 : 0;
  if (c.rows) {
    std::vector<char> seen(c.length);
    for (int64_t token = 0; token < c.length; token++) {
      const int64_t at = c.rows[token];
      if (at < 0 || at >= c.length || seen[at]) return -1;
      seen[at] = 1;
    }
  }
  S* parts = reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(c.workspace) + 63) / 64 * 64);  // [task][part]
  S* scratch = parts + tasks * part;                                                          // [thread][stride]
  parallel_for(c.parallel, threads, tasks, [&](int64_t task, int64_t thread) {
    const int64_t row = task / blocks, first = task % blocks * TOKENS;
    const int64_t end = least_of<int64_t>(c.length, first + TOKENS);
    S* sums = parts + task * part;
    if (with_gradient) memset(sums, 0, part * sizeof(S));
    for (int64_t token = first; token < end; token++) {
      if (writes)
        with_gradient ? write_token_backward<R, T>(c, row, token, sums) : write_token<R, T>(c, row, token);
      else
        with_gradient ? read_token_backward<R, T>(c, row, token, sums, stride, scratch + thread * stride)
                      : read_token<R, T>(c, row, token);
    }
  });
  if (!with_gradient) return 0;
  parallel_for(c.parallel, threads, ceil_div(D, V<S>), [&](int64_t vector, int64_t) {
    const int64_t e = vector * V<S>;
    if (!writes && c.weight) add_up<S>(parts, 0, tasks, part, e, D, static_cast<S*>(c.grad_weight));
    for (int64_t row = 0; row < c.batch; row++) {
      const int64_t first = row * blocks;
      if (writes) add_up<S>(parts, first, blocks, part, e, D, from<T>(c.grad_gate, row * D));
      if (!writes && c.scale) {
        add_up<S>(parts + stride, first, blocks, part, e, D, from<T>(c.grad_shift, row * D));
        add_up<S>(parts + 2 * stride, first, blocks, part, e, D, from<T>(c.grad_scale, row * D));
      }
    }
  });
  return 0;
}

int64_t choose(const void* arguments, bool writes, bool with_gradient, bool count_only) {
  Call c;
  memcpy(&c, arguments, sizeof c);
  if (c.types == 1) return run<float, bf16>(c, writes, with_gradient, count_only);
  if (c.types == 2) return run<bf16, bf16>(c, writes, with_gradient, count_only);
  if (c.types == 3) return run<double, double>(c, writes, with_gradient, count_only);
  return run<float, float>(c, writes, with_gradient, count_only);
}

}  // namespace

// Runs the operator, or with `count_only` returns the bytes that its workspace must have; -1 where `rows` is no
// permutation. types: 0 float32, 1 a float32 stream and bfloat16, 2 bfloat16, 3 float64. The batch is not empty.
extern "C" int64_t zigflow_add_norm_modulate(const void* arguments, int64_t with_gradient, int64_t count_only) {
  return choose(arguments, false, with_gradient, count_only);
}
extern "C" int64_t zigflow_gated_add(const void* arguments, int64_t with_gradient, int64_t count_only) {
  return choose(arguments, true, with_gradient, count_only);
}
