// gathered_attention on the CPU, and what recovery_attention shares with it.
#include "gathered_attention.h"

#include <algorithm>

namespace hotkernels {
namespace {

constexpr int64_t kMaxHeadDim = 256;
// Runs of sequences that sum a batch-free gradient, at most, and runs times heads: enough for as many threads, at the
// cost of a sum each.
constexpr int64_t kMostParts = 16, kSummingItems = 64;

bool contiguous_last(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }

Tensor with_contiguous_last(const Tensor& t) { return contiguous_last(t) ? t : torch::stable::contiguous(t); }

// The stride of a dim, 0 where its size is 1.
int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

// Checks that start and slots list all slots of each token, in ascending order.
void check_inverse(const Tensor& index, const Tensor& start, const Tensor& slots, int64_t Nk, int64_t entries,
                   const char* op) {
  const int64_t *tokens = index.const_data_ptr<int64_t>(), *of = slots.const_data_ptr<int64_t>();
  const int64_t* begin = start.const_data_ptr<int64_t>();
  for (int64_t row = 0, rows = index.numel() / entries; row < rows; ++row) {
    const auto present = std::count_if(tokens, tokens + entries, [](int64_t token) { return token >= 0; });
    HK_CHECK(begin[0] == 0 && begin[Nk] == present, op, "start and slots", "the inverse of this index",
             begin[Nk] - begin[0] << " entries");
    for (int64_t n = 0; n < Nk; ++n) {
      bool good = begin[n] <= begin[n + 1] && begin[n + 1] <= present;
      for (int64_t e = begin[n]; good && e < begin[n + 1]; ++e) {
        good = of[e] >= 0 && of[e] < entries && tokens[of[e]] == n && (e == begin[n] || of[e - 1] < of[e]);
      }
      HK_CHECK(good, op, "start and slots", "the inverse of this index", "others for token " << n);
    }
    tokens += entries, of += entries, begin += Nk + 1;
  }
}

struct Problem {
  Attention p{};
  Tensor query, key, value;
  int64_t batch_dims;

  explicit Problem(const AttentionArgs& a)
      : query(with_contiguous_last(a.query)), key(with_contiguous_last(a.key)), value(with_contiguous_last(a.value)) {
    const char* op = a.op;
    HK_CHECK(key.dim() == 4 || key.dim() == 5, op, "key", "[*batch, H, Nk, D] with one or two batch dims",
             shape_of(key));
    batch_dims = key.dim() - 3;
    const int64_t last = key.dim() - 1;
    p.B = key.size(0), p.J = batch_dims == 2 ? key.size(1) : 1;
    p.H = key.size(last - 2), p.Nk = key.size(last - 1), p.D = key.size(last);
    HK_CHECK(query.dim() == key.dim() || query.dim() == 3, op, "query", "[*batch, H, Nq, D] with key's batch",
             shape_of(query));
    p.Nq = query.size(query.dim() - 2);
    check_heads(query, op, "query", p.Nq, query.dim() == 3);
    check_heads(value, op, "value", p.Nk);
    HK_CHECK(p.Nq >= 1, op, "query", "of at least one token", shape_of(query));
    HK_CHECK(p.Nk >= 1, op, "key", "of at least one token", shape_of(key));
    HK_CHECK(1 <= p.D && p.D <= kMaxHeadDim, op, "query", "of a head dim in [1, " << kMaxHeadDim << "]", p.D);
    p.dtype = dtype_of(query, op, "query");
    p.bf16_pairs = isa() == Isa::avx512_bf16;
    check_dtypes(key, value, op, "key and value");
    p.query = view(query), p.key = view(key), p.value = view(value);
    p.scale = a.scale;
    p.S = p.Nk;
    if (a.index) take_index(*a.index, op);
    if (a.bias) {
      const int64_t n = a.bias->dim();
      check_compute(*a.bias, op, "bias");
      HK_CHECK(n == key.dim() && fits(a.bias->size(0), p.B) && (batch_dims == 1 || fits(a.bias->size(1), p.J)) &&
                   fits(a.bias->size(n - 3), p.H) && fits(a.bias->size(n - 2), p.Nq) && fits(a.bias->size(n - 1), p.S),
               op, "bias", "broadcastable to [*batch, H, Nq = " << p.Nq << ", slots = " << p.S << "]",
               shape_of(*a.bias));
      p.bias = a.bias->const_data_ptr();
      p.bias_stride_b = stride_of(*a.bias, 0), p.bias_stride_j = stride_j(*a.bias);
      p.bias_stride_h = stride_of(*a.bias, n - 3), p.bias_stride_q = stride_of(*a.bias, n - 2);
      p.bias_stride_s = stride_of(*a.bias, n - 1);
    }
    if (a.key_bias) {
      const int64_t n = a.key_bias->dim();
      check_compute(*a.key_bias, op, "key_bias");
      HK_CHECK(n == batch_dims + 1 && fits(a.key_bias->size(0), p.B) &&
                   (batch_dims == 1 || fits(a.key_bias->size(1), p.J)) && a.key_bias->size(n - 1) == p.Nk,
               op, "key_bias", "[*batch, Nk = " << p.Nk << "]", shape_of(*a.key_bias));
      p.key_bias = a.key_bias->const_data_ptr();
      p.key_bias_stride_b = stride_of(*a.key_bias, 0);
      p.key_bias_stride_j = stride_j(*a.key_bias);
      p.key_bias_stride_n = stride_of(*a.key_bias, n - 1);
    }
  }

