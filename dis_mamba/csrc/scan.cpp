// The selective scan and its gradient, token-major, one vector of channels at a time.
//
// A task is a block of channels of some rows of the batch, and walks the tokens chunk by chunk. Per chunk: what
// belongs to a token and a channel alone (step size, gate) is computed for the whole block into scratch; then the
// recurrence runs for a few channel vectors and states at a time, the states in registers. Forward keeps the states
// at the chunk boundaries; backward recomputes the states of one chunk from them, from the last chunk to the first.
// Sums over channels (B, C) and over the batch (A, D, bias) are made per task, then in the order of the tasks, and how
// the work is cut follows from its shape alone: the number of threads changes no bit.
//
// Shapes: B batch, L tokens, E channels, N states; V lanes of a vector, G groups of rows, a block has up to BLOCK vectors.

#include <utility>

#include "vector.h"

using namespace zigflow;

namespace {

constexpr int CHUNK = ZIGFLOW_CHUNK;
constexpr int BLOCK = 8;

#if ZIGFLOW_VECTOR_BYTES >= 64
constexpr int FORWARD_VECTORS = 2, FORWARD_STATES = 8, BACKWARD_VECTORS = 1, BACKWARD_STATES = 4;
#else
constexpr int FORWARD_VECTORS = 1, FORWARD_STATES = 4, BACKWARD_VECTORS = 1, BACKWARD_STATES = 4;
#endif

// Every field is 8 bytes; the caller packs them in this order. Strides count elements; a last stride is 1.
struct Call {
  int64_t batch, length, channels, states, softplus, reverse, threads, dtype;
  Parallel parallel;
  const void *u, *delta, *A, *B, *C, *D, *z, *bias, *grad;  // A (E,N), D, bias in the state's type; D, z, bias may be null
  int64_t u_row, u_token, delta_row, delta_token, B_row, B_token, C_row, C_token, z_row, z_token, grad_row, grad_token;
  void *out, *boundaries;  // (B,L,E); (B,S,N,E) or null
  void *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_bias;  // contiguous; null where absent
  void* workspace;
};

template <class S>
constexpr int V = Lanes<S>::count;

template <class S>
int64_t vectors_of(const Call& c) {
  return ceil_div(c.channels, V<S>);
}

// Rows of the batch are summed in at most 16 groups.
int64_t groups_of(const Call& c) { return least_of<int64_t>(c.batch, 16); }

// Vectors in a block of the backward pass: enough blocks to share the work out, by shape alone.
template <class S>
int64_t block_of(const Call& c) {
  const int64_t wanted = vectors_of<S>(c) * groups_of(c) / 12 / 2 * 2;
  return wanted < 2 ? 2 : least_of<int64_t>(wanted, BLOCK);
}

// Scratch and partial sums, laid out in one piece of memory; without memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(base + used);
    used += ceil_div(count * int64_t(sizeof(X)), 64) * 64;
    return p;
  }
};

