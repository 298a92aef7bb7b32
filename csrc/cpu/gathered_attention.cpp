// gathered_attention: the core of attention.h for dense keys and sets, and here keys chosen per query.
//
// Queries with keys of their own share nothing, so each reads its keys where they lie, for all heads in turn: a token's
// heads are neighbours in memory. The dot products of a register's worth of keys are summed across lanes together.
// Backward walks the queries first (probabilities and grad_logits of their slots, grad_query), then the keys: each key
// sums over the slots that name it, which the inverted index lists in ascending order. It finds what a slot has for all
// heads side by side, in one or two cache lines.
#include "hotkernels/gathered_attention.h"

#include "attention.h"

namespace hotkernels::HK_ISA {
namespace {

template <class E>
struct PerQuery {
  using T = typename E::Compute;
  using S = typename E::Stored;
  using vec = Vec<E>;
  static constexpr int64_t lanes = kLanes<E>;

  const Attention& p;
  const int64_t Dp = round_up(p.D, lanes), Sp = round_up(p.S, lanes);
  int64_t* tokens;    // [Sp] keys present, then repeats of the first
  int64_t* present;   // [Sp] their slots
  T *row, *row2;      // [Dp] this query, packed; another row
  T *logits, *other;  // [Sp]
  int64_t keys = 0;

  PerQuery(const Attention& p, void* scratch, int64_t* bytes = nullptr) : p(p) {
    Arena a{reinterpret_cast<uintptr_t>(scratch)};
    tokens = a.take<int64_t>(Sp), present = a.take<int64_t>(Sp);
    row = a.take<T>(Dp), row2 = a.take<T>(Dp);
    logits = a.take<T>(Sp), other = a.take<T>(Sp);
    if (bytes) *bytes = static_cast<int64_t>(a.next);
  }

  static S* at(const HeadsView& x, int64_t b, int64_t j, int64_t h, int64_t n) {
    return static_cast<S*>(x.data) + b * x.stride_b + j * x.stride_j + h * x.stride_h + n * x.stride_n;
  }

  // Elements d .. d + lanes - 1 of a row, zeros past its end.
  vec part(const S* x, int64_t d) const { return load_up_to<E>(x + d, p.D - d); }

  void take_index(int64_t b, int64_t j, int64_t h, int64_t i) {
    const int64_t* index =
        p.index + b * p.index_stride_b + j * p.index_stride_j + h * p.index_stride_h + i * p.index_stride_q;
    keys = 0;
    for (int64_t s = 0; s < p.S; ++s) {
      if (index[s] >= 0 && !masked<T>(p, b, j, index[s])) tokens[keys] = index[s], present[keys++] = s;
    }
    for (int64_t s = keys; s < round_up(keys, lanes); ++s) tokens[s] = tokens[0];
  }

  // out[key] = <query, x[tokens[key]]>.
  void dots(const HeadsView& x, int64_t b, int64_t j, int64_t h, const T* query, T* out) const {
    const S* base = at(x, b, j, h, 0);
    for (int64_t first = 0; first < keys; first += lanes) {
      const S* from[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) from[l] = base + tokens[first + l] * x.stride_n;
      vec acc[lanes] = {};
      int64_t d = 0;
      for (; d + lanes <= p.D; d += lanes) {
        const vec q = load(query + d);
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) acc[l] += q * load_as<E>(from[l] + d);
      }
      if (d < p.D) {
        const vec q = load(query + d);
        for (int64_t l = 0; l < lanes; ++l) acc[l] += q * load_some_as<E>(from[l] + d, p.D - d);
      }
      store(out + first, sums_across<T>(acc));
    }
  }

  // The sum of term(i) for i < count. Long sums are sums of short ones: one token may fill many slots, and roundings of
  // equal terms all go the same way.
  template <class Term>
  static T sum_of(int64_t count, const Term& term) {
    T total = 0;
    for (int64_t first = 0; first < count; first += kShortSum) {
      const int64_t last = std::min(count, first + kShortSum);
      T part = 0;
      for (int64_t i = first; i < last; ++i) part += term(i);
      total += part;
    }
    return total;
  }

  // put(d, sum of weight(i) * row(i)[d] for i < count) for every vector d of a row.
  template <class Weight, class Row, class Put>
  void sum_rows(int64_t count, const Weight& weight, const Row& row, const Put& put) const {
    const auto vectors = [&](auto width, int64_t d, const auto& load_at) {
      constexpr int V = decltype(width)::value;
      vec total[V] = {};
      for (int64_t first = 0; first < count; first += kShortSum) {
        const int64_t last = std::min(count, first + kShortSum);
        vec acc[V] = {};
        for (int64_t i = first; i < last; ++i) {
          const S* from = row(i);
          const vec w = splat(weight(i));
#pragma GCC unroll 4
          for (int64_t e = 0; e < V; ++e) acc[e] += w * load_at(from, d + e * lanes);
        }
        for (int64_t e = 0; e < V; ++e) total[e] += acc[e];
      }
      for (int64_t e = 0; e < V; ++e) put(d + e * lanes, total[e]);
    };
    int64_t d = 0;
    for (; d + 4 * lanes <= p.D; d += 4 * lanes) {
      vectors(std::integral_constant<int, 4>(), d, [](const S* from, int64_t at) { return load_as<E>(from + at); });
    }
    for (; d < p.D; d += lanes) {
      vectors(std::integral_constant<int, 1>(), d, [&](const S* from, int64_t at) { return part(from, at); });
    }
  }

