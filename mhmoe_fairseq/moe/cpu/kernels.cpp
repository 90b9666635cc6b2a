// What an expert computes between its two products, in one pass over rows that are still in the cache: bias, GELU and
// LayerNorm forward; GELU again, its derivative and the LayerNorm's backward. ATen's operations take up to eleven
// passes, which cost more than the products where the processor is fast at bfloat16. And whole experts, for a few rows
// each as in a step of decoding, where calling an operation takes longer than what it does. And the output layer's cross
// entropy with its gradient, of which a small model's largest tensors are: each row is read from memory once.
//
// Written with at::vec, for the instruction set that it is compiled for. Matrices (P, F) are row-major, of float or
// bfloat16; everything else is float, and so is all arithmetic. norm.py has the norm's equations.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using V = at::vec::Vectorized<float>;

constexpr int64_t kLanes = V::size();
constexpr int64_t kStep = 2 * kLanes;  // numbers at a time: one vector of bfloat16
constexpr int64_t kGrain = 1 << 14;    // numbers that are worth another thread
constexpr float kEps = 1e-5f;          // F.layer_norm's

struct Pair {
  V low, high;
};

inline Pair load_whole(const float* from) {
  return {V::loadu(from), V::loadu(from + kLanes)};
}

inline Pair load_whole(const BFloat16* from) {
  const auto [low, high] = at::vec::convert_bfloat16_float(at::vec::Vectorized<BFloat16>::loadu(from));
  return {low, high};
}

inline void store_whole(float* to, const Pair& x) {
  x.low.store(to);
  x.high.store(to + kLanes);
}

inline void store_whole(BFloat16* to, const Pair& x) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)  // one instruction, where at::vec rounds in nine
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(x.high, x.low));
#else
  at::vec::convert_float_bfloat16(x.low, x.high).store(to);
#endif
}

// The first `count` numbers; `beyond` where there are no more.
template <typename T>
inline Pair load(const T* from, int64_t count, float beyond = 0.f) {
  if (count == kStep) return load_whole(from);
  T buffer[kStep];
  std::fill_n(std::copy_n(from, count, buffer), kStep - count, T(beyond));
  return load_whole(buffer);
}

template <typename T>
inline void store(T* to, const Pair& x, int64_t count) {
  if (count == kStep) return store_whole(to, x);
  T buffer[kStep];
  store_whole(buffer, x);
  std::copy_n(buffer, count, to);
}

template <typename F, typename... Pairs>
inline Pair each(const F& f, const Pairs&... x) {
  return {f(x.low...), f(x.high...)};
}

// c_0 + c_1 x + ..., coefficients from the highest; unrolled.
template <typename... Cs>
inline V polynomial(const V& x, float highest, Cs... coefficients) {
  V sum(highest);
  ((sum = at::vec::fmadd(sum, x, V(coefficients))), ...);
  return sum;
}

struct Gelu {
  V distribution;  // GELU is x times this
  V derivative;
};

// Float: the normal distribution's tail is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.305 |x|), to 1e-7 of itself.
template <typename T>
inline Gelu gelu(const V& x) {
  const V bell = (x * x * V(-0.5f)).exp();
  const V t = V(1.f) / at::vec::fmadd(x.abs(), V(0.305f), V(1.f));
  const V tail = bell * t *
      polynomial(t, 0.0366992901f, -0.152988725f, 0.185717605f, -0.0379774583f, 0.121021997f, 0.103420777f,
                     0.12246683f, 0.121639732f);
  const V distribution = V::blendv(V(1.f) - tail, tail, x < V(0.f));
  return {distribution, at::vec::fmadd(x * bell, V(0.398942280f), distribution)};
}

// Bfloat16 has a precision of 4e-3: odd polynomials within a range, constants beyond, to 8e-5 and 5e-4.
template <>
inline Gelu gelu<BFloat16>(const V& x) {
  const V near = at::vec::clamp(x, V(-4.f), V(4.f));
  const V wide = at::vec::clamp(x, V(-4.25f), V(4.25f));
  const V distribution = polynomial(
      near * near, -1.58093506e-09f, 1.2172289e-07f, -4.10127428e-06f, 8.06756151e-05f, -0.00104831325f,
                    0.00966588969f, -0.0661823677f, 0.398889683f);
  const V derivative = polynomial(
      wide * wide, 6.45849361e-10f, -5.98399323e-08f, 2.41484728e-06f, -5.6065493e-05f, 0.000834309506f,
                    -0.00837740349f, 0.0576147715f, -0.263803175f, 0.796857615f);
  return {at::vec::fmadd(near, distribution, V(0.5f)), at::vec::fmadd(wide, derivative, V(0.5f))};
}