char* aligned(void* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

// B and C of one chunk in the order of the walk, [CHUNK][N], in the type of the state.
template <class T>
INLINE void take_chunk(const T* from, int64_t token_stride, const Walk& walk, int64_t start, int count, int64_t N,
                       State<T>* to) {
  for (int i = 0; i < count; i++) {
    const T* row = from + walk.at(start + i) * token_stride;
    for (int64_t n = 0; n < N; n++) to[i * N + n] = to_state(row[n]);
  }
}

// A log2(e), as [vector][N][V], so that exp(dt A) = 2^(dt rate).
template <class S>
void pack_rate(const Call& c, Vec<S>* rate, int64_t v) {
  const S* A = static_cast<const S*>(c.A);
  S* to = reinterpret_cast<S*>(rate + v * c.states);
  const int64_t first = v * V<S>, lanes = least_of<int64_t>(V<S>, c.channels - first);
  for (int64_t n = 0; n < c.states; n++)
    for (int64_t lane = 0; lane < V<S>; lane++)
      to[n * V<S> + lane] = lane < lanes ? A[(first + lane) * c.states + n] * Lanes<S>::log2e : S(0);
}

template <class S>
void pack_rates(const Call& c, Vec<S>* rate) {
  const int64_t vectors = vectors_of<S>(c);
  const int64_t threads = vectors * c.states < 2048 ? 1 : c.threads;
  parallel_for(c.parallel, threads, vectors, [&](int64_t v, int64_t) { pack_rate<S>(c, rate, v); });
}

// ---- forward

// What a chunk will touch, asked for while the recurrence runs, a line of each array per token and vector: memory works
// while the arithmetic does. Asked for all at once, the lines would make the core wait.
struct Ahead {
  const char *u, *delta, *z, *out;                      // of the first token and vector
  int64_t u_step, delta_step, z_step, out_step, vector;  // bytes from token to token, and from vector to vector
  INLINE void fetch(int64_t token, int64_t v) const {
    __builtin_prefetch(u + token * u_step + v * vector, 0, 2);
    __builtin_prefetch(delta + token * delta_step + v * vector, 0, 2);
    __builtin_prefetch(z + token * z_step + v * vector, 0, 2);
    __builtin_prefetch(out + token * out_step + v * vector, 1, 2);
  }
};

// The recurrence over one chunk for CV vectors of channels and NB states from n0 on; dt, dtu, y [vector][CHUNK].
template <class S, int CV, int NB>
INLINE void forward_states(int count, int64_t N, int64_t n0, const Vec<S>* dt, const Vec<S>* dtu, Vec<S>* y,
                           const Vec<S>* rate, const S* B, const S* C, Vec<S>* state, const Ahead& ahead,
                           int64_t first) {
  Vec<S> h[CV][NB];
#pragma GCC unroll 16
  for (int v = 0; v < CV; v++)
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) h[v][n] = state[v * N + n0 + n];
  for (int i = 0; i < count; i++) {
    const S *Bi = B + i * N + n0, *Ci = C + i * N + n0;
#pragma GCC unroll 16
    for (int v = 0; v < CV; v++) {
      if (n0 == 0) ahead.fetch(i, first + v);
      const Vec<S> step = dt[v * CHUNK + i], drive = dtu[v * CHUNK + i];
      Vec<S> even = n0 > 0 ? y[v * CHUNK + i] : Vec<S>{}, odd = Vec<S>{};
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) {
        h[v][n] = exp2(step * rate[v * N + n0 + n]) * h[v][n] + drive * Bi[n];
        (n % 2 ? odd : even) += h[v][n] * Ci[n];
      }
      y[v * CHUNK + i] = even + odd;
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < CV; v++)
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) state[v * N + n0 + n] = h[v][n];
}

template <class S, int CV>
__attribute__((noinline)) void forward_vectors(int count, int64_t N, const Vec<S>* dt, const Vec<S>* dtu, Vec<S>* y,
                                               const Vec<S>* rate, const S* B, const S* C, Vec<S>* state,
                                               const Ahead& ahead, int64_t first) {
  int64_t n = 0;
  for (; n + FORWARD_STATES <= N; n += FORWARD_STATES)
    forward_states<S, CV, FORWARD_STATES>(count, N, n, dt, dtu, y, rate, B, C, state, ahead, first);
  for (; n + 4 <= N && FORWARD_STATES > 4; n += 4)
    forward_states<S, CV, 4>(count, N, n, dt, dtu, y, rate, B, C, state, ahead, first);
  for (; n < N; n++) forward_states<S, CV, 1>(count, N, n, dt, dtu, y, rate, B, C, state, ahead, first);
}

template <class S>
struct ForwardScratch {
  Vec<S>*dt, *dtu, *y, *state;
  S *B, *C;
  ForwardScratch(Arena& arena, int64_t N)
      : dt(arena.take<Vec<S>>(BLOCK * CHUNK)),
        dtu(arena.take<Vec<S>>(BLOCK * CHUNK)),
        y(arena.take<Vec<S>>(BLOCK * CHUNK)),
        state(arena.take<Vec<S>>(BLOCK * N)),
        B(arena.take<S>(CHUNK * N)),
        C(arena.take<S>(CHUNK * N)) {}
};