  // put(d, sum of weights[key] * x[tokens[key]]) for every vector d of the row.
  template <class Put>
  void weighted_sum(const HeadsView& x, int64_t b, int64_t j, int64_t h, const T* weights, const Put& put) const {
    const S* base = at(x, b, j, h, 0);
    sum_rows(
        keys, [&](int64_t key) { return weights[key]; },
        [&](int64_t key) { return base + tokens[key] * x.stride_n; }, put);
  }

  void write(S* out, int64_t d, vec value) const {
    if (d + lanes <= p.D) store_as<E>(out + d, value); else store_some_as<E>(out + d, value, p.D - d);
  }

  // Logits of one query and head. row holds the scaled query.
  void compute_logits(int64_t b, int64_t j, int64_t h, int64_t i) {
    pack_row<E>(at(p.query, b, j, h, i), p.D, static_cast<T>(p.scale), row);
    dots(p.key, b, j, h, row, logits);
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + b * p.bias_stride_b + j * p.bias_stride_j + h * p.bias_stride_h +
                      i * p.bias_stride_q;
      for (int64_t key = 0; key < keys; ++key) logits[key] += bias[present[key] * p.bias_stride_s];
    }
    if (const T* bias = key_bias_of<T>(p, b, j)) {
      for (int64_t key = 0; key < keys; ++key) logits[key] += bias[tokens[key] * p.key_bias_stride_n];
    }
  }

  // logits[key] becomes exp(logits[key] - shift), and 0 past the last key.
  void exponentials(T shift) {
    for (int64_t s = keys; s < round_up(keys, lanes); ++s) logits[s] = static_cast<T>(-INFINITY);
    for (int64_t s = 0; s < keys; s += lanes) store(logits + s, vexp(load(logits + s) - shift));
  }

  void forward(int64_t b, int64_t j, int64_t i) {
    for (int64_t h = 0; h < p.H; ++h) {
      if (h == 0 || p.index_stride_h != 0) take_index(b, j, h, i);
      compute_logits(b, j, h, i);
      T top = static_cast<T>(-INFINITY);
      for (int64_t key = 0; key < keys; ++key) top = logits[key] > top ? logits[key] : top;
      exponentials(top == static_cast<T>(-INFINITY) ? T{0} : top);
      const T sum = sum_of(keys, [&](int64_t key) { return logits[key]; });
      const T inverse = sum == 0 ? T{0} : T{1} / sum;
      S* out = at(p.out, b, j, h, i);
      weighted_sum(p.value, b, j, h, logits, [&](int64_t d, vec value) { write(out, d, value * inverse); });
      static_cast<T*>(p.lse)[((b * p.J + j) * p.H + h) * p.Nq + i] =
          sum == 0 ? static_cast<T>(-INFINITY) : top + std::log(sum);
    }
  }

  void backward_query(int64_t b, int64_t j, int64_t i) {
    for (int64_t h = 0; h < p.H; ++h) {
      if (h == 0 || p.index_stride_h != 0) take_index(b, j, h, i);
      const int64_t at_row = ((b * p.J + j) * p.H + h) * p.Nq + i;
      T* const pairs = static_cast<T*>(p.pairs) + (((b * p.J + j) * p.Nq + i) * p.S * p.H + h) * 2;
      T* const grad_bias = p.grad_bias ? static_cast<T*>(p.grad_bias) + at_row * p.S : nullptr;
      const T log_sum = static_cast<const T*>(p.lse)[at_row];
      if (grad_bias && keys < p.S) fill(grad_bias, p.S, T{0});
      compute_logits(b, j, h, i);
      if (log_sum == static_cast<T>(-INFINITY)) fill(logits, keys, T{0}); else exponentials(log_sum);
      pack_row<E>(at(p.grad_out, b, j, h, i), p.D, T{1}, row2);
      dots(p.value, b, j, h, row2, other);
      // Ideally 1: the rounding of lse is no small part of gradients where one key takes all.
      const T total = sum_of(keys, [&](int64_t key) { return logits[key]; });
      const T inverse = total == 0 ? T{0} : T{1} / total;
      for (int64_t key = 0; key < keys; ++key) logits[key] *= inverse;
      // grad_out . out, from the probabilities: out may have been rounded to a half type.
      T delta = sum_of(keys, [&](int64_t key) { return logits[key] * other[key]; });
      if (p.grad_lse) delta -= static_cast<const T*>(p.grad_lse)[at_row];
      for (int64_t key = 0; key < keys; ++key) {
        other[key] = logits[key] * (other[key] - delta);
        T* pair = pairs + present[key] * p.H * 2;
        pair[0] = logits[key], pair[1] = other[key];
        if (grad_bias) grad_bias[present[key]] = other[key];
      }
      if (!p.grad_query.data) continue;
      S* grad = at(p.grad_query, b, j, h, i);
      const T scale = static_cast<T>(p.scale);
      weighted_sum(p.key, b, j, h, other, [&](int64_t d, vec value) { write(grad, d, value * scale); });
    }
  }

