// The attention core: one head of one sequence, dense or over a set of keys, forward and backward.
//
// Logits are held transposed, keys x queries: a register's lanes are queries. So the softmax needs no sums across
// lanes, keys are broadcast from wherever they lie, and only the queries are repacked, a block of kQueries at a time.
// Keys are taken in blocks of kKeys with the running maximum and sum of online softmax (Milakov & Gimelshein 2018; Dao
// et al. 2022), so scratch does not grow with Nq * Nk. With logits s = scale * q k^T + bias, p = softmax(s), o = p v,
// backward is (with delta_i = sum_d grad_o_id o_id - grad_lse_i)
//   grad_v_j = sum_i p_ij grad_o_i      grad_s_ij = p_ij (grad_o_i . v_j - delta_i)
//   grad_q_i = scale sum_j grad_s_ij k_j      grad_k_j = scale sum_i grad_s_ij q_i      grad_bias = grad_s.
// Where bfloat16 is multiplied in pairs (operand.h), p and grad_s are rounded to it for the products, nothing else is.
#pragma once
#include <algorithm>
#include <cmath>

#include "element.h"
#include "hotkernels/gathered_attention.h"
#include "operand.h"
#include "scratch.h"

namespace hotkernels::HK_ISA {
namespace {

constexpr int64_t kKeys = 512;  // keys per block of logits: 512 x 48 floats are 96 KB
constexpr double kRoundedLse = 16;  // above this |lse|, rounding lse costs more than rounding a probability
constexpr int64_t kShortSum = 32;  // terms added up one by one; longer sums are sums of such sums, which round less
template <class E>
constexpr int64_t kQueries = 3 * kLanes<E>;

// e^x for x up to a little over 0, to about 1 ulp; 0 below -87.7, where the result is not a normal float. NaN stays.
inline vf vexp(vf x) {
  const vf clamped = x < splat(-88.0f) ? splat(-88.0f) : x;  // not vmax: GCC may make a maximum of it that loses a NaN
  const vf shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer n lands in the low bits
  const vf n = shifted - 12582912.0f;
  const vf r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two pieces; |r| <= 0.347
  vf p = splat(0.00139465f);  // e^r to 4e-9, with 1 + r as they are: least squares at Chebyshev points
  p = p * r + 0.00836916f;
  p = p * r + 0.04166626f;
  p = p * r + 0.16666516f;
  p = p * r + 0.50000001f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (vf)(((vu)shifted + 127u) << 23);
}
inline Simd<double>::vec vexp(Simd<double>::vec x) {  // float64 serves gradient checks, not speed
  for (int l = 0; l < Simd<double>::lanes; ++l) x[l] = std::exp(x[l]);
  return x;
}

template <class T>
inline void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Prefetches a row of D elements, for writing if `writing`, into the second level: a Zen 4 has too few buffers for
// misses of the first, and took 1.6 times as long at 17 tokens. Always inlined, as are its callers: GCC takes a
// function that only prefetches for one without effects and drops its calls.
template <bool writing, class S>
[[gnu::always_inline]] inline void prefetch_row(const S* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + d, writing, 2);
}

// The key_bias of a sequence's keys, or null.
template <class T>
inline const T* key_bias_of(const Attention& p, int64_t b, int64_t j) {
  return p.key_bias ? static_cast<const T*>(p.key_bias) + b * p.key_bias_stride_b + j * p.key_bias_stride_j : nullptr;
}

// Whether a key is masked: then it is as absent as under an index of -1.
template <class T>
inline bool masked(const Attention& p, int64_t b, int64_t j, int64_t n) {
  const T* bias = key_bias_of<T>(p, b, j);
  return bias && bias[n * p.key_bias_stride_n] == -static_cast<T>(INFINITY);
}

struct Item {  // one head of one sequence
  int64_t b, j, h;
};

// E: the element type, O: the operands of its products (operand.h).
template <class E, class O>
struct Core {
  using T = typename E::Compute;
  using S = typename E::Stored;
  using vec = Vec<E>;
  using Pack = Packing<E, O>;
  static constexpr int64_t lanes = kLanes<E>;
  static constexpr int64_t Q = kQueries<E>;
  static constexpr int64_t deep = Pack::deep;
  static constexpr bool pairs = deep == 2;