  HeadsView view(const Tensor& t) const {
    const int64_t n = t.dim();
    const bool batched = n > 3;
    return {const_cast<void*>(t.const_data_ptr()), batched ? stride_of(t, 0) : 0,
            batched ? stride_j(t) : 0, stride_of(t, n - 3), t.stride(n - 2)};
  }

  // Part `which` of a contiguous [B, N, (J,) 3, H, D].
  HeadsView packed_view(Tensor& t, int64_t which) const {
    const int64_t row = 3 * p.H * p.D, item = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    return {static_cast<char*>(t.mutable_data_ptr()) + which * p.H * p.D * item, p.Nq * p.J * row, row, p.D, p.J * row};
  }

  // [*batch, H, N, D] stored [B, N, (J,) H, D]: flattening the heads is a free view.
  Tensor token_major(const Tensor& like, int64_t N) const {
    if (batch_dims == 1) return torch::stable::transpose(allocate(like, {p.B, N, p.H, p.D}), 1, 2);
    Tensor t = allocate(like, {p.B, N, p.J, p.H, p.D});
    return torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3);
  }

  std::vector<int64_t> per_head(std::initializer_list<int64_t> rest) const {
    std::vector<int64_t> shape{p.B};
    if (batch_dims == 2) shape.push_back(p.J);
    shape.push_back(p.H);
    shape.insert(shape.end(), rest);
    return shape;
  }

  void check_heads(const Tensor& t, const char* op, const char* arg, int64_t N, bool shared = false) const {
    const int64_t n = t.dim();
    const bool same_batch = shared || (n == key.dim() && t.size(0) == p.B && (batch_dims == 1 || t.size(1) == p.J));
    HK_CHECK(t.is_cpu() && same_batch && t.size(n - 3) == p.H && t.size(n - 2) == N && t.size(n - 1) == p.D, op, arg,
             "a CPU tensor [*batch, H = " << p.H << ", N = " << N << ", D = " << p.D << "] of key's batch",
             shape_of(t));
  }

  void check_dtypes(const Tensor& one, const Tensor& other, const char* op, const char* args) const {
    HK_CHECK(one.scalar_type() == query.scalar_type() && other.scalar_type() == query.scalar_type(), op, args,
             "of query's dtype " << name_of(query.scalar_type()),
             name_of(one.scalar_type()) << " and " << name_of(other.scalar_type()));
  }