  // One token's gradients: its queries in ascending order.
  void backward_key(int64_t b, int64_t j, int64_t n) {
    const bool absent = masked<T>(p, b, j, n);
    for (int64_t h = 0; h < p.H; ++h) {
      const int64_t* start = p.start + b * p.start_stride_b + j * p.start_stride_j + h * p.start_stride_h + n;
      const int64_t* slots = p.slots + b * p.slots_stride_b + j * p.slots_stride_j + h * p.slots_stride_h;
      const T* const pairs = static_cast<const T*>(p.pairs) + ((b * p.J + j) * p.Nq * p.S * p.H + h) * 2;
      const int64_t* const mine = slots + start[0];
      const int64_t count = absent ? 0 : start[1] - start[0];  // a masked key's pairs were not written
      const auto sum = [&](const HeadsView& x, const T* weights, HeadsView to, T scale) {
        if (!to.data) return;
        const S* base = at(x, b, j, h, 0);
        sum_rows(
            count, [&](int64_t e) { return weights[mine[e] * p.H * 2]; },
            [&](int64_t e) { return base + mine[e] / p.S * x.stride_n; },
            [&](int64_t d, vec value) { write(at(to, b, j, h, n), d, value * scale); });
      };
      sum(p.query, pairs + 1, p.grad_key, static_cast<T>(p.scale));
      sum(p.grad_out, pairs, p.grad_value, T{1});
      if (p.grad_key_bias) {
        static_cast<T*>(p.grad_key_bias)[((b * p.J + j) * p.H + h) * p.Nk + n] =
            sum_of(count, [&](int64_t e) { return pairs[mine[e] * p.H * 2 + 1]; });
      }
    }
  }
};

// Calls body<E, O>() for a problem's elements and the operands of its products.
template <class Body>
void with_operands(const Attention& p, const Body& body) {
#if HK_BF16_PAIRS && defined(__AVX512F__)
  if (p.dtype == DType::bf16 && p.bf16_pairs) return body.template operator()<BF16, Pair>();
#endif
  with_element(p.dtype, [&](auto element) {
    body.template operator()<decltype(element), typename decltype(element)::Compute>();
  });
}

// Calls step(worker, b, j, i) for tokens [begin, end) of B * J * per.
template <class Step>
void each_token(const Attention& p, int64_t per, int64_t begin, int64_t end, void* scratch, const Step& step) {
  with_element(p.dtype, [&](auto element) {
    PerQuery<decltype(element)> worker(p, scratch);
    for (int64_t t = begin; t < end; ++t) step(worker, t / per / p.J, t / per % p.J, t % per);
  });
}

}  // namespace

int64_t attention_scratch(const Attention& p, bool backward) {
  int64_t bytes = 0;
  with_operands(p, [&]<class E, class O>() { Core<E, O>(p, nullptr, backward, &bytes); });
  return bytes;
}

void attention_fwd(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  with_operands(p, [&]<class E, class O>() { forward_items<E, O>(p, begin, end, scratch); });
}

void attention_bwd(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  with_operands(p, [&]<class E, class O>() { backward_items<E, O>(p, begin, end, scratch); });
}

int64_t attention_per_query_scratch(const Attention& p) {
  int64_t bytes = 0;
  with_element(p.dtype, [&](auto element) { PerQuery<decltype(element)>(p, nullptr, &bytes); });
  return bytes;
}

void attention_per_query_fwd(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  each_token(p, p.Nq, begin, end, scratch,
             [](auto& worker, int64_t b, int64_t j, int64_t i) { worker.forward(b, j, i); });
}

void attention_per_query_bwd_queries(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  each_token(p, p.Nq, begin, end, scratch,
             [](auto& worker, int64_t b, int64_t j, int64_t i) { worker.backward_query(b, j, i); });
}

void attention_per_query_bwd_keys(const Attention& p, int64_t begin, int64_t end, void* scratch) {
  each_token(p, p.Nk, begin, end, scratch,
             [](auto& worker, int64_t b, int64_t j, int64_t n) { worker.backward_key(b, j, n); });
}

}  // namespace hotkernels::HK_ISA