  const Attention& p;
  const bool for_backward;
  const int64_t Dp = round_up(p.D, lanes), Da = round_up(p.D, lanes * deep) / deep;  // operands of a row across, along
  const int64_t blocks = (p.Nq + Q - 1) / Q;
  const T scale_after = pairs ? static_cast<T>(p.scale) : T{1}, scale_before = pairs ? T{1} : static_cast<T>(p.scale);
  const bool by_slot = p.index && !p.start;
  const int64_t key_grads = by_slot ? p.S : p.Nk;  // rows of grad_key and grad_value
  const bool shared_query = p.query.stride_b == 0 && p.query.stride_j == 0 && p.B * p.J > 1;

  // Scratch.
  O *key_rows, *value_rows;                    // [S, Da] packed keys; values, across [S, Dp], backward along [S, Da]
  int64_t *present, *place;                    // [S] slots that hold a key, and where a slot's key is packed
  O* query_columns;                            // [blocks or 1, D, Q] queries, transposed
  T *logits, *out_rows;                        // [min(S, kKeys), Q], [Q, Dp]
  T *top, *sum;                                // [Q] running maximum and sum; backward, sum of exp(logit - lse)
  T* row;                                      // [Dp]
  // Backward.
  O *query_rows, *grad_rows, *grad_columns;    // [Q, Dp] across, [Q, Dp] across, [D, Q]
  T *grad_logits, *grad_query, *delta, *lse;   // [min(S, kKeys), Q], [Q, Dp], [Q], [Q]
  T *grad_key_rows, *grad_value_rows;          // [S, Dp]
  // Keys across [S, Dp]; probabilities and gradients of logits as operands, [min(S, kKeys), Q]. Where operands are
  // numbers, these are key_rows, logits and grad_logits.
  O *keys_across = nullptr, *weights_along, *grads_along, *grads_across;

  // What is packed now.
  const S *packed_query = nullptr, *packed_key = nullptr, *packed_value = nullptr;
  const int64_t* packed_index = nullptr;
  const T* packed_bias = nullptr;
  int64_t keys = 0, key_stride = 0, value_stride = 0, across_stride = 0;
  const O *k = nullptr, *v = nullptr;          // this head's keys, along, and values
  const O* k_across = nullptr;                 // the keys across, for backward

  // How many operands hold so many elements along, or rows across.
  static constexpr int64_t operands(int64_t elements) { return (elements + deep - 1) / deep; }

  Core(const Attention& p, void* scratch, bool backward, int64_t* bytes = nullptr) : p(p), for_backward(backward) {
    Arena a{reinterpret_cast<uintptr_t>(scratch)};
    const int64_t tile = round_up(std::min(p.S, kKeys), 8) * Q;
    key_rows = a.take<O>(p.S * Da), value_rows = a.take<O>(backward ? p.S * Da : operands(p.S) * Dp);
    present = a.take<int64_t>(p.S), place = a.take<int64_t>(p.S);
    query_columns = a.take<O>((shared_query ? blocks : 1) * operands(p.D) * Q);
    logits = a.take<T>(tile), out_rows = a.take<T>(Q * Dp);
    top = a.take<T>(Q), sum = a.take<T>(Q), row = a.take<T>(Dp);
    if (backward) {
      query_rows = a.take<O>(operands(Q) * Dp), grad_rows = a.take<O>(operands(Q) * Dp);
      grad_columns = a.take<O>(operands(p.D) * Q);
      grad_logits = a.take<T>(tile), grad_query = a.take<T>(Q * Dp), delta = a.take<T>(Q), lse = a.take<T>(Q);
      grad_key_rows = a.take<T>(p.S * Dp), grad_value_rows = a.take<T>(p.S * Dp);
      if constexpr (pairs) {
        keys_across = a.take<O>(operands(p.S) * Dp), weights_along = a.take<O>(operands(tile));
        grads_along = a.take<O>(operands(tile)), grads_across = a.take<O>(operands(tile));
      } else {
        keys_across = key_rows, weights_along = logits, grads_along = grads_across = grad_logits;
      }
    }
    if (bytes) *bytes = static_cast<int64_t>(a.next);
  }

  static S* at(const HeadsView& x, int64_t b, int64_t j, int64_t h) {
    return static_cast<S*>(x.data) + b * x.stride_b + j * x.stride_j + h * x.stride_h;
  }

  const int64_t* index_of(int64_t b, int64_t j, int64_t h) const {
    return p.index ? p.index + b * p.index_stride_b + j * p.index_stride_j + h * p.index_stride_h : nullptr;
  }

