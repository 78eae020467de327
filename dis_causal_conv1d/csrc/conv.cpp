// The causal depthwise convolution with optional SiLU and its gradient, token-major, one vector of channels at a time.
//
// A task is a block of channels of some rows of the batch. It walks the tokens chunk by chunk and within a chunk
// channel vector by channel vector, with the last TAPS - 1 inputs (backward: gradients before the SiLU) in registers.
// Sums over tokens and batch are made per task, then in the order of the tasks, and how the work is cut follows from
// its shape alone: the number of threads changes no bit.
//
// Shapes: B batch, L tokens, E channels, W taps; V lanes of a vector, G groups of rows.

#include "vector.h"

using namespace zigflow;

namespace {

constexpr int MOST_TAPS = ZIGFLOW_MOST_TAPS;
constexpr int CHUNK = 32;
constexpr int BLOCK = 16;

// Every field is 8 bytes; the caller packs them in this order. Strides count elements; a last stride is 1.
struct Call {
  int64_t batch, length, channels, taps, silu, reverse, threads, dtype;
  Parallel parallel;
  const void *x, *weight, *bias, *grad;  // weight (E,W) and bias (E,) or null in the state's type
  int64_t x_row, x_token, grad_row, grad_token;
  void *out, *grad_x;                // (B,L,E) contiguous; one of them
  void *grad_weight, *grad_bias;     // (E,W), (E,) or null in the state's type
  void* workspace;
};

template <class S>
constexpr int V = Lanes<S>::count;

int64_t groups_of(const Call& c) { return least_of<int64_t>(c.batch, 16); }

// What a task owns of the channels, and its parameters as vectors.
template <class S>
struct Block {
  int64_t first;  // channel
  int vectors;
  int lanes[BLOCK];
  Vec<S> taps[BLOCK][MOST_TAPS], bias[BLOCK];