  // Takes what invert_index made of the index, whose range the constructor has checked.
  void take_inverse(const Tensor& index, const std::optional<Tensor>& start, const std::optional<Tensor>& slots,
                    const char* op) {
    const bool set = !p.index_per_query;
    const int64_t n = index.dim() - (set ? 0 : 1), entries = set ? p.S : p.Nq * p.S;
    const auto as_returned = [&](const std::optional<Tensor>& t, int64_t last) {
      bool good = t && t->is_contiguous() && t->scalar_type() == ScalarType::Long && t->dim() == n;
      for (int64_t d = 0; good && d + 1 < n; ++d) good = t->size(d) == index.size(d);
      return good && t->size(n - 1) == last;
    };
    const auto shape = [](const std::optional<Tensor>& t) { return t ? shape_of(*t) : "none"; };
    HK_CHECK(as_returned(start, p.Nk + 1) && as_returned(slots, entries), op, "start and slots",
             "as invert_index returns them for this index with dims = " << (set ? 1 : 2),
             shape(start) << " and " << shape(slots));
    check_inverse(index, *start, *slots, p.Nk, entries, op);
    p.start = start->const_data_ptr<int64_t>(), p.slots = slots->const_data_ptr<int64_t>();
    p.start_stride_b = stride_of(*start, 0), p.slots_stride_b = stride_of(*slots, 0);
    if (!set) p.start_stride_j = stride_j(*start), p.slots_stride_j = stride_j(*slots);
    if (n == batch_dims + 2) p.start_stride_h = stride_of(*start, n - 2), p.slots_stride_h = stride_of(*slots, n - 2);
  }

 private:
  int64_t stride_j(const Tensor& t) const { return batch_dims == 2 ? stride_of(t, 1) : 0; }

  static bool fits(int64_t size, int64_t full) { return size == 1 || size == full; }

  void check_compute(const Tensor& t, const char* op, const char* arg) const {
    const ScalarType type = compute_type(p.dtype);
    HK_CHECK(t.is_cpu() && t.scalar_type() == type, op, arg, "a CPU tensor of " << name_of(type),
             name_of(t.scalar_type()));
  }

  void take_index(const Tensor& index, const char* op) {
    const int64_t n = index.dim();
    check_tensor(index, key, op, "index", ScalarType::Long, sizes_of(index));
    const bool set = n == 2, per_query = n == batch_dims + 2, per_head = n == batch_dims + 3;
    HK_CHECK(set || per_query || per_head, op, "index",
             "[B, M] (keys per sample), [*batch, Nq, K] (per query) or [*batch, H, Nq, K] (per head and query)",
             shape_of(index));
    p.S = index.size(n - 1);
    HK_CHECK(p.S >= 1 && fits(index.size(0), p.B), op, "index", "of batch " << p.B << " and at least one slot",
             shape_of(index));
    p.index = index.const_data_ptr<int64_t>();
    p.index_stride_b = stride_of(index, 0);
    if (!set) {
      HK_CHECK(index.size(n - 2) == p.Nq && (batch_dims == 1 || fits(index.size(1), p.J)) &&
                   (per_query || fits(index.size(n - 3), p.H)),
               op, "index", "of query's batch, heads and Nq = " << p.Nq, shape_of(index));
      p.index_per_query = true;
      p.index_stride_j = stride_j(index);
      p.index_stride_h = per_head ? stride_of(index, n - 3) : 0;
      p.index_stride_q = stride_of(index, n - 2);
    }
    check_index_range(index, p.Nk, op, "index");
  }
};

using Kernel = void (*)(const Attention&, int64_t, int64_t, void*);

// Runs a kernel over its work items, each thread with scratch of its own.
void run(const Attention& p, int64_t items, int64_t grain, int64_t scratch_bytes, Kernel kernel, const Tensor& like) {
  parallel(items, grain, [&](int64_t begin, int64_t end) {
    kernel(p, begin, end, Scratch(like, scratch_bytes).data);
  });
}

// The sum over the first dim, in order.
Tensor sum_parts(const Tensor& parts, const std::vector<int64_t>& shape) {
  Tensor sum = allocate(parts, shape);
  const int64_t count = parts.size(0), size = sum.numel();
  const auto add = [&](auto* to, const auto* from) {
    parallel(size, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += 1024) {  // what fits the nearest cache
        const int64_t last = std::min(end, first + 1024);
        for (int64_t i = first; i < last; ++i) to[i] = 0;
        for (int64_t part = 0; part < count; ++part) {
          for (int64_t i = first; i < last; ++i) to[i] += from[part * size + i];
        }
      }
    });
  };
  if (sum.scalar_type() == ScalarType::Double) {
    add(sum.mutable_data_ptr<double>(), parts.const_data_ptr<double>());
  } else {
    add(sum.mutable_data_ptr<float>(), parts.const_data_ptr<float>());
  }
  return sum;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const AttentionArgs& args) {
  Problem problem(args);
  Attention& p = problem.p;
  Tensor out = problem.token_major(problem.query, p.Nq);
  Tensor lse = allocate(problem.query, problem.per_head({p.Nq}), compute_type(p.dtype));
  p.out = problem.view(out), p.lse = lse.mutable_data_ptr();
  const Isa set = isa();
  if (p.index_per_query) {
    run(p, p.B * p.J * p.Nq, 16, HK_CPU_DISPATCH(set, attention_per_query_scratch)(p),
        HK_CPU_DISPATCH(set, attention_per_query_fwd), out);
  } else {
    run(p, p.B * p.J * p.H, 1, HK_CPU_DISPATCH(set, attention_scratch)(p, false),
        HK_CPU_DISPATCH(set, attention_fwd), out);
  }
  return {out, lse};
}