  // Rows of D elements, transposed: columns[d * Q + i] = x[i][d] * scale, for operands d. Lanes past `count` are 0.
  void pack_columns(const S* x, int64_t stride, int64_t count, T scale, O* columns) const {
    for (int64_t i = 0; i < round_up(count, lanes); i += lanes) {
      for (int64_t d = 0; d < p.D; d += lanes * deep) {
        const int64_t left = p.D - d, wide = left < lanes * deep ? operands(left) : lanes;
        vec block[lanes];
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) {
          block[l] = i + l < count ? Pack::take(x + (i + l) * stride + d, left) : vec{};
        }
        transpose<T>(block);
        for (int64_t l = 0; l < wide; ++l) Pack::put(columns + (d / deep + l) * Q + i, block[l], scale);
      }
    }
  }

  bool any_masked(int64_t b, int64_t j) const {
    bool any = false;
    for (int64_t n = 0; p.key_bias && n < p.Nk && !any; ++n) any = masked<T>(p, b, j, n);
    return any;
  }

  // Points k and v at the rows of this head's keys: in place where one block of queries reads them, else packed.
  void take_keys(int64_t b, int64_t j, int64_t h) {
    const S *key = at(p.key, b, j, h), *value = at(p.value, b, j, h);
    const int64_t* index = index_of(b, j, h);
    if constexpr (sizeof(S) == sizeof(T)) {
      if (!index && blocks == 1 && p.D % lanes == 0 && !any_masked(b, j)) {
        keys = p.Nk, k = k_across = key, v = value;
        key_stride = across_stride = p.key.stride_n, value_stride = p.value.stride_n;
        packed_key = nullptr;  // k and v are elsewhere
        return;
      }
    }
    const T* bias = key_bias_of<T>(p, b, j);
    if (key == packed_key && value == packed_value && index == packed_index && bias == packed_bias) return;
    packed_key = key, packed_value = value, packed_index = index, packed_bias = bias;
    keys = 0;
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t n = index ? index[s] : s;
      if (n < 0 || masked<T>(p, b, j, n)) continue;
      const S *key_row = key + n * p.key.stride_n, *value_row = value + n * p.value.stride_n;
      Pack::along(key_row, p.D, key_rows + keys * Da);
      if (for_backward) {
        Pack::along(value_row, p.D, value_rows + keys * Da);
        if constexpr (pairs) Pack::across(key_row, p.D, T{1}, keys, keys_across, Dp);
      } else {
        Pack::across(value_row, p.D, T{1}, keys, value_rows, Dp);
      }
      present[keys++] = s;
    }
    k = key_rows, k_across = keys_across, v = value_rows;
    key_stride = Da, across_stride = Dp, value_stride = for_backward ? Da : Dp;
  }

  int64_t slot(int64_t key) const { return keys < p.S ? present[key] : key; }
  int64_t token(int64_t key, int64_t b, int64_t j, int64_t h) const {
    return p.index ? index_of(b, j, h)[slot(key)] : slot(key);
  }

  // The transposed queries of a block; kept from sequence to sequence where they are the same.
  const O* take_queries(int64_t b, int64_t j, int64_t h, int64_t block) {
    const S* query = at(p.query, b, j, h);
    const int64_t first = block * Q, count = std::min(Q, p.Nq - first);
    if (!shared_query) {
      pack_columns(query + first * p.query.stride_n, p.query.stride_n, count, scale_before, query_columns);
      return query_columns;
    }
    if (query != packed_query) {
      packed_query = query;
      for (int64_t e = 0; e < blocks; ++e) {
        const int64_t rows = std::min(Q, p.Nq - e * Q);
        O* columns = query_columns + e * operands(p.D) * Q;
        pack_columns(query + e * Q * p.query.stride_n, p.query.stride_n, rows, scale_before, columns);
      }
    }
    return query_columns + block * operands(p.D) * Q;
  }

  T inner_product(const S* x, const S* y) const {
    vec sums{};
    for (int64_t d = 0; d < p.D; d += lanes) sums += load_up_to<E>(x + d, p.D - d) * load_up_to<E>(y + d, p.D - d);
    T total = 0;
    for (int64_t l = 0; l < lanes; ++l) total += sums[l];
    return total;
  }

  // to[n][i] = <rows[n], x[i]> * scale for `number` rows and a block of `count` x, whose columns are packed.
  void products(const O* rows, int64_t stride, int64_t number, const O* columns, const S* x, int64_t x_stride,
                int64_t count, T scale, T* to) {
    const int64_t vectors = (count + lanes - 1) / lanes;
    if constexpr (!pairs) {
      if (count % lanes == 1 && count > 1) {  // as of 17 and 81 tokens: no vector of columns for one x
        multiply<false>(rows, stride, columns, Q, number, vectors - 1, p.D, to, Q, false);
        pack_row<E>(x + (count - 1) * x_stride, p.D, scale, row);
        return products_of_row(rows, stride, number, to + count - 1);
      }
    }
    multiply<false>(rows, stride, columns, Q, number, vectors, operands(p.D), to, Q, false);
  }

  // to[n * Q] = <rows[n], row>.
  void products_of_row(const T* rows, int64_t stride, int64_t number, T* to) const {
    for (int64_t n = 0; n < number; n += lanes) {
      const T* from[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) from[l] = rows + (n + l < number ? n + l : number - 1) * stride;
      vec acc[lanes] = {};
      for (int64_t d = 0; d < Dp; d += lanes) {
        const vec there = load(row + d);
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) acc[l] += there * load(from[l] + d);
      }
      const vec sums = sums_across<T>(acc);
      for (int64_t l = 0; l < lanes && n + l < number; ++l) to[(n + l) * Q] = sums[l];
    }
  }

  // to[c][r] (+)= from[r][c] for r < rows, c < columns, in blocks of registers: between logits and a matrix of queries.
  // Not inlined: GCC makes 30 KB of code of it in each caller.
  [[gnu::noinline]] static void move_transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                                                T* to, int64_t to_stride, bool add) {
    using Sum = SumOf<E>;
    each_vector<Sum>(rows, [&](int64_t r, auto count) {
      for (int64_t c = 0; c < columns; c += lanes) {
        vec block[lanes];
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) {
          block[l] = r + l < rows ? load_up_to<Sum>(from + (r + l) * from_stride + c, columns - c) : vec{};
        }
        transpose<T>(block);
        for (int64_t l = 0; l < lanes && c + l < columns; ++l) {
          T* out = to + (c + l) * to_stride + r;
          store_as<Sum>(out, add ? load_as<Sum>(out, count) + block[l] : block[l], count);
        }
      }
    });
  }

  // logits[key][query] of keys [k0, k1) and one block of queries, biases included.
  void compute_logits(int64_t b, int64_t j, int64_t h, int64_t q0, int64_t count, int64_t k0, int64_t k1,
                      const O* columns) {
    const int64_t vectors = (count + lanes - 1) / lanes;
    const S* query = at(p.query, b, j, h) + q0 * p.query.stride_n;
    products(k + k0 * key_stride, key_stride, k1 - k0, columns, query, p.query.stride_n, count, scale_before, logits);
    for (int64_t key = 0; pairs && key < k1 - k0; ++key) {
      T* row = logits + key * Q;
      for (int64_t e = 0; e < vectors; ++e) store(row + e * lanes, load(row + e * lanes) * scale_after);
    }
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + b * p.bias_stride_b + j * p.bias_stride_j + h * p.bias_stride_h +
                      q0 * p.bias_stride_q;
      if (keys == p.S && p.bias_stride_s == 1) {
        move_transposed(bias + k0, p.bias_stride_q, count, k1 - k0, logits, Q, true);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t key = k0; key < k1; ++key) {
            logits[(key - k0) * Q + i] += bias[i * p.bias_stride_q + slot(key) * p.bias_stride_s];
          }
        }
      }
    }
    if (const T* bias = key_bias_of<T>(p, b, j)) {
      for (int64_t key = k0; key < k1; ++key) {
        const T add = bias[token(key, b, j, h) * p.key_bias_stride_n];
        T* row = logits + (key - k0) * Q;
        for (int64_t e = 0; e < vectors; ++e) store(row + e * lanes, load(row + e * lanes) + add);
      }
    }
  }

  // Prefetches a query block's share of the next item's rows: a head's rows lie a whole token apart, which the hardware
  // prefetchers of the Xeon that was measured did not follow. With prefetch_written, forward at 17 and 81 tokens takes
  // 0.7 of the time there.
  [[gnu::always_inline]] inline void prefetch_share(const Item& next, int64_t block, bool backward) const {
    const auto [b, j, h] = next;
    const S *key = at(p.key, b, j, h), *value = at(p.value, b, j, h), *query = at(p.query, b, j, h);
    const S* grad = backward ? at(p.grad_out, b, j, h) : nullptr;
    const int64_t* index = index_of(b, j, h);
    for (int64_t s = p.S * block / blocks; s < p.S * (block + 1) / blocks; ++s) {
      const int64_t n = index ? index[s] : s;
      if (n < 0) continue;
      prefetch_row<false>(key + n * p.key.stride_n, p.D);
      prefetch_row<false>(value + n * p.value.stride_n, p.D);
    }
    for (int64_t i = p.Nq * block / blocks; i < p.Nq * (block + 1) / blocks; ++i) {
      if (!shared_query) prefetch_row<false>(query + i * p.query.stride_n, p.D);
      if (backward) prefetch_row<false>(grad + i * p.grad_out.stride_n, p.D);
    }
  }

  // Prefetches rows [first, last) of one head of `to`, which are about to be written.
  [[gnu::always_inline]] inline void prefetch_written(const HeadsView& to, const Item& item, int64_t first,
                                                      int64_t last) const {
    if (!to.data) return;
    const S* rows = at(to, item.b, item.j, item.h);
    for (int64_t n = first; n < last; ++n) prefetch_row<true>(rows + n * to.stride_n, p.D);
  }

  void forward(const Item& item, const Item& next) {
    const auto [b, j, h] = item;
    take_keys(b, j, h);
    S* out = at(p.out, b, j, h);
    T* lse_out = static_cast<T*>(p.lse) + ((b * p.J + j) * p.H + h) * p.Nq;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t q0 = block * Q, count = std::min(Q, p.Nq - q0), vectors = (count + lanes - 1) / lanes;
      const O* columns = take_queries(b, j, h, block);
      fill(top, Q, static_cast<T>(-INFINITY));
      fill(sum, Q, T{0});
      if (keys == 0) fill(out_rows, Q * Dp, T{0});
      for (int64_t k0 = 0; k0 < keys; k0 += kKeys) {
        const int64_t k1 = std::min(keys, k0 + kKeys);
        compute_logits(b, j, h, q0, count, k0, k1, columns);
        if (k0 == 0) prefetch_written(p.out, item, q0, q0 + count);
        softmax_block(k1 - k0, vectors, count, k0 > 0);
        if (k0 == 0) prefetch_share(next, block, false);
        const O* values = v + k0 / deep * value_stride;
        multiply<true>(weights(), Q, values, value_stride, count, Dp / lanes, operands(k1 - k0), out_rows, Dp,
                       k0 > 0);
      }
      for (int64_t i = 0; i < count; ++i) {
        // A query with nothing to attend to has sum 0: its output is 0, its lse -inf.
        const T inverse = sum[i] == 0 ? T{0} : T{1} / sum[i];
        write_row(out + (q0 + i) * p.out.stride_n, out_rows + i * Dp, inverse);
        lse_out[q0 + i] = sum[i] == 0 ? static_cast<T>(-INFINITY) : top[i] + std::log(sum[i]);
      }
    }
  }

  // Weights, packed across, overwrite the logits they are made from: two rows of logits make one row of pairs.
  O* weights() const { return reinterpret_cast<O*>(logits); }

  // One step of online softmax: logits become exp(logit - maximum), as operands across; sum and out_rows are rescaled
  // to the new maximum.
  void softmax_block(int64_t count_keys, int64_t vectors, int64_t count, bool rescale) {
    switch (vectors) {
      case 1: return softmax_vectors<1>(count_keys, count, rescale);
      case 2: return softmax_vectors<2>(count_keys, count, rescale);
      default: return softmax_vectors<3>(count_keys, count, rescale);
    }
  }

  // V vectors of queries side by side: V independent chains of maxima and sums, which hide each other's latency.
  template <int V>
  void softmax_vectors(int64_t count_keys, int64_t count, bool rescale) {
    vec most[V], minus[V], factor[V], total[V];
    for (int v = 0; v < V; ++v) most[v] = load(top + v * lanes);
    for (int64_t key = 0; key < count_keys; ++key) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) most[v] = vmax(most[v], load(logits + key * Q + v * lanes));
    }
    for (int v = 0; v < V; ++v) {
      // With every logit -inf so far, 0 stands in for the maximum: exp(-inf - 0) = 0, where -inf - -inf would be NaN.
      minus[v] = most[v] == splat(static_cast<T>(-INFINITY)) ? vec{} : most[v];
      factor[v] = vexp(load(top + v * lanes) - minus[v]);
      total[v] = load(sum + v * lanes) * factor[v];
    }
    for (int64_t first = 0; first < count_keys; first += kShortSum) {
      const int64_t last = std::min(count_keys, first + kShortSum);
      vec part[V] = {};
      for (int64_t key = first; key < last; key += deep) {
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          vec weight[deep] = {};
          for (int64_t i = 0; i < deep && key + i < last; ++i) {
            part[v] += weight[i] = vexp(load(logits + (key + i) * Q + v * lanes) - minus[v]);
          }
          Pack::put_across(weights() + key / deep * Q + v * lanes, weight);
        }
      }
      for (int v = 0; v < V; ++v) total[v] += part[v];
    }
    for (int v = 0; v < V; ++v) {
      store(top + v * lanes, most[v]);
      store(sum + v * lanes, total[v]);
      if (!rescale) continue;
      T factors[lanes];
      store(factors, factor[v]);
      for (int64_t l = 0; l < lanes && v * lanes + l < count; ++l) {
        T* row = out_rows + (v * lanes + l) * Dp;
        for (int64_t d = 0; d < Dp; d += lanes) store(row + d, load(row + d) * factors[l]);
      }
    }
  }

  // Gradients of one head of one sequence. query_sum, bias_sum: where these are added up over sequences, the `first` of
  // which finds nothing there; or null.
  void backward(const Item& item, const Item& next, T* query_sum, T* bias_sum, bool first) {
    const auto [b, j, h] = item;
    take_keys(b, j, h);
    const int64_t row0 = ((b * p.J + j) * p.H + h) * p.Nq;
    const S *grad = at(p.grad_out, b, j, h), *query = at(p.query, b, j, h), *out = at(p.out, b, j, h);
    const bool whole = keys <= kKeys;  // all keys in one block
    T* grad_bias = p.grad_bias ? static_cast<T*>(p.grad_bias) + row0 * p.S : bias_sum;
    const bool first_bias = first || p.grad_bias;  // only a sum goes on
    if (grad_bias && first_bias && keys < p.S) fill(grad_bias, p.Nq * p.S, T{0});
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t q0 = block * Q, count = std::min(Q, p.Nq - q0), vectors = (count + lanes - 1) / lanes;
      const O* columns = take_queries(b, j, h, block);
      pack_columns(grad + q0 * p.grad_out.stride_n, p.grad_out.stride_n, count, T{1}, grad_columns);
      fill(delta, Q, T{0});
      fill(lse, Q, static_cast<T>(-INFINITY));  // lanes past `count` are queries with nothing to attend to
      for (int64_t i = 0; i < count; ++i) {
        const S* grad_row = grad + (q0 + i) * p.grad_out.stride_n;
        Pack::across(query + (q0 + i) * p.query.stride_n, p.D, scale_before, i, query_rows, Dp);
        Pack::across(grad_row, p.D, T{1}, i, grad_rows, Dp);
        if (p.grad_lse) delta[i] = -static_cast<const T*>(p.grad_lse)[row0 + q0 + i];
        lse[i] = static_cast<const T*>(p.lse)[row0 + q0 + i];
        if (!whole) delta[i] += inner_product(grad_row, out + (q0 + i) * p.out.stride_n);
      }
      if (!whole) sum_probabilities(b, j, h, q0, count, columns);
      for (int64_t k0 = 0; k0 < keys; k0 += kKeys) {
        const int64_t k1 = std::min(keys, k0 + kKeys), n = k1 - k0;
        compute_logits(b, j, h, q0, count, k0, k1, columns);
        products(v + k0 * value_stride, value_stride, n, grad_columns, grad + q0 * p.grad_out.stride_n,
                 p.grad_out.stride_n, count, T{1}, grad_logits);
        softmax_gradient(n, vectors, whole);
        if (k0 == 0) prefetch_share(next, block, true);
        multiply<false>(weights_along, operands(Q), grad_rows, Dp, n, Dp / lanes, operands(count),
                        grad_value_rows + k0 * Dp, Dp, block > 0);
        multiply<false>(grads_along, operands(Q), query_rows, Dp, n, Dp / lanes, operands(count),
                        grad_key_rows + k0 * Dp, Dp, block > 0);
        if (k0 == 0) {
          if (!query_sum) prefetch_written(p.grad_query, item, q0, q0 + count);
          const int64_t begin = key_grads * block / blocks, end = key_grads * (block + 1) / blocks;
          prefetch_written(p.grad_key, item, begin, end);
          prefetch_written(p.grad_value, item, begin, end);
        }
        const O* across = k_across + k0 / deep * across_stride;
        multiply<true>(grads_across, Q, across, across_stride, count, Dp / lanes, operands(n), grad_query, Dp, k0 > 0);
        if (grad_bias) add_bias_gradients(grad_bias + q0 * p.S, count, k0, k1, first_bias);
        if (p.grad_key_bias) key_bias_gradients(b, j, h, count, k0, k1);
      }
      if (keys == 0) fill(grad_query, Q * Dp, T{0});
      write_grad_query(b, j, h, q0, count, query_sum, first);
    }
    if (p.grad_key.data) write_grad_rows(p.grad_key, grad_key_rows, scale_after, b, j, h);
    if (p.grad_value.data) write_grad_rows(p.grad_value, grad_value_rows, T{1}, b, j, h);
  }

  // sum = sum of exp(logit - lse) over all keys. Ideally 1; computed only if some |lse| > kRoundedLse.
  void sum_probabilities(int64_t b, int64_t j, int64_t h, int64_t q0, int64_t count, const O* columns) {
    fill(sum, Q, T{1});
    bool large = false;
    for (int64_t i = 0; i < count; ++i) large |= std::isfinite(lse[i]) && std::abs(lse[i]) > kRoundedLse;
    if (!large) return;
    fill(sum, Q, T{0});
    for (int64_t k0 = 0; k0 < keys; k0 += kKeys) {
      const int64_t k1 = std::min(keys, k0 + kKeys);
      compute_logits(b, j, h, q0, count, k0, k1, columns);
      for (int64_t e = 0; e < count; e += lanes) {
        const vec log_sum = load(lse + e);
        const auto empty = log_sum == splat(static_cast<T>(-INFINITY));
        vec total{};
        for (int64_t key = 0; key < k1 - k0; ++key) total += vexp(load(logits + key * Q + e) - log_sum);
        store(sum + e, empty ? splat(T{1}) : load(sum + e) + total);
      }
    }
  }

  // Logits become probabilities; grad_logits, so far grad_out . v, become the gradients of the logits. With the whole
  // row at hand, grad_out . o is taken from the probabilities: o may have been rounded to a half type.
  void softmax_gradient(int64_t count_keys, int64_t vectors, bool whole) {
    const bool exact = p.grad_bias || p.grad_bias_parts || p.grad_key_bias;  // the gradients are wanted as numbers, too
    for (int64_t e = 0; e < vectors; ++e) {
      T *s = logits + e * lanes, *g = grad_logits + e * lanes;
      const vec log_sum = load(lse + e * lanes);
      const auto empty = log_sum == splat(static_cast<T>(-INFINITY));
      vec shift = load(delta + e * lanes), dot{}, total{};
      for (int64_t first = 0; first < count_keys; first += kShortSum) {
        const int64_t last = std::min(count_keys, first + kShortSum);
        vec part_dot{}, part{};
        for (int64_t key = first; key < last; ++key) {
          const vec weight = empty ? vec{} : vexp(load(s + key * Q) - log_sum);
          store(s + key * Q, weight);
          if (whole) part_dot += weight * load(g + key * Q), part += weight;
        }
        dot += part_dot, total += part;
      }
      // Ideally 1: the rounding of lse is no small part of gradients where one key takes all.
      const vec inverse = empty ? vec{} : splat(T{1}) / (whole ? total : load(sum + e * lanes));
      shift += dot * inverse;
      for (int64_t key = 0; key < count_keys; key += deep) {
        vec grads[deep] = {};
        for (int64_t i = 0; i < deep && key + i < count_keys; ++i) {
          const vec weight = load(s + (key + i) * Q) * inverse;
          const int64_t along = (key + i) * operands(Q) + e * operands(lanes);
          grads[i] = weight * (load(g + (key + i) * Q) - shift);
          Pack::put_along(weights_along + along, weight);
          if constexpr (pairs) Pack::put_along(grads_along + along, grads[i]);
          if (!pairs || exact) store(g + (key + i) * Q, grads[i]);
        }
        if constexpr (pairs) Pack::put_across(grads_across + key / deep * Q + e * lanes, grads);
      }
    }
  }

  // One row of D values, rounded to the stored type.
  void write_row(S* out, const T* from, T factor) const {
    int64_t d = 0;
    for (; d + lanes <= p.D; d += lanes) store_as<E>(out + d, load(from + d) * factor);
    if (d < p.D) store_some_as<E>(out + d, load(from + d) * factor, p.D - d);
  }

  // to[query][slot] += grad_logits, or = if it is the first; of slots without a key, zeros are there.
  void add_bias_gradients(T* to, int64_t count, int64_t k0, int64_t k1, bool first) const {
    if (keys == p.S) return move_transposed(grad_logits, Q, k1 - k0, count, to + k0, p.S, !first);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t key = k0; key < k1; ++key) to[i * p.S + slot(key)] += grad_logits[(key - k0) * Q + i];
    }
  }

  void key_bias_gradients(int64_t b, int64_t j, int64_t h, int64_t count, int64_t k0, int64_t k1) const {
    T* to = static_cast<T*>(p.grad_key_bias) + ((b * p.J + j) * p.H + h) * p.Nk;
    for (int64_t key = k0; key < k1; ++key) {
      T total = 0;
      for (int64_t i = 0; i < count; ++i) total += grad_logits[(key - k0) * Q + i];
      to[token(key, b, j, h)] += total;
    }
  }

  void write_grad_query(int64_t b, int64_t j, int64_t h, int64_t q0, int64_t count, T* query_sum, bool first) {
    const T scale = static_cast<T>(p.scale);
    for (int64_t i = 0; i < count; ++i) {
      const T* from = grad_query + i * Dp;
      if (query_sum) {
        T* to = query_sum + (q0 + i) * p.D;
        for (int64_t d = 0; d < p.D; ++d) to[d] = (first ? T{0} : to[d]) + from[d] * scale;
      } else if (p.grad_query.data) {
        write_row(at(p.grad_query, b, j, h) + (q0 + i) * p.grad_query.stride_n, from, scale);
      }
    }
  }

  // Gradients of the packed keys to their slots, or to their tokens: one in several slots gets their sum, in order.
  void write_grad_rows(const HeadsView& to, T* rows, T factor, int64_t b, int64_t j, int64_t h) {
    S* out = at(to, b, j, h);
    const int64_t* start = p.start ? p.start + b * p.start_stride_b : nullptr;
    const int64_t* slots = p.slots + b * p.slots_stride_b;
    if (start) {
      for (int64_t key = 0; key < keys; ++key) place[slot(key)] = key;
    }
    fill(out_rows, Dp, T{0});
    for (int64_t n = 0, key = 0; n < key_grads; ++n) {
      const bool absent = by_slot ? key == keys || slot(key) != n : masked<T>(p, b, j, n);
      T* row = out_rows;  // zeros
      if (!absent && !start) row = rows + key++ * Dp;
      if (!absent && start && start[n] < start[n + 1]) {
        row = rows + place[slots[start[n]]] * Dp;
        for (int64_t e = start[n] + 1; e < start[n + 1]; ++e) {
          const T* other = rows + place[slots[e]] * Dp;
          for (int64_t d = 0; d < Dp; d += lanes) store(row + d, load(row + d) + load(other + d));
        }
      }
      write_row(out + n * to.stride_n, row, factor);
    }
  }
};