  Block(const Call& c, int64_t index) : first(index * BLOCK * V<S>) {
    vectors = int(least_of<int64_t>(BLOCK, ceil_div(c.channels - first, V<S>)));
    for (int v = 0; v < vectors; v++) {
      const int64_t e = first + v * V<S>;
      lanes[v] = int(least_of<int64_t>(V<S>, c.channels - e));
      bias[v] = c.bias ? load(static_cast<const S*>(c.bias) + e, lanes[v]) : Vec<S>{};
      for (int64_t w = 0; w < c.taps; w++) {
        S column[V<S>] = {};
        for (int i = 0; i < lanes[v]; i++) column[i] = static_cast<const S*>(c.weight)[(e + i) * c.taps + w];
        taps[v][w] = load_full(column);
      }
    }
  }
};

// `W` taps, or as many as the call says when W = 0. ring[0] is the oldest of the last taps - 1 inputs.
template <class S, int W>
INLINE Vec<S> convolve(int taps, const Vec<S>* weight, Vec<S> bias, const Vec<S>* ring, Vec<S> now) {
  const int count = W ? W : taps;
  Vec<S> sum = bias + weight[count - 1] * now;
#pragma GCC unroll 4
  for (int w = 0; w < count - 1; w++) sum += weight[w] * ring[w];
  return sum;
}

template <class S, int W>
INLINE void push(int taps, Vec<S>* ring, Vec<S> now) {
  const int count = W ? W : taps;
#pragma GCC unroll 4
  for (int w = 0; w + 2 < count; w++) ring[w] = ring[w + 1];
  if (count > 1) ring[count - 2] = now;
}

template <class T, int W>
void forward_row(const Call& c, const Block<State<T>>& block, int64_t row) {
  using S = State<T>;
  const int64_t E = c.channels, L = c.length, width = least_of<int64_t>(block.vectors * V<S>, E - block.first);
  const Walk walk{L, c.reverse != 0};
  const T* x = static_cast<const T*>(c.x) + row * c.x_row + block.first;
  T* out = static_cast<T*>(c.out) + row * L * E + block.first;
  const int taps = int(c.taps);
  Vec<S> rings[BLOCK][W ? W : MOST_TAPS] = {};
  for (int64_t start = 0; start < L; start += CHUNK) {
    const int64_t end = least_of<int64_t>(L, start + CHUNK);
    for (int64_t i = start; i < end; i++) {
      if (i + CHUNK < L) fetch<false>(x + walk.at(i + CHUNK) * c.x_token, width);
      fetch<true>(out + walk.at(i) * E, width);
    }
    for (int v = 0; v < block.vectors; v++) {
      Vec<S>* ring = rings[v];
      for (int64_t i = start; i < end; i++) {
        const int64_t l = walk.at(i);
        const Vec<S> now = load(x + l * c.x_token + v * V<S>, block.lanes[v]);
        Vec<S> y = convolve<S, W>(taps, block.taps[v], block.bias[v], ring, now);
        push<S, W>(taps, ring, now);
        if (c.silu) y = y / (exp<S>(-y) + S(1));
        store(out + l * E + v * V<S>, y, block.lanes[v]);
      }
    }
  }
}

// The gradient of tap w at token i is g[i] x[i - (taps - 1 - w)]; that of x[j] needs g[j] to g[j + taps - 1], so that
// the walk writes it taps - 1 tokens late.
template <class T, int W>
void backward_row(const Call& c, const Block<State<T>>& block, int64_t row, Vec<State<T>> (*sums)[MOST_TAPS + 1]) {
  using S = State<T>;
  const int64_t E = c.channels, L = c.length, width = least_of<int64_t>(block.vectors * V<S>, E - block.first);
  const Walk walk{L, c.reverse != 0};
  const T* x = static_cast<const T*>(c.x) + row * c.x_row + block.first;
  const T* grad = static_cast<const T*>(c.grad) + row * c.grad_row + block.first;
  T* grad_x = static_cast<T*>(c.grad_x) + row * L * E + block.first;
  const int taps = int(c.taps), count = W ? W : taps, late = count - 1;
  Vec<S> inputs[BLOCK][W ? W : MOST_TAPS] = {}, gradients[BLOCK][W ? W : MOST_TAPS] = {};
  for (int64_t start = 0; start < L; start += CHUNK) {
    const int64_t end = least_of<int64_t>(L, start + CHUNK);
    for (int64_t i = start; i < end; i++) {
      if (i + CHUNK < L) {
        fetch<false>(x + walk.at(i + CHUNK) * c.x_token, width);
        fetch<false>(grad + walk.at(i + CHUNK) * c.grad_token, width);
      }
      fetch<true>(grad_x + walk.at(i) * E, width);
    }
    for (int v = 0; v < block.vectors; v++) {
      // Past the last token the gradients are zero; the walk goes on until every gradient of x is written.
      const int64_t stop = end == L ? L + late : end;
      for (int64_t i = start; i < stop; i++) {
        Vec<S> g{};
        if (i < L) {
          const int64_t l = walk.at(i);
          const Vec<S> now = load(x + l * c.x_token + v * V<S>, block.lanes[v]);
          g = load(grad + l * c.grad_token + v * V<S>, block.lanes[v]);
          if (c.silu) {
            const Vec<S> y = convolve<S, W>(taps, block.taps[v], block.bias[v], inputs[v], now);
            const Vec<S> sigma = sigmoid<S>(y);
            g *= sigma * (S(1) + y * (S(1) - sigma));
          }
#pragma GCC unroll 4
          for (int w = 0; w < count - 1; w++) sums[v][w] += g * inputs[v][w];
          sums[v][count - 1] += g * now;
          sums[v][MOST_TAPS] += g;
          push<S, W>(taps, inputs[v], now);
        }
        if (i >= late) {
          // gradients[k] belongs to token i - late + k.
          Vec<S> total = block.taps[v][0] * g;
#pragma GCC unroll 4
          for (int k = 0; k < count - 1; k++) total += block.taps[v][count - 1 - k] * gradients[v][k];
          store(grad_x + walk.at(i - late) * E + v * V<S>, total, block.lanes[v]);
        }
        push<S, W>(taps, gradients[v], g);
      }
    }
  }
}

template <class T, int W>
int64_t run(const Call& c, bool with_gradient, bool count_only) {
  using S = State<T>;
  typedef Vec<S> Sums[MOST_TAPS + 1];
  const int64_t vectors = ceil_div(c.channels, V<S>), blocks = ceil_div(vectors, BLOCK), groups = groups_of(c);
  if (count_only) return with_gradient ? groups * vectors * int64_t(sizeof(Sums)) + 64 : 0;
  if (!with_gradient) {
    parallel_for(c.parallel, c.threads, c.batch * blocks,
                 [&](int64_t task, int64_t) { forward_row<T, W>(c, Block<S>(c, task % blocks), task / blocks); });
    return 0;
  }
  Sums* parts = reinterpret_cast<Sums*>((reinterpret_cast<uintptr_t>(c.workspace) + 63) / 64 * 64);  // [G][vector]
  parallel_for(c.parallel, c.threads, groups * blocks, [&](int64_t task, int64_t) {
    const Block<S> block(c, task % blocks);
    const int64_t group = task / blocks;
    Sums sums[BLOCK] = {};
    for (int64_t row = group * c.batch / groups; row < (group + 1) * c.batch / groups; row++)
      backward_row<T, W>(c, block, row, sums);
    memcpy(parts + group * vectors + task % blocks * BLOCK, sums, block.vectors * sizeof(Sums));
  });
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t e = v * V<S>, lanes = least_of<int64_t>(V<S>, c.channels - e);
    Sums total;
    memcpy(total, parts[v], sizeof total);
    for (int64_t group = 1; group < groups; group++)
      for (int w = 0; w <= MOST_TAPS; w++) total[w] += parts[group * vectors + v][w];
    for (int64_t i = 0; i < lanes; i++) {
      for (int64_t w = 0; w < c.taps; w++) static_cast<S*>(c.grad_weight)[(e + i) * c.taps + w] = total[w][i];
      if (c.grad_bias) static_cast<S*>(c.grad_bias)[e + i] = total[MOST_TAPS][i];
    }
  }
  return 0;
}

template <class T>
int64_t choose(const Call& c, bool with_gradient, bool count_only) {
  if (c.taps == 4) return run<T, 4>(c, with_gradient, count_only);
  if (c.taps == 3) return run<T, 3>(c, with_gradient, count_only);
  if (c.taps == 2) return run<T, 2>(c, with_gradient, count_only);
  return run<T, 0>(c, with_gradient, count_only);
}

}  // namespace

// Runs the convolution, or with `count_only` returns the bytes that its workspace must have. dtype: 0 float32,
// 1 bfloat16, 2 float64; the batch is not empty.
extern "C" int64_t zigflow_conv(const void* arguments, int64_t with_gradient, int64_t count_only) {
  Call c;
  memcpy(&c, arguments, sizeof c);
  if (c.dtype == 1) return choose<bf16>(c, with_gradient, count_only);
  if (c.dtype == 2) return run<double, 0>(c, with_gradient, count_only);
  return choose<float>(c, with_gradient, count_only);
}
