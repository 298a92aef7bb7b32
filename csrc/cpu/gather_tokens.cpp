// gather_tokens and its backward: one read and one write per element.
#include "hotkernels/gather_tokens.h"

#include "element.h"

namespace hotkernels::HK_ISA {

void gather_tokens_fwd(const GatherTokens& p, int64_t begin, int64_t end) {
  const char* x = static_cast<const char*>(p.x);
  char* out = static_cast<char*>(p.out);
  const bool whole = p.x_stride_r == p.C;  // a token is one run
  const int64_t rows = whole ? 1 : p.R, row_bytes = (whole ? p.R * p.C : p.C) * p.item_size;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / p.M, n = p.index[t];
    const int64_t token = b * p.x_stride_b + n * p.x_stride_n;
    if (p.pos == nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        char* to = out + t * p.R * p.C * p.item_size + r * row_bytes;
        if (n < 0) {
          memset(to, 0, static_cast<size_t>(row_bytes));
        } else {
          memcpy(to, x + (token + r * p.x_stride_r) * p.item_size, static_cast<size_t>(row_bytes));
        }
      }
      continue;
    }
    with_element(p.dtype, [&](auto element) {
      using E = decltype(element);
      using T = typename E::Stored;
      const T* pos = static_cast<const T*>(p.pos) + t % p.M * p.C;
      for (int64_t r = 0; r < p.R; ++r) {
        T* to = static_cast<T*>(p.out) + (t * p.R + r) * p.C;
        if (n < 0) {
          memcpy(to, pos, static_cast<size_t>(p.C) * sizeof(T));
        } else {
          const T* from = static_cast<const T*>(p.x) + token + r * p.x_stride_r;
          each_vector<E>(p.C, [&](int64_t c, auto count) {
            store_as<E>(to + c, load_as<E>(from + c, count) + load_as<E>(pos + c, count), count);
          });
        }
      }
    });
  }
}

namespace {

// K registers of the sum over the rows that slots [slot, end) name; there is at least one. `count` as in each_vector.
template <class E, int K, class T, class Count>
inline void sum_rows(T* to, const T* rows, int64_t stride, const int64_t* slot, const int64_t* end, Count count) {
  constexpr int lanes = kLanes<E>;
  Vec<E> sum[K];
  for (int k = 0; k < K; ++k) sum[k] = load_as<E>(rows + *slot * stride + k * lanes, count);
  while (++slot < end) {
    for (int k = 0; k < K; ++k) sum[k] += load_as<E>(rows + *slot * stride + k * lanes, count);
  }
  for (int k = 0; k < K; ++k) store_as<E>(to + k * lanes, sum[k], count);
}

}  // namespace

void gather_tokens_bwd(const GatherTokensGrad& p, int64_t begin, int64_t end) {
  const bool whole = p.R == 1 || p.grad_stride_r == p.C;  // a token's gradient is one run
  const int64_t rows = whole ? 1 : p.R, row = whole ? p.R * p.C : p.C;
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Stored;
    constexpr int lanes = kLanes<E>;
    const auto token = [&](T* to, const T* grad, const int64_t* slot, const int64_t* last) {
      if (last - slot == 1) {
        memcpy(to, grad + *slot * p.grad_stride_m, static_cast<size_t>(row) * sizeof(T));
        return;
      }
      int64_t c = 0;
      for (; c + 8 * lanes <= row; c += 8 * lanes) {
        sum_rows<E, 8>(to + c, grad + c, p.grad_stride_m, slot, last, Whole{});
      }
      each_vector<E>(row - c, [&](int64_t d, auto count) {
        sum_rows<E, 1>(to + c + d, grad + c + d, p.grad_stride_m, slot, last, count);
      });
    };
    for (int64_t t = begin; t < end;) {
      const int64_t b = t / p.N, last = end - b * p.N < p.N ? end - b * p.N : p.N;
      const int64_t *start = p.start + b * (p.N + 1), *slots = p.slots + b * p.M;
      const T* grad = static_cast<const T*>(p.grad_out) + b * p.grad_stride_b;
      for (int64_t n = t - b * p.N; n < last;) {
        T* to = static_cast<T*>(p.grad_x) + (b * p.N + n) * p.R * p.C;
        int64_t unused = n;
        while (unused < last && start[unused + 1] == start[unused]) ++unused;
        if (unused > n) {
          memset(to, 0, static_cast<size_t>((unused - n) * p.R * p.C) * sizeof(T));
          n = unused;
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
          token(to + r * row, grad + r * p.grad_stride_r, slots + start[n], slots + start[n + 1]);
        }
        ++n;
      }
      t = b * p.N + last;
    }
  });
}

}  // namespace hotkernels::HK_ISA