template <class E, class O>
void forward_items(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  Core<E, O> core(p, scratch, false);
  const int64_t sequences = p.B * p.J;
  const auto item = [&](int64_t t) {
    // The inner loop is over heads, since a token's lie side by side; with one query for all, over sequences.
    const int64_t s = core.shared_query ? t % sequences : t / p.H, h = core.shared_query ? t / sequences : t % p.H;
    return Item{s / p.J, s % p.J, h};
  };
  for (int64_t t = begin; t < end; ++t) core.forward(item(t), item(t + 1 < end ? t + 1 : t));
}

template <class E, class O>
void backward_items(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  using T = typename E::Compute;
  Core<E, O> core(p, scratch, true);
  const int64_t sequences = p.B * p.J;
  const auto item = [&](int64_t s, int64_t h) { return Item{s / p.J, s % p.J, h}; };
  for (int64_t t = begin; t < end; ++t) {
    if (p.parts == 0) {
      const int64_t next = t + 1 < end ? t + 1 : t;
      core.backward(item(t / p.H, t % p.H), item(next / p.H, next % p.H), nullptr, nullptr, true);
      continue;
    }
    const int64_t part = t / p.H, h = t % p.H, stop = (part + 1) * sequences / p.parts;
    T* query_sum = p.grad_query_parts ? static_cast<T*>(p.grad_query_parts) + t * p.Nq * p.D : nullptr;
    T* bias_sum = p.grad_bias_parts ? static_cast<T*>(p.grad_bias_parts) + t * p.Nq * p.S : nullptr;
    const int64_t start = part * sequences / p.parts;
    for (int64_t s = start; s < stop; ++s) {
      core.backward(item(s, h), item(s + 1 < stop ? s + 1 : s, h), query_sum, bias_sum, s == start);
    }
  }
}

}  // namespace
}  // namespace hotkernels::HK_ISA