AttentionGrads attention_backward(const AttentionArgs& args, const Tensor& grad_out_given,
                                  const std::optional<Tensor>& grad_lse_given, const Tensor& out, const Tensor& lse,
                                  const std::optional<Tensor>& start, const std::optional<Tensor>& slots,
                                  bool need_bias, bool need_key_bias, Tensor* packed) {
  Problem problem(args);
  Attention& p = problem.p;
  const char* op = args.op;
  const Tensor grad_out = with_contiguous_last(grad_out_given);
  problem.check_heads(grad_out, op, "grad_out", p.Nq);
  problem.check_heads(out, op, "out", p.Nq);
  problem.check_dtypes(out, grad_out, op, "out and grad_out");
  HK_CHECK(contiguous_last(out), op, "out", "contiguous in its last dim", "stride " << out.stride(out.dim() - 1));
  const ScalarType compute = compute_type(p.dtype);
  check_tensor(lse, problem.key, op, "lse", compute, problem.per_head({p.Nq}));
  p.out = problem.view(out), p.grad_out = problem.view(grad_out);
  p.lse = const_cast<void*>(lse.const_data_ptr());
  std::optional<Tensor> grad_lse;
  if (grad_lse_given) {
    grad_lse = torch::stable::contiguous(*grad_lse_given);
    check_tensor(*grad_lse, problem.key, op, "grad_lse", compute, problem.per_head({p.Nq}));
    p.grad_lse = grad_lse->const_data_ptr();
  }
  const bool by_slot = args.index && !p.index_per_query && !start && !slots;
  HK_CHECK(!by_slot || !need_key_bias, op, "start and slots", "given where key_bias needs a gradient", "none");
  if (args.index && !by_slot) problem.take_inverse(*args.index, start, slots, op);

  const Tensor& like = problem.query;
  const bool shared_query = like.dim() == 3;
  const bool sum_bias = need_bias && args.bias && !p.index_per_query && args.bias->size(0) == 1 &&
                        (problem.batch_dims == 1 || args.bias->size(1) == 1);
  const auto zeros = [&](const std::vector<int64_t>& shape) { return torch::stable::new_zeros(like, shape, compute); };
  const auto none = [&] { return zeros({0}); };  // a tensor each: outputs of an operator share no memory
  AttentionGrads grads{none(), none(), none(), none(), none()};
  if (packed) {
    p.grad_query = problem.packed_view(*packed, 0);
    p.grad_key = problem.packed_view(*packed, 1), p.grad_value = problem.packed_view(*packed, 2);
  } else {
    if (!shared_query) grads.query = problem.token_major(like, p.Nq), p.grad_query = problem.view(grads.query);
    const int64_t rows = by_slot ? p.S : p.Nk;
    grads.key = problem.token_major(problem.key, rows), p.grad_key = problem.view(grads.key);
    grads.value = problem.token_major(problem.value, rows), p.grad_value = problem.view(grads.value);
  }
  const auto numbers = [&](const std::vector<int64_t>& shape) { return allocate(like, shape, compute); };
  const int64_t runs = std::min(kMostParts, (kSummingItems - 1) / std::max<int64_t>(p.H, 1) + 1);
  if (shared_query || sum_bias) p.parts = std::min(runs, p.B * p.J);
  Tensor query_parts = numbers({shared_query ? p.parts : 0, p.H, p.Nq, p.D});
  Tensor bias_parts = numbers({sum_bias ? p.parts : 0, p.H, p.Nq, p.S});
  if (shared_query) p.grad_query_parts = query_parts.mutable_data_ptr();
  if (sum_bias) {
    p.grad_bias_parts = bias_parts.mutable_data_ptr();
  } else if (need_bias) {
    grads.bias = numbers(problem.per_head({p.Nq, p.S}));
    p.grad_bias = grads.bias.mutable_data_ptr();
  }
  if (need_key_bias) {
    grads.key_bias = zeros(problem.per_head({p.Nk}));
    p.grad_key_bias = grads.key_bias.mutable_data_ptr();
  }

  const Isa set = isa();
  if (p.index_per_query) {
    HK_CHECK(!shared_query, op, "query", "of key's batch where the index is per query", shape_of(like));
    Tensor pairs = allocate(like, {p.B, p.J, p.Nq, p.S, p.H, 2}, compute);
    p.pairs = pairs.mutable_data_ptr();
    const int64_t bytes = HK_CPU_DISPATCH(set, attention_per_query_scratch)(p);
    run(p, p.B * p.J * p.Nq, 16, bytes, HK_CPU_DISPATCH(set, attention_per_query_bwd_queries), like);
    run(p, p.B * p.J * p.Nk, 16, bytes, HK_CPU_DISPATCH(set, attention_per_query_bwd_keys), like);
  } else {
    run(p, (p.parts ? p.parts : p.B * p.J) * p.H, 1, HK_CPU_DISPATCH(set, attention_scratch)(p, true),
        HK_CPU_DISPATCH(set, attention_bwd), like);
  }
  if (shared_query) grads.query = sum_parts(query_parts, {p.H, p.Nq, p.D});
  if (sum_bias) {
    grads.bias = sum_parts(bias_parts, problem.batch_dims == 1 ? std::vector<int64_t>{1, p.H, p.Nq, p.S}
                                                               : std::vector<int64_t>{1, 1, p.H, p.Nq, p.S});
  }
  return grads;
}