template <class T>
void forward_task(const Call& c, const Vec<State<T>>* rates, ForwardScratch<State<T>> s, int64_t row, int64_t first,
                  int vectors) {
  using S = State<T>;
  const int64_t N = c.states, E = c.channels, L = c.length, e0 = first * V<S>;
  const Walk walk{L, c.reverse != 0};
  const T *u = static_cast<const T*>(c.u) + row * c.u_row + e0, *delta = static_cast<const T*>(c.delta) + row * c.delta_row + e0;
  const T* z = c.z ? static_cast<const T*>(c.z) + row * c.z_row + e0 : nullptr;
  T* out = static_cast<T*>(c.out) + row * L * E + e0;
  int lanes[BLOCK];
  Vec<S> bias[BLOCK], D[BLOCK];
  for (int v = 0; v < vectors; v++) {
    lanes[v] = int(least_of<int64_t>(V<S>, E - e0 - v * V<S>));
    bias[v] = c.bias ? load(static_cast<const S*>(c.bias) + e0 + v * V<S>, lanes[v]) : Vec<S>{};
    D[v] = c.D ? load(static_cast<const S*>(c.D) + e0 + v * V<S>, lanes[v]) : Vec<S>{};
  }
  for (int64_t i = 0; i < vectors * N; i++) s.state[i] = Vec<S>{};
  const Vec<S>* rate = rates + first * N;
  const int64_t chunks = ceil_div(L, CHUNK);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t start = chunk * CHUNK;
    const int count = int(least_of<int64_t>(CHUNK, L - start));
    take_chunk(static_cast<const T*>(c.B) + row * c.B_row, c.B_token, walk, start, count, N, s.B);
    take_chunk(static_cast<const T*>(c.C) + row * c.C_row, c.C_token, walk, start, count, N, s.C);
    for (int i = 0; i < count; i++) {
      const int64_t l = walk.at(start + i);
      for (int v = 0; v < vectors; v++) {
        Vec<S> step = load(delta + l * c.delta_token + v * V<S>, lanes[v]) + bias[v];
        if (c.softplus) step = softplus<S>(step, nullptr);
        s.dt[v * CHUNK + i] = step;
        s.dtu[v * CHUNK + i] = step * load(u + l * c.u_token + v * V<S>, lanes[v]);
      }
    }
    // To be read in the next chunk, if there is one, and written in this.
    const int64_t next = walk.at(chunk + 1 < chunks ? start + CHUNK : start);
    const auto line = [](const T* p) { return reinterpret_cast<const char*>(p); };
    const auto step = [&](int64_t token) { return (walk.reverse ? -token : token) * int64_t(sizeof(T)); };
    const Ahead ahead{line(u + next * c.u_token),
                      line(delta + next * c.delta_token),
                      line(z ? z + next * c.z_token : u + next * c.u_token),
                      line(out + walk.at(start) * E),
                      step(c.u_token),
                      step(c.delta_token),
                      step(z ? c.z_token : c.u_token),
                      step(E),
                      V<S> * int64_t(sizeof(T))};
    S* kept = c.boundaries && chunk + 1 < chunks
                  ? static_cast<S*>(c.boundaries) + (row * (chunks - 1) + chunk) * N * E + e0
                  : nullptr;
    int v = 0;
    for (; v + FORWARD_VECTORS <= vectors; v += FORWARD_VECTORS) {
      if (kept)
        for (int64_t n = 0; n < N; n++) fetch<true>(kept + n * E + v * V<S>, FORWARD_VECTORS * V<S>);
      forward_vectors<S, FORWARD_VECTORS>(count, N, s.dt + v * CHUNK, s.dtu + v * CHUNK, s.y + v * CHUNK, rate + v * N,
                                          s.B, s.C, s.state + v * N, ahead, v);
    }
    if constexpr (FORWARD_VECTORS > 1)
      for (; v < vectors; v++)
        forward_vectors<S, 1>(count, N, s.dt + v * CHUNK, s.dtu + v * CHUNK, s.y + v * CHUNK, rate + v * N, s.B, s.C,
                              s.state + v * N, ahead, v);
    if (kept) {
      for (int64_t n = 0; n < N; n++)
        for (int v = 0; v < vectors; v++) store(kept + n * E + v * V<S>, s.state[v * N + n], lanes[v]);
    }
    for (int i = 0; i < count; i++) {
      const int64_t l = walk.at(start + i);
      for (int v = 0; v < vectors; v++) {
        Vec<S> y = s.y[v * CHUNK + i];
        if (c.D) y += D[v] * load(u + l * c.u_token + v * V<S>, lanes[v]);
        if (z) {
          const Vec<S> gate = load(z + l * c.z_token + v * V<S>, lanes[v]);
          y = y * gate / (exp<S>(-gate) + S(1));
        }
        store(out + l * E + v * V<S>, y, lanes[v]);
      }
    }
  }
}