inline float reduce(const Pair& x) {
  return at::vec::vec_reduce_all<float>([](const V& a, const V& b) { return a + b; }, x.low + x.high);
}

template <typename T>
inline Pair activate(const Pair& x) {
  return each([](const V& v) { return v * gelu<T>(v).distribution; }, x);
}

inline Pair sum(const Pair& x, const Pair& y) {
  return each([](const V& a, const V& b) { return a + b; }, x, y);
}

// Calls f(first, count) for the steps of a row.
template <typename F>
inline void steps(int64_t size, const F& f) {
  for (int64_t first = 0; first < size; first += kStep) f(first, std::min(kStep, size - first));
}

// A row of activations to (x - mean) * weight; returns mean and reciprocal deviation. Zeros stand behind its end.
inline std::pair<float, float> normalise(std::vector<float>& row, int64_t size, const float* weight) {
  Pair total{V(0.f), V(0.f)}, squares{V(0.f), V(0.f)};
  steps(size, [&](int64_t i, int64_t) {
    total = sum(total, load_whole(&row[i]));
  });
  const float mean = reduce(total) / size;
  steps(size, [&](int64_t i, int64_t count) {
    Pair centred = each([&](const V& x) { return x - V(mean); }, load_whole(&row[i]));
    store(&row[i], centred, count);
    centred = load_whole(&row[i]);
    squares = each([](const V& a, const V& x) { return at::vec::fmadd(x, x, a); }, squares, centred);
  });
  steps(size, [&](int64_t i, int64_t count) {
    store(&row[i], each([](const V& x, const V& w) { return x * w; }, load_whole(&row[i]), load(weight + i, count)), count);
  });
  return {mean, 1.f / std::sqrt(reduce(squares) / size + kEps)};
}

// inner = GELU(hidden + bias), with a norm (x - mean(x)) * weight of that, and its statistics.
template <typename T>
void forward(
    const Tensor& hidden, const float* bias, const float* weight, const Tensor& inner, float* mean, float* rstd) {
  const int64_t size = hidden.size(1);
  const T* const h = hidden.const_data_ptr<T>();
  T* const out = inner.mutable_data_ptr<T>();
  at::parallel_for(0, hidden.size(0), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<float> row(size + kStep);
    for (int64_t r = begin; r < end; ++r) {
      steps(size, [&](int64_t i, int64_t count) {
        Pair x = load(h + r * size + i, count);
        if (bias) x = sum(x, load(bias + i, count));
        x = activate<T>(x);
        weight ? store(&row[i], x, count) : store(out + r * size + i, x, count);
      });
      if (!weight) continue;
      std::tie(mean[r], rstd[r]) = normalise(row, size, weight);
      steps(size, [&](int64_t i, int64_t count) { store(out + r * size + i, load_whole(&row[i]), count); });
    }
  });
}

// inner = GELU(hidden + bias), with a norm less its mean; grad, that of inner (with a norm of inner * weight, and with
// grad * weight - along * inner - shift in its place), becomes the gradient of hidden.
template <typename T>
void backward(
    const Tensor& hidden, const float* bias, const float* weight, const Tensor& grad, const Tensor& inner,
    const float* mean, const float* along, const float* shift) {
  const int64_t size = hidden.size(1);
  const T* const h = hidden.const_data_ptr<T>();
  T* const g = grad.mutable_data_ptr<T>();
  T* const out = inner.mutable_data_ptr<T>();
  at::parallel_for(0, hidden.size(0), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      steps(size, [&](int64_t i, int64_t count) {
        const int64_t at = r * size + i;
        Pair x = load(h + at, count);
        if (bias) x = sum(x, load(bias + i, count));
        const Gelu low = gelu<T>(x.low), high = gelu<T>(x.high);
        Pair y{x.low * low.distribution, x.high * high.distribution}, dy = load(g + at, count);
        if (weight) {
          y = each([&](const V& v) { return v - V(mean[r]); }, y);
          dy = each(
              [&](const V& d, const V& w, const V& c) { return d * w - at::vec::fmadd(V(along[r]), c, V(shift[r])); },
              dy, load(weight + i, count), y);
        }
        store(out + at, y, count);
        store(g + at, Pair{dy.low * low.derivative, dy.high * high.derivative}, count);
      });
    }
  });
}