namespace {

constexpr const char* kOp = "gathered_attention";

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& index, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& key_bias, double scale) {
  return attention_forward({kOp, query, key, value, index, bias, key_bias, scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& index,
    const std::optional<Tensor>& start, const std::optional<Tensor>& slots, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& key_bias, double scale, bool need_bias, bool need_key_bias) {
  AttentionGrads g = attention_backward({kOp, query, key, value, index, bias, key_bias, scale}, grad_out, grad_lse, out,
                                        lse, start, slots, need_bias, need_key_bias);
  return {g.query, g.key, g.value, g.bias, g.key_bias};
}

// The gradient, in one piece, of the [B, N, (J,) 3, H, D] projection that query, key and value are views of.
Tensor packed_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& out, const Tensor& lse, double scale) {
  const AttentionArgs args{kOp, query, key, value, std::nullopt, std::nullopt, std::nullopt, scale};
  const int64_t n = query.dim();
  HK_CHECK((n == 4 || n == 5) && n == key.dim() && query.size(n - 2) == key.size(n - 2), kOp, "query",
           "[B, (J,) H, N, D] of key's shape", shape_of(query));
  std::vector<int64_t> shape{query.size(0), query.size(n - 2)};
  if (n == 5) shape.push_back(query.size(1));
  shape.insert(shape.end(), {3, query.size(n - 3), query.size(n - 1)});
  Tensor packed = allocate(query, shape);
  attention_backward(args, grad_out, std::nullopt, out, lse, std::nullopt, std::nullopt, false, false, &packed);
  return packed;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("gathered_attention_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("gathered_attention_bwd", TORCH_BOX(&hotkernels::backward));
  m.impl("gathered_attention_packed_bwd", TORCH_BOX(&hotkernels::packed_backward));
}