template <class T>
int64_t forward(const Call& c, bool count_only) {
  using S = State<T>;
  Arena arena{count_only ? nullptr : aligned(c.workspace)};
  const int64_t vectors = vectors_of<S>(c), N = c.states;
  Vec<S>* rates = arena.take<Vec<S>>(vectors * N);
  const int64_t shared = arena.used;
  ForwardScratch<S> scratch(arena, N);
  const int64_t own = arena.used - shared;
  if (count_only) return shared + own * c.threads + 64;

  // Even, so that which vectors go together does not depend on the number of threads.
  const int64_t wanted = c.batch * vectors / (8 * c.threads) / 2 * 2;
  const int64_t block = wanted < 2 ? 2 : least_of<int64_t>(wanted, BLOCK);
  const int64_t blocks = ceil_div(vectors, block);
  pack_rates<S>(c, rates);
  parallel_for(c.parallel, c.threads, c.batch * blocks, [&](int64_t task, int64_t thread) {
    Arena mine{arena.base, shared + own * thread};
    const int64_t first = task % blocks * block;
    forward_task<T>(c, rates, ForwardScratch<S>(mine, N), task / blocks, first, int(least_of(block, vectors - first)));
  });
  return 0;
}

// ---- backward

template <class S>
struct BackwardScratch {
  Vec<S>*u, *dt, *dtu, *slope, *gy, *gate, *y, *gdt, *gdtu;  // [vector][CHUNK]
  Vec<S>*state, *adjoint, *grad_A, *grad_D, *grad_bias;      // [vector][N]; [vector]
  Vec<S>*decay, *carried, *sum_B, *sum_C;                    // [CHUNK][vectors][states] of one call, [CHUNK][states]
  S *B, *C;
  BackwardScratch(Arena& arena, int64_t N) {
    for (Vec<S>** p : {&u, &dt, &dtu, &slope, &gy, &gate, &y, &gdt, &gdtu}) *p = arena.take<Vec<S>>(BLOCK * CHUNK);
    for (Vec<S>** p : {&state, &adjoint, &grad_A}) *p = arena.take<Vec<S>>(BLOCK * N);
    for (Vec<S>** p : {&grad_D, &grad_bias}) *p = arena.take<Vec<S>>(BLOCK);
    for (Vec<S>** p : {&decay, &carried}) *p = arena.take<Vec<S>>(CHUNK * BACKWARD_VECTORS * BACKWARD_STATES);
    for (Vec<S>** p : {&sum_B, &sum_C}) *p = arena.take<Vec<S>>((CHUNK + V<S>)*BACKWARD_STATES);
    B = arena.take<S>(CHUNK * N);
    C = arena.take<S>(CHUNK * N);
  }
  // The same from vector v on; what belongs to one call of the recurrence stays.
  BackwardScratch from(int v, int64_t N) const {
    BackwardScratch s = *this;
    for (Vec<S>** p : {&s.u, &s.dt, &s.dtu, &s.slope, &s.gy, &s.gate, &s.y, &s.gdt, &s.gdtu}) *p += v * CHUNK;
    for (Vec<S>** p : {&s.state, &s.adjoint, &s.grad_A}) *p += v * N;
    return s;
  }
};