template <typename A, typename B>
inline float dot(const A* x, const B* y, int64_t size) {
  Pair total{V(0.f), V(0.f)};
  steps(size, [&](int64_t i, int64_t count) {
    const Pair a = load(x + i, count), b = load(y + i, count);
    total = {at::vec::fmadd(a.low, b.low, total.low), at::vec::fmadd(a.high, b.high, total.high)};
  });
  return reduce(total);
}

struct Vectors {
  const float *bias, *norm_weight, *norm_bias, *out_bias;  // (E, F) three times, (E, d); null where there is none
};

// out[r] = the output of expert[r] for x[r]; zeros for an expert that there is none of.
template <typename T, typename W>
void whole_experts(
    const Tensor& x, const Tensor& expert, const Tensor& first, const Tensor& second, const Vectors& vectors,
    const Tensor& out) {
  const int64_t experts = first.size(0), inner = first.size(1), dim = first.size(2);
  const int64_t* const of = expert.const_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / (2 * inner * dim)), [&](int64_t begin, int64_t end) {
    std::vector<float> row(inner + kStep);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t e = of[r];
      T* const y = out.mutable_data_ptr<T>() + r * dim;
      if (e >= experts) {
        std::fill_n(y, dim, T(0));
        continue;
      }
      const auto at_expert = [&](const float* vector) { return vector ? vector + e * inner : nullptr; };
      const float *const bias = at_expert(vectors.bias), *const norm_bias = at_expert(vectors.norm_bias);
      const W* const up = first.const_data_ptr<W>() + e * inner * dim;
      const W* const down = second.const_data_ptr<W>() + e * inner * dim;
      for (int64_t f = 0; f < inner; ++f) {
        row[f] = dot(x.const_data_ptr<T>() + r * dim, up + f * dim, dim) + (bias ? bias[f] : 0.f);
      }
      steps(inner, [&](int64_t i, int64_t count) { store(&row[i], activate<T>(load_whole(&row[i])), count); });
      if (vectors.norm_weight) {
        const float rstd = normalise(row, inner, at_expert(vectors.norm_weight)).second;
        for (int64_t f = 0; f < inner; ++f) row[f] = row[f] * rstd + norm_bias[f];
      }
      for (int64_t i = 0; i < dim; ++i) {
        y[i] = T(dot(row.data(), down + i * inner, inner) + (vectors.out_bias ? vectors.out_bias[e * dim + i] : 0.f));
      }
    }
  });
}

// losses = log sum exp(row) - row[target]; with gradients each row becomes its own, factor * (softmax(row) - target).
// The target is best where no other is larger and none before it as large. NaN throughout where the largest is infinite.
template <typename T>
void cross_entropy_rows(
    const Tensor& logits, const int64_t* targets, const float* factor, bool with_gradients, float* losses,
    bool* is_best) {
  const int64_t size = logits.size(1);
  T* const all = logits.mutable_data_ptr<T>();
  at::parallel_for(0, logits.size(0), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<float> row(size + kStep);
    for (int64_t r = begin; r < end; ++r) {
      T* const x = all + r * size;
      const int64_t target = targets[r];
      TORCH_CHECK_INDEX(target >= 0 && target < size, "target ", target, " of ", size, " symbols");
      Pair most{V(-INFINITY), V(-INFINITY)}, total{V(0.f), V(0.f)};
      steps(size, [&](int64_t i, int64_t count) {
        most = each([](const V& a, const V& b) { return at::vec::maximum(a, b); }, most, load(x + i, count, -INFINITY));
      });
      const float top = at::vec::vec_reduce_all<float>(
          [](const V& a, const V& b) { return at::vec::maximum(a, b); }, at::vec::maximum(most.low, most.high));
      steps(size, [&](int64_t i, int64_t count) {
        const Pair powers = each([&](const V& v) { return (v - V(top)).exp_u20(); }, load(x + i, count, -INFINITY));
        total = sum(total, powers);
        if (with_gradients) store_whole(&row[i], powers);
      });
      const float powers = reduce(total), wanted = x[target];
      losses[r] = std::isfinite(top) ? std::log(powers) + (top - wanted) : NAN;
      if (is_best) is_best[r] = wanted == top && std::find(x, x + target, x[target]) == x + target;
      if (!with_gradients) continue;
      const float times = factor ? factor[r] : 1.f, scale = std::isfinite(top) ? times / powers : NAN;
      steps(size, [&](int64_t i, int64_t count) {
        store(x + i, each([&](const V& v) { return v * V(scale); }, load_whole(&row[i])), count);
      });
      x[target] = T(std::expm1(-losses[r]) * times);  // p - 1, exact where p is near 1
    }
  });
}

