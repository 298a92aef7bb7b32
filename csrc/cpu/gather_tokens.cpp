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
          for (int64_t c = 0; c < p.C; ++c) to[c] = E::put(E::get(from[c]) + E::get(pos[c]));
        }
      }
    });
  }
}

void gather_tokens_bwd(const GatherTokensGrad& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Stored;
    constexpr int64_t kChunk = 256;  // sums of half types wait here, in float32
    typename E::Compute sum[kChunk];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / p.N, n = t % p.N;
      const int64_t* start = p.start + b * (p.N + 1) + n;
      const int64_t* slots = p.slots + b * p.M;
      for (int64_t r = 0; r < p.R; ++r) {
        T* to = static_cast<T*>(p.grad_x) + (t * p.R + r) * p.C;
        const T* grad = static_cast<const T*>(p.grad_out) + b * p.grad_stride_b + r * p.grad_stride_r;
        const int64_t uses = start[1] - start[0];
        if (uses == 0) {
          memset(to, 0, static_cast<size_t>(p.C) * sizeof(T));
        } else if (uses == 1) {
          memcpy(to, grad + slots[start[0]] * p.grad_stride_m, static_cast<size_t>(p.C) * sizeof(T));
        } else {
          for (int64_t c = 0; c < p.C; c += kChunk) {
            const int64_t count = p.C - c < kChunk ? p.C - c : kChunk;
            for (int64_t e = 0; e < count; ++e) sum[e] = 0;
            for (int64_t u = start[0]; u < start[1]; ++u) {
              const T* from = grad + slots[u] * p.grad_stride_m + c;
              for (int64_t e = 0; e < count; ++e) sum[e] += E::get(from[e]);
            }
            for (int64_t e = 0; e < count; ++e) to[c + e] = E::put(sum[e]);
          }
        }
      }
    }
  });
}

}  // namespace hotkernels::HK_ISA