// One chunk for CV vectors and NB states. ``initial``: these are the first vectors, which set the sums over channels.
template <class S, int CV, int NB, bool GATED>
INLINE void backward_states(int count, int64_t N, int64_t n0, bool initial, const Vec<S>* rate,
                            const BackwardScratch<S>& s) {
  // Recompute, keeping exp(dt A) and its product with the state before the token; C's gradient needs the state itself.
  Vec<S> h[CV][NB];
#pragma GCC unroll 16
  for (int v = 0; v < CV; v++)
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) h[v][n] = s.state[v * N + n0 + n];
  for (int i = 0; i < count; i++) {
    const S *Bi = s.B + i * N + n0, *Ci = s.C + i * N + n0;
    Vec<S> sum[NB];
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) sum[n] = initial ? Vec<S>{} : s.sum_C[i * NB + n];
#pragma GCC unroll 16
    for (int v = 0; v < CV; v++) {
      const Vec<S> step = s.dt[v * CHUNK + i], drive = s.dtu[v * CHUNK + i], gy = s.gy[v * CHUNK + i];
      Vec<S> y = !GATED || n0 == 0 ? Vec<S>{} : s.y[v * CHUNK + i];
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) {
        const Vec<S> decay = exp2(step * rate[v * N + n0 + n]);
        const Vec<S> carried = decay * h[v][n];
        s.decay[(i * CV + v) * NB + n] = decay;
        s.carried[(i * CV + v) * NB + n] = carried;
        h[v][n] = carried + drive * Bi[n];
        sum[n] += gy * h[v][n];
        if (GATED) y += h[v][n] * Ci[n];
      }
      if (GATED) s.y[v * CHUNK + i] = y;
    }
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) s.sum_C[i * NB + n] = sum[n];
  }

  // The adjoint g of the states, from the last token to the first.
  Vec<S> g[CV][NB], grad_A[CV][NB];
#pragma GCC unroll 16
  for (int v = 0; v < CV; v++)
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      g[v][n] = s.adjoint[v * N + n0 + n];
      grad_A[v][n] = s.grad_A[v * N + n0 + n];
    }
  for (int i = count - 1; i >= 0; i--) {
    const S *Bi = s.B + i * N + n0, *Ci = s.C + i * N + n0;
    Vec<S> sum[NB];
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) sum[n] = initial ? Vec<S>{} : s.sum_B[i * NB + n];
#pragma GCC unroll 16
    for (int v = 0; v < CV; v++) {
      const Vec<S> step = s.dt[v * CHUNK + i], drive = s.dtu[v * CHUNK + i], gy = s.gy[v * CHUNK + i];
      Vec<S> gdt = n0 == 0 ? Vec<S>{} : s.gdt[v * CHUNK + i], gdtu = n0 == 0 ? Vec<S>{} : s.gdtu[v * CHUNK + i];
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) {
        g[v][n] += gy * Ci[n];
        sum[n] += drive * g[v][n];
        gdtu += g[v][n] * Bi[n];
        const Vec<S> exponent = g[v][n] * s.carried[(i * CV + v) * NB + n];
        grad_A[v][n] += exponent * step;
        gdt += exponent * rate[v * N + n0 + n];
        g[v][n] *= s.decay[(i * CV + v) * NB + n];
      }
      s.gdt[v * CHUNK + i] = gdt;
      s.gdtu[v * CHUNK + i] = gdtu;
    }
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) s.sum_B[i * NB + n] = sum[n];
  }
#pragma GCC unroll 16
  for (int v = 0; v < CV; v++)
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      s.adjoint[v * N + n0 + n] = g[v][n];
      s.grad_A[v * N + n0 + n] = grad_A[v][n];
    }
}

template <class S>
using StatesFunction = void (*)(int, int64_t, int64_t, bool, const Vec<S>*, const BackwardScratch<S>&);

template <class S, int CV, int NB, bool GATED>
__attribute__((noinline)) void backward_call(int count, int64_t N, int64_t n0, bool initial, const Vec<S>* rate,
                                             const BackwardScratch<S>& s) {
  backward_states<S, CV, NB, GATED>(count, N, n0, initial, rate, s);
}

template <class S, int CV, int NB>
StatesFunction<S> choose(bool gated) {
  return gated ? backward_call<S, CV, NB, true> : backward_call<S, CV, NB, false>;
}

// The lanes of a pair of vectors whose values each own SEGMENT lanes, folded to half as many lanes per value.
template <class S, int SEGMENT, int... I>
INLINE Vec<S> fold_pair(Vec<S> a, Vec<S> b, std::integer_sequence<int, I...>) {
  constexpr int half = SEGMENT / 2;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I / half * SEGMENT + I % half)...) +
         __builtin_shufflevector(a, b, (I / half * SEGMENT + I % half + half)...);
#else
  typedef typename Lanes<S>::bits Bits;
  return __builtin_shuffle(a, b, Bits{(I / half * SEGMENT + I % half)...}) +
         __builtin_shuffle(a, b, Bits{(I / half * SEGMENT + I % half + half)...});