const float* floats(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr<float>() : nullptr;
}

float* floats_out(const std::optional<Tensor>& x) {
  return x ? x->mutable_data_ptr<float>() : nullptr;
}

void gelu_norm(
    const Tensor& hidden, const std::optional<Tensor>& bias, const std::optional<Tensor>& weight, const Tensor& inner,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd) {
  const auto call = hidden.scalar_type() == at::kFloat ? forward<float> : forward<BFloat16>;
  call(hidden, floats(bias), floats(weight), inner, floats_out(mean), floats_out(rstd));
}

void gelu_norm_backward(
    const Tensor& hidden, const std::optional<Tensor>& bias, const std::optional<Tensor>& weight, const Tensor& grad,
    const Tensor& inner, const std::optional<Tensor>& mean, const std::optional<Tensor>& along,
    const std::optional<Tensor>& shift) {
  const auto call = hidden.scalar_type() == at::kFloat ? backward<float> : backward<BFloat16>;
  call(hidden, floats(bias), floats(weight), grad, inner, floats(mean), floats(along), floats(shift));
}

void gelu_experts(
    const Tensor& x, const Tensor& expert, const Tensor& first, const Tensor& second, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& out_bias, const Tensor& out) {
  const Vectors vectors{floats(bias), floats(norm_weight), floats(norm_bias), floats(out_bias)};
  const bool wide = x.scalar_type() == at::kFloat, wide_weights = first.scalar_type() == at::kFloat;
  const auto call = wide ? (wide_weights ? whole_experts<float, float> : whole_experts<float, BFloat16>)
                         : (wide_weights ? whole_experts<BFloat16, float> : whole_experts<BFloat16, BFloat16>);
  call(x, expert, first, second, vectors, out);
}

void cross_entropy(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& factor, bool with_gradients,
    const Tensor& losses, const std::optional<Tensor>& is_best) {
  const auto call = logits.scalar_type() == at::kFloat ? cross_entropy_rows<float> : cross_entropy_rows<BFloat16>;
  call(
      logits, targets.const_data_ptr<int64_t>(), floats(factor), with_gradients, losses.mutable_data_ptr<float>(),
      is_best ? is_best->mutable_data_ptr<bool>() : nullptr);
}

}  // namespace

TORCH_LIBRARY(mhmoe_cpu, library) {
  library.def(
      "gelu_norm(Tensor hidden, Tensor? bias, Tensor? weight, Tensor(a!) inner, Tensor(b!)? mean, Tensor(c!)? rstd) "
      "-> ()");
  library.def(
      "gelu_norm_backward(Tensor hidden, Tensor? bias, Tensor? weight, Tensor(a!) grad, Tensor(b!) inner, "
      "Tensor? mean, Tensor? along, Tensor? shift) -> ()");
  library.def(
      "gelu_experts(Tensor x, Tensor expert, Tensor first, Tensor second, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? out_bias, Tensor(a!) out) -> ()");
  library.def(
      "cross_entropy(Tensor(a!) logits, Tensor targets, Tensor? factor, bool with_gradients, Tensor(b!) losses, "
      "Tensor(c!)? is_best) -> ()");
}

TORCH_LIBRARY_IMPL(mhmoe_cpu, CPU, library) {
  library.impl("gelu_norm", gelu_norm);
  library.impl("gelu_norm_backward", gelu_norm_backward);
  library.impl("gelu_experts", gelu_experts);
  library.impl("cross_entropy", cross_entropy);
}
