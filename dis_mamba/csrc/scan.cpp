// The selective scan and its gradient, token-major, one vector of channels at a time.
//
// A task is a block of channels of some rows of the batch, and walks the tokens chunk by chunk. Per chunk: what
// belongs to a token and a channel alone (step size, gate) is computed into scratch, forward for the whole block,
// backward for one vector of channels; then the recurrence runs for a few channel vectors and states at a time, the
// states in registers. Forward keeps the states between spans of tokens; backward recomputes the states of one span
// from them, from the last span to the first.
// Sums over channels (B, C) and over the batch (A, D, bias) are made per task, then in the order of the tasks, and how
// the work is cut follows from its shape alone: the number of threads changes no bit.
//
// Shapes: B batch, L tokens, E channels, N states; V lanes of a vector; a block has up to BLOCK vectors.

#include <utility>

#include "vector.h"

using namespace zigflow;

namespace {

constexpr int CHUNK = ZIGFLOW_CHUNK;
constexpr int BLOCK = 8;

// Tokens between the states that forward keeps: at 16 states these are half as large as one activation.
template <class T>
constexpr int SPAN = sizeof(T) == 2 ? 2 * CHUNK : CHUNK;

#if ZIGFLOW_VECTOR_BYTES >= 64
constexpr int FORWARD_VECTORS = 2, FORWARD_STATES = 8;
#else
constexpr int FORWARD_VECTORS = 1, FORWARD_STATES = 4;
#endif

// Every field is 8 bytes; the caller packs them in this order. Strides count elements; a last stride is 1.
struct Call {
  int64_t batch, length, channels, states, softplus, reverse, threads, dtype;
  Parallel parallel;
  const void *u, *delta, *A, *B, *C, *D, *z, *bias, *grad;  // A (E,N), D, bias in the state's type; D, z, bias may be null
  int64_t u_row, u_token, delta_row, delta_token, B_row, B_token, C_row, C_token, z_row, z_token, grad_row, grad_token;
  void *out, *boundaries;  // (B,L,E); (B,S,N,E) or null, S = ceil(L / SPAN) - 1
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
    const int64_t end = start + CHUNK;
    S* kept = c.boundaries && end < L && end % SPAN<T> == 0
                  ? static_cast<S*>(c.boundaries) + (row * (ceil_div(L, SPAN<T>) - 1) + end / SPAN<T> - 1) * N * E + e0
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

// One vector of channels walks a span twice for every few states: forward to recompute them, back with their adjoint.
// With AVX-512 a Span takes 34 KiB, which fits in a first cache of 48, and 68 KiB of bfloat16 sequences, which does not.
// Stores are few, since with AVX-512 they take turns with the multiply-adds. The sums over channels are folded over the
// lanes in the second pass, whose adders are idle.

// States, and tokens at a time, whose sums are folded together: as many values as a vector has lanes.
template <class S>
constexpr int STATES = V<S> < 4 ? V<S> : 4;
template <class S>
constexpr int STEP = V<S> / STATES<S>;

// What belongs to the tokens of a span and to STATES states: B and C, and the sums over channels of their gradients.
template <class T>
struct Group {
  using S = State<T>;
  S B[SPAN<T>][STATES<S>], C[SPAN<T>][STATES<S>], sum_B[SPAN<T>][STATES<S>], sum_C[SPAN<T>][STATES<S>];
};

// What belongs to the tokens of a span and to one vector of channels. The offsets are known to the compiler: the
// recurrence needs few registers for addresses.
template <class T>
struct Span {
  using S = State<T>;
  Vec<S> dt[SPAN<T>], dtu[SPAN<T>], gy[SPAN<T>], y[SPAN<T>], gdt[SPAN<T>], gdtu[SPAN<T>];
  Vec<S> u[SPAN<T>], slope[SPAN<T>], gate[SPAN<T>];
  // Of the states at hand: [token][state], and one state before the first token.
  Vec<S> decay[SPAN<T> * STATES<S>], state[(SPAN<T> + 1) * STATES<S>];
};

template <class T>
struct BackwardScratch {
  using S = State<T>;
  Span<T>* span;
  Group<T>* groups;                              // [groups_in(N)]
  Vec<S>*adjoint, *grad_A, *grad_D, *grad_bias;  // [vector][N]; [vector]
  BackwardScratch(Arena& arena, int64_t N) {
    span = arena.take<Span<T>>(1);
    groups = arena.take<Group<T>>(groups_in(N));
    for (Vec<S>** p : {&adjoint, &grad_A}) *p = arena.take<Vec<S>>(BLOCK * N);
    for (Vec<S>** p : {&grad_D, &grad_bias}) *p = arena.take<Vec<S>>(BLOCK);
  }
  // Groups of STATES states, then one for each state that is left.
  static int64_t groups_in(int64_t N) { return N / STATES<S> + N % STATES<S>; }
};

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

// COUNT vectors whose values each own SEGMENT lanes, folded into one.
template <class S, int COUNT, int SEGMENT>
INLINE Vec<S> fold(const Vec<S>* vectors) {
  if constexpr (COUNT == 1)
    return *vectors;
  else
    return fold_pair<S, 2 * SEGMENT / COUNT>(fold<S, COUNT / 2, SEGMENT>(vectors),
                                             fold<S, COUNT / 2, SEGMENT>(vectors + COUNT / 2),
                                             std::make_integer_sequence<int, V<S>>());
}

// A line of an array for every token, asked for while the recurrence runs.
struct Stream {
  const char* first;
  int64_t step;
  INLINE void fetch(int token) const { __builtin_prefetch(first + token * step, 0, 2); }
};

struct Streams {
  Stream all[7];
  int count = 0, next = 0;
  template <class T>
  void add(const T* first, int64_t step) {
    all[count++] = {reinterpret_cast<const char*>(first), step * int64_t(sizeof(T))};
  }
  // The next one; after the last, one that is in the cache already.
  Stream take(const void* cached) { return next < count ? all[next++] : Stream{static_cast<const char*>(cached), 0}; }
};

// One span for one vector and NB states; `tokens` is a multiple of STEP.
template <class T, int NB, bool GATED, class S = State<T>>
INLINE void backward_states(int tokens, const Vec<S>* rate, Vec<S>* adjoint, Vec<S>* grad_A_sum, Group<T>& group,
                            Span<T>& s, Stream first, Stream second) {
  // Recompute, keeping exp(dt A) and the states.
  Vec<S> h[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; n++) h[n] = s.state[n];
  for (int i = 0; i < tokens; i++) {
    first.fetch(i);
    const Vec<S> step = s.dt[i], drive = s.dtu[i];
    Vec<S> y = GATED ? s.y[i] : Vec<S>{};
#pragma GCC unroll 16
    for (int n = 0; n < NB; n++) {
      const Vec<S> decay = exp2(step * rate[n]);
      h[n] = decay * h[n] + drive * group.B[i][n];
      if (GATED) y += h[n] * group.C[i][n];
      s.decay[i * NB + n] = decay;
      s.state[(i + 1) * NB + n] = h[n];
    }
    if (GATED) s.y[i] = y;
  }

  // The adjoint g of the states, from the last token to the first.
  Vec<S> g[NB], grad_A[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; n++) {
    g[n] = adjoint[n];
    grad_A[n] = grad_A_sum[n];
  }
  for (int i = tokens - STEP<S>; i >= 0; i -= STEP<S>) {
    Vec<S> part_B[STEP<S>], part_C[STEP<S>];
#pragma GCC unroll 16
    for (int j = STEP<S> - 1; j >= 0; j--) {
      const int at = i + j;
      second.fetch(at);
      const Vec<S> step = s.dt[at], drive = s.dtu[at], gy = s.gy[at];
      Vec<S> gdt = s.gdt[at], gdtu = s.gdtu[at];
      Vec<S> to_B[STATES<S>] = {}, to_C[STATES<S>] = {};
#pragma GCC unroll 16
      for (int n = 0; n < NB; n++) {
        g[n] += gy * group.C[at][n];
        to_B[n] = drive * g[n];
        to_C[n] = gy * s.state[(at + 1) * NB + n];
        gdtu += g[n] * group.B[at][n];
        g[n] *= s.decay[at * NB + n];
        const Vec<S> exponent = g[n] * s.state[at * NB + n];
        grad_A[n] += exponent * step;
        gdt += exponent * rate[n];
      }
      s.gdt[at] = gdt;
      s.gdtu[at] = gdtu;
      part_B[j] = fold<S, STATES<S>, V<S>>(to_B);
      part_C[j] = fold<S, STATES<S>, V<S>>(to_C);
    }
    S *sum_B = group.sum_B[i], *sum_C = group.sum_C[i];
    store_full(sum_B, load_full(sum_B) + fold<S, STEP<S>, V<S> / STATES<S>>(part_B));
    store_full(sum_C, load_full(sum_C) + fold<S, STEP<S>, V<S> / STATES<S>>(part_C));
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; n++) {
    adjoint[n] = g[n];
    grad_A_sum[n] = grad_A[n];
  }
}

// One span for one vector and all states. `kept`: the states before the span, or null where these are zero.
template <class T, bool GATED, class S = State<T>>
__attribute__((noinline)) void backward_vector(int tokens, int64_t N, int64_t E, int lanes, const S* kept,
                                               const Vec<S>* rate, Vec<S>* adjoint, Vec<S>* grad_A, Group<T>* group,
                                               Span<T>& s, Streams& ahead) {
  // Each pass asks for one stream; with few states, what is left over is asked for at once.
  while (ahead.count - ahead.next > 2 * BackwardScratch<T>::groups_in(N)) {
    const Stream stream = ahead.take(&s);
    for (int i = 0; i < tokens; i++) stream.fetch(i);
  }
  int64_t n = 0;
  const auto begin = [&](int states) {
    for (int k = 0; k < states; k++) s.state[k] = kept ? load(kept + (n + k) * E, lanes) : Vec<S>{};
  };
  for (; n + STATES<S> <= N; n += STATES<S>) {
    begin(STATES<S>);
    const Stream first = ahead.take(&s), second = ahead.take(&s);
    backward_states<T, STATES<S>, GATED>(tokens, rate + n, adjoint + n, grad_A + n, *group++, s, first, second);
  }
  for (; n < N; n++) {
    begin(1);
    const Stream first = ahead.take(&s), second = ahead.take(&s);
    backward_states<T, 1, GATED>(tokens, rate + n, adjoint + n, grad_A + n, *group++, s, first, second);
  }
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

// B and C of one span in the order of the walk, zero beyond `count`, and zeros for the sums.
template <class T>
void take_groups(const Call& c, const T* B, const T* C, const Walk& walk, int64_t start, int count, int tokens,
                 Group<T>* group) {
  using S = State<T>;
  for (int64_t n = 0; n < c.states; group++) {
    const int states = n + STATES<S> <= c.states ? STATES<S> : 1;
    for (int i = 0; i < tokens; i++) {
      const int64_t l = i < count ? walk.at(start + i) : 0;
      for (int k = 0; k < STATES<S>; k++) {
        const bool there = i < count && k < states;
        group->B[i][k] = there ? to_state(B[l * c.B_token + n + k]) : S(0);
        group->C[i][k] = there ? to_state(C[l * c.C_token + n + k]) : S(0);
        group->sum_B[i][k] = group->sum_C[i][k] = S(0);
      }
    }
    n += states;
  }
}

template <class T>
void give_sums(const Group<T>* group, const Walk& walk, int64_t start, int count, int64_t N, State<T>* sum_B,
               State<T>* sum_C) {
  using S = State<T>;
  for (int64_t n = 0; n < N; group++) {
    const int states = n + STATES<S> <= N ? STATES<S> : 1;
    for (int i = 0; i < count; i++) {
      const int64_t at = walk.at(start + i) * N + n;
      for (int k = 0; k < states; k++) {
        sum_B[at + k] = group->sum_B[i][k];
        sum_C[at + k] = group->sum_C[i][k];
      }
    }
    n += states;
  }
}

template <class T>
void backward_row(const Call& c, const Vec<State<T>>* rate, const BackwardScratch<T>& scratch, int64_t row,
                  int64_t first, int vectors, State<T>* part_B, State<T>* part_C) {
  using S = State<T>;
  Span<T>& s = *scratch.span;
  const int64_t N = c.states, E = c.channels, L = c.length, spans = ceil_div(L, SPAN<T>);
  const Walk walk{L, c.reverse != 0};
  const bool gated = c.z != nullptr;
  for (int64_t i = 0; i < vectors * N; i++) scratch.adjoint[i] = Vec<S>{};
  for (int64_t span = spans - 1; span >= 0; span--) {
    const int64_t start = span * SPAN<T>;
    const int count = int(least_of<int64_t>(SPAN<T>, L - start));
    // The tokens that fill the last step have a step size of zero and do nothing.
    const int tokens = int(ceil_div(count, STEP<S>) * STEP<S>);
    for (int i = count; i < tokens; i++) s.dt[i] = s.dtu[i] = s.gy[i] = Vec<S>{};
    take_groups(c, static_cast<const T*>(c.B) + row * c.B_row, static_cast<const T*>(c.C) + row * c.C_row, walk, start,
                count, tokens, scratch.groups);
    for (int v = 0; v < vectors; v++) {
      const int64_t e = (first + v) * V<S>, output = row * L * E + e;
      const int lanes = int(least_of<int64_t>(V<S>, E - e));
      const T* u = static_cast<const T*>(c.u) + row * c.u_row + e;
      const T* delta = static_cast<const T*>(c.delta) + row * c.delta_row + e;
      const T* grad = static_cast<const T*>(c.grad) + row * c.grad_row + e;
      const T* z = gated ? static_cast<const T*>(c.z) + row * c.z_row + e : nullptr;
      T *grad_u = static_cast<T*>(c.grad_u) + output, *grad_delta = static_cast<T*>(c.grad_delta) + output;
      T* grad_z = gated ? static_cast<T*>(c.grad_z) + output : nullptr;
      const Vec<S> bias = c.bias ? load(static_cast<const S*>(c.bias) + e, lanes) : Vec<S>{};
      const Vec<S> D = c.D ? load(static_cast<const S*>(c.D) + e, lanes) : Vec<S>{};
      for (int i = 0; i < count; i++) {
        const int64_t l = walk.at(start + i);
        Vec<S> step = load(delta + l * c.delta_token, lanes) + bias;
        if (c.softplus) step = softplus<S>(step, &s.slope[i]);
        s.dt[i] = step;
        s.u[i] = load(u + l * c.u_token, lanes);
        s.dtu[i] = step * s.u[i];
        s.y[i] = D * s.u[i];
        s.gdt[i] = s.gdtu[i] = Vec<S>{};
        Vec<S> g = load(grad + l * c.grad_token, lanes);
        if (gated) {
          const Vec<S> gate = load(z + l * c.z_token, lanes), sigma = sigmoid<S>(gate);
          s.gate[i] = g * sigma * (S(1) + gate * (S(1) - sigma));
          g *= gate * sigma;
        }
        s.gy[i] = g;
      }

      // To be read in the next span, if there is one, and written in this.
      Streams ahead;
      const int64_t sign = walk.reverse ? -1 : 1, here = walk.at(start);
      if (span > 0) {
        const int64_t next = walk.at(start - SPAN<T>);
        ahead.add(u + next * c.u_token, sign * c.u_token);
        ahead.add(delta + next * c.delta_token, sign * c.delta_token);
        ahead.add(grad + next * c.grad_token, sign * c.grad_token);
        if (gated) ahead.add(z + next * c.z_token, sign * c.z_token);
      }
      ahead.add(grad_u + here * E, sign * E);
      ahead.add(grad_delta + here * E, sign * E);
      if (gated) ahead.add(grad_z + here * E, sign * E);
      const S* kept = nullptr;
      if (span > 0) kept = static_cast<const S*>(c.boundaries) + (row * (spans - 1) + span - 1) * N * E + e;
      if (span > 1)
        for (int64_t n = 0; n < N; n++) fetch<false>(kept - (N - n) * E, lanes);

      const auto walk_span = gated ? backward_vector<T, true> : backward_vector<T, false>;
      walk_span(tokens, N, E, lanes, kept, rate + v * N, scratch.adjoint + v * N, scratch.grad_A + v * N,
                scratch.groups, s, ahead);

      Vec<S> grad_bias = scratch.grad_bias[v], grad_D = scratch.grad_D[v];
      for (int i = 0; i < count; i++) {
        const int64_t l = walk.at(start + i);
        Vec<S> gdt = s.gdt[i] * Lanes<S>::ln2 + s.gdtu[i] * s.u[i];
        if (c.softplus) gdt *= s.slope[i];
        grad_bias += gdt;
        grad_D += s.gy[i] * s.u[i];
        store(grad_delta + l * E, gdt, lanes);
        store(grad_u + l * E, s.gdtu[i] * s.dt[i] + s.gy[i] * D, lanes);
        if (gated) store(grad_z + l * E, s.gate[i] * s.y[i], lanes);
      }
      scratch.grad_bias[v] = grad_bias;
      scratch.grad_D[v] = grad_D;
    }
    give_sums(scratch.groups, walk, start, count, N, part_B + row * L * N, part_C + row * L * N);
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
  BackwardScratch<T> scratch(arena, N);
  const int64_t own = arena.used - shared;
  if (count_only) return shared + own * c.threads + 64;

  const int64_t block = block_of<S>(c), blocks = ceil_div(vectors, block);
  pack_rates<S>(c, rates);
  parallel_for(c.parallel, c.threads, groups * blocks, [&](int64_t task, int64_t thread) {
    Arena mine{arena.base, shared + own * thread};
    const BackwardScratch<T> s(mine, N);
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