#endif
}

template <class S, int COUNT>
INLINE Vec<S> fold(const Vec<S>* vectors) {
  if constexpr (COUNT == 1)
    return *vectors;
  else
    return fold_pair<S, 2 * V<S> / COUNT>(fold<S, COUNT / 2>(vectors), fold<S, COUNT / 2>(vectors + COUNT / 2),
                                          std::make_integer_sequence<int, V<S>>());
}

// The sums over the lanes of `count` times STATES vectors, written to out[at(i) * N + n].
template <class S, int STATES>
void sum_lanes(const Vec<S>* vectors, int count, const Walk& walk, int64_t start, int64_t N, S* out) {
  static_assert(V<S> % STATES == 0 || STATES % V<S> == 0, "");
  alignas(64) S sums[(CHUNK + V<S>)*STATES];
  for (int first = 0; first < count * STATES; first += V<S>) store_full(sums + first, fold<S, V<S>>(vectors + first));
  for (int i = 0; i < count; i++) memcpy(out + walk.at(start + i) * N, sums + i * STATES, STATES * sizeof(S));
}

template <class S>
struct Partials {
  Vec<S>*A, *D, *bias;  // [group][vector][N], [group][vector]
  S *B, *C;             // [block][B][L][N]
  Partials(Arena& arena, const Call& c) {
    const int64_t vectors = vectors_of<S>(c), groups = groups_of(c), blocks = ceil_div(vectors, block_of<S>(c));
    A = arena.take<Vec<S>>(groups * vectors * c.states);
    D = arena.take<Vec<S>>(groups * vectors);
    bias = arena.take<Vec<S>>(groups * vectors);
    B = arena.take<S>(blocks * c.batch * c.length * c.states);
    C = arena.take<S>(blocks * c.batch * c.length * c.states);
  }
};

template <class T>
void backward_row(const Call& c, const Vec<State<T>>* rate, const BackwardScratch<State<T>>& s, int64_t row,
                  int64_t first, int vectors, State<T>* part_B, State<T>* part_C) {
  using S = State<T>;
  const int64_t N = c.states, E = c.channels, L = c.length, e0 = first * V<S>, chunks = ceil_div(L, CHUNK);
  const Walk walk{L, c.reverse != 0};
  const T *u = static_cast<const T*>(c.u) + row * c.u_row + e0, *delta = static_cast<const T*>(c.delta) + row * c.delta_row + e0;
  const T* grad = static_cast<const T*>(c.grad) + row * c.grad_row + e0;
  const T* z = c.z ? static_cast<const T*>(c.z) + row * c.z_row + e0 : nullptr;
  T *grad_u = static_cast<T*>(c.grad_u) + row * L * E + e0, *grad_delta = static_cast<T*>(c.grad_delta) + row * L * E + e0;
  T* grad_z = z ? static_cast<T*>(c.grad_z) + row * L * E + e0 : nullptr;
  const int64_t width = least_of<int64_t>(vectors * V<S>, E - e0);
  int lanes[BLOCK];
  Vec<S> bias[BLOCK], D[BLOCK];
  for (int v = 0; v < vectors; v++) {
    lanes[v] = int(least_of<int64_t>(V<S>, E - e0 - v * V<S>));
    bias[v] = c.bias ? load(static_cast<const S*>(c.bias) + e0 + v * V<S>, lanes[v]) : Vec<S>{};
    D[v] = c.D ? load(static_cast<const S*>(c.D) + e0 + v * V<S>, lanes[v]) : Vec<S>{};
  }
  for (int64_t i = 0; i < vectors * N; i++) s.adjoint[i] = Vec<S>{};
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t start = chunk * CHUNK;
    const int count = int(least_of<int64_t>(CHUNK, L - start));
    take_chunk(static_cast<const T*>(c.B) + row * c.B_row, c.B_token, walk, start, count, N, s.B);
    take_chunk(static_cast<const T*>(c.C) + row * c.C_row, c.C_token, walk, start, count, N, s.C);
    const S* kept = static_cast<const S*>(c.boundaries) + (row * (chunks - 1) + chunk - 1) * N * E + e0;
    for (int64_t n = 0; n < N; n++)
      for (int v = 0; v < vectors; v++)
        s.state[v * N + n] = chunk > 0 ? load(kept + n * E + v * V<S>, lanes[v]) : Vec<S>{};
    for (int i = 0; i < count; i++) {
      const int64_t l = walk.at(start + i);
      if (chunk > 0) {
        const int64_t next = walk.at(start - CHUNK + i);
        fetch<false>(u + next * c.u_token, width);
        fetch<false>(delta + next * c.delta_token, width);
        fetch<false>(grad + next * c.grad_token, width);
        if (z) fetch<false>(z + next * c.z_token, width);
      }
      fetch<true>(grad_u + l * E, width);
      fetch<true>(grad_delta + l * E, width);
      if (z) fetch<true>(grad_z + l * E, width);
      for (int v = 0; v < vectors; v++) {
        const int64_t at = v * CHUNK + i, offset = v * V<S>;
        Vec<S> step = load(delta + l * c.delta_token + offset, lanes[v]) + bias[v];
        if (c.softplus) step = softplus<S>(step, &s.slope[at]);
        s.dt[at] = step;
        s.u[at] = load(u + l * c.u_token + offset, lanes[v]);
        s.dtu[at] = step * s.u[at];
        Vec<S> g = load(grad + l * c.grad_token + offset, lanes[v]);
        if (z) {
          const Vec<S> gate = load(z + l * c.z_token + offset, lanes[v]), sigma = sigmoid<S>(gate);
          s.gate[at] = g * sigma * (S(1) + gate * (S(1) - sigma));
          g *= gate * sigma;
        }
        s.gy[at] = g;
      }
    }
    for (int64_t n = 0; n < N;) {
      const int states = n + BACKWARD_STATES <= N ? BACKWARD_STATES : 1;
      const bool gated = z != nullptr;
      const auto some = states == 1 ? choose<S, BACKWARD_VECTORS, 1>(gated) : choose<S, BACKWARD_VECTORS, BACKWARD_STATES>(gated);
      const auto one = states == 1 ? choose<S, 1, 1>(gated) : choose<S, 1, BACKWARD_STATES>(gated);
      int v = 0;
      for (; v + BACKWARD_VECTORS <= vectors; v += BACKWARD_VECTORS)
        some(count, N, n, v == 0, rate + v * N, s.from(v, N));
      for (; v < vectors; v++) one(count, N, n, v == 0, rate + v * N, s.from(v, N));
      if (chunk > 1)
        for (int64_t k = n; k < n + states; k++) fetch<false>(kept - N * E + k * E, width);
      const auto sum = states == 1 ? sum_lanes<S, 1> : sum_lanes<S, BACKWARD_STATES>;
      sum(s.sum_B, count, walk, start, N, part_B + row * L * N + n);
      sum(s.sum_C, count, walk, start, N, part_C + row * L * N + n);
      n += states;
    }
    for (int i = 0; i < count; i++) {
      const int64_t l = walk.at(start + i);
      for (int v = 0; v < vectors; v++) {
        const int64_t at = v * CHUNK + i, offset = v * V<S>;
        Vec<S> gdt = s.gdt[at] * Lanes<S>::ln2 + s.gdtu[at] * s.u[at];
        if (c.softplus) gdt *= s.slope[at];
        s.grad_bias[v] += gdt;
        s.grad_D[v] += s.gy[at] * s.u[at];
        store(grad_delta + l * E + offset, gdt, lanes[v]);
        store(grad_u + l * E + offset, s.gdtu[at] * s.dt[at] + s.gy[at] * D[v], lanes[v]);
        if (z) store(grad_z + l * E + offset, s.gate[at] * (s.y[at] + D[v] * s.u[at]), lanes[v]);
      }
    }
  }
}

// Element i of `total` = the sum over `parts` pieces that lie `stride` apart, in their order.
template <class T>
void sum_parts(const Call& c, const State<T>* parts_of, int64_t parts, int64_t stride, T* total) {
  using S = State<T>;
  constexpr int64_t piece = 256 * V<S>;
  parallel_for(c.parallel, c.threads, ceil_div(stride, piece), [&](int64_t task, int64_t) {
    const int64_t end = least_of(stride, (task + 1) * piece);
    for (int64_t i = task * piece; i < end; i += V<S>) {
      const int lanes = int(least_of<int64_t>(V<S>, end - i));
      Vec<S> sum = load(parts_of + i, lanes);
      for (int64_t part = 1; part < parts; part++) sum += load(parts_of + part * stride + i, lanes);
      store(total + i, sum, lanes);
    }
  });
}

template <class T>
int64_t backward(const Call& c, bool count_only) {
  using S = State<T>;
  Arena arena{count_only ? nullptr : aligned(c.workspace)};
  const int64_t vectors = vectors_of<S>(c), N = c.states, E = c.channels, groups = groups_of(c);
  Vec<S>* rates = arena.take<Vec<S>>(vectors * N);
  const Partials<S> parts(arena, c);
  const int64_t shared = arena.used;
  BackwardScratch<S> scratch(arena, N);
  const int64_t own = arena.used - shared;
  if (count_only) return shared + own * c.threads + 64;

  const int64_t block = block_of<S>(c), blocks = ceil_div(vectors, block);
  pack_rates<S>(c, rates);
  parallel_for(c.parallel, c.threads, groups * blocks, [&](int64_t task, int64_t thread) {
    Arena mine{arena.base, shared + own * thread};
    const BackwardScratch<S> s(mine, N);
    const int64_t group = task / blocks, first = task % blocks * block;
    const int count = int(least_of(block, vectors - first));
    for (int64_t i = 0; i < count * N; i++) s.grad_A[i] = Vec<S>{};
    for (int v = 0; v < count; v++) s.grad_D[v] = s.grad_bias[v] = Vec<S>{};
    const int64_t piece = task % blocks * c.batch * c.length * N;
    for (int64_t row = group * c.batch / groups; row < (group + 1) * c.batch / groups; row++)
      backward_row<T>(c, rates + first * N, s, row, first, count, parts.B + piece, parts.C + piece);
    memcpy(parts.A + (group * vectors + first) * N, s.grad_A, count * N * sizeof(Vec<S>));
    memcpy(parts.D + group * vectors + first, s.grad_D, count * sizeof(Vec<S>));
    memcpy(parts.bias + group * vectors + first, s.grad_bias, count * sizeof(Vec<S>));
  });

  sum_parts<T>(c, parts.B, blocks, c.batch * c.length * N, static_cast<T*>(c.grad_B));
  sum_parts<T>(c, parts.C, blocks, c.batch * c.length * N, static_cast<T*>(c.grad_C));
  const int64_t threads = groups * vectors * N < 4096 ? 1 : c.threads;
  parallel_for(c.parallel, threads, vectors, [&](int64_t v, int64_t) {
    const int64_t first = v * V<S>, lanes = least_of<int64_t>(V<S>, E - first);
    for (int64_t n = 0; n < N; n++) {
      Vec<S> sum = parts.A[v * N + n];
      for (int64_t group = 1; group < groups; group++) sum += parts.A[(group * vectors + v) * N + n];
      for (int64_t lane = 0; lane < lanes; lane++) static_cast<S*>(c.grad_A)[(first + lane) * N + n] = sum[lane];
    }
    Vec<S> D = parts.D[v], bias = parts.bias[v];
    for (int64_t group = 1; group < groups; group++) {
      D += parts.D[group * vectors + v];
      bias += parts.bias[group * vectors + v];
    }
    if (c.grad_D) store(static_cast<S*>(c.grad_D) + first, D, int(lanes));
    if (c.grad_bias) store(static_cast<S*>(c.grad_bias) + first, bias, int(lanes));
  });
  return 0;
}

template <class T>
int64_t run(const Call& c, bool with_gradient, bool count_only) {
  return with_gradient ? backward<T>(c, count_only) : forward<T>(c, count_only);
}

}  // namespace

// Runs the scan, or with `count_only` returns the bytes that its workspace must have. dtype: 0 float32, 1 bfloat16,
// 2 float64; the batch is not empty.
extern "C" int64_t zigflow_scan(const void* arguments, int64_t with_gradient, int64_t count_only) {
  Call c;
  memcpy(&c, arguments, sizeof c);
  if (c.dtype == 1) return run<bf16>(c, with_gradient, count_only);
  if (c.dtype == 2) return run<double>(c, with_gradient, count_only);
  return run<float>(c, with_gradient, count_only);
}

