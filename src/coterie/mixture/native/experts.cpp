// The experts of a mixture layer in two calls, forward only: their scores, and what they add to its output. Parameters
// and activations are float32 or bfloat16; sums are float32.
//
// Against torch's operations this saves passes over memory: tokens are read where they lie and outputs are added where
// they belong (no gathered copies, no scatter), norms are taken while the projections are in the cache, and the leading
// projections that the scores needed are not computed again.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;  // floats in a vector; the compiler splits it where registers are narrower
constexpr int64_t WIDE = 4 * LANES;
constexpr int64_t CHUNK = 96;  // tokens in a piece of work: what lies between two products stays in the cache
constexpr int64_t FEW = 8;     // tokens of an expert: for fewer its weights are read where they lie, not from panels
using Floats = float __attribute__((vector_size(LANES * sizeof(float))));

using Words = uint32_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(LANES * sizeof(uint16_t))));

Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

Floats load(const at::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

void store(at::BFloat16* to, Floats v) {
  Words words = reinterpret_cast<Words>(v);
  words += 0x7fff + ((words >> 16) & 1);  // to nearest, ties to even
  const Halves halves = __builtin_convertvector(words >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

int64_t panels_of(int64_t rows, int64_t width) { return (rows + width - 1) / width; }

// Rows (rows, depth) as panels of `width` columns: to[panel][depth][width], padded with zeros.
template <class S>
void pack(const S* from, int64_t rows, int64_t depth, int64_t width, float* to) {
  for (int64_t panel = 0; panel < panels_of(rows, width); ++panel, to += depth * width)
    for (int64_t first = 0; first < depth; first += LANES)  // blocks: both sides stay in the cache
      for (int64_t row = 0; row < width; ++row)
        for (int64_t i = first; i < std::min(depth, first + LANES); ++i)
          to[i * width + row] = panel * width + row < rows ? float(from[(panel * width + row) * depth + i]) : 0.f;
}

// out[t] (+)= in[t] (depth) times a panel (depth, N vectors), for T rows at once: the sums stay in registers.
template <int T, int N, bool ADD, class S>
void multiply(const float* const* in, const float* panel, int64_t depth, S* const* out) {
  Floats sum[T][N];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[t][n] = ADD ? load(out[t] + n * LANES) : Floats{};
  for (int64_t i = 0; i < depth; ++i, panel += N * LANES) {
    Floats column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(panel + n * LANES);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[t][n] += in[t][i] * column[n];
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out[t] + n * LANES, sum[t][n]);
}

// The same for `count` <= T rows and `width` columns of the panel, into `out`: through a buffer, so that nothing beyond
// them is written.
template <int T, int N>
void project(const float* const* in, int64_t count, const float* panel, int64_t depth, float* const* out,
             int64_t width) {
  float buffer[T * N * LANES];
  const float* rows[T];
  float* sums[T];
  for (int t = 0; t < T; ++t) {
    rows[t] = in[std::min<int64_t>(t, count - 1)];
    sums[t] = buffer + t * N * LANES;
  }
  multiply<T, N, false>(rows, panel, depth, sums);
  for (int64_t t = 0; t < count; ++t) std::memcpy(out[t], sums[t], std::min(width, N * LANES) * sizeof(float));
}

float sum_of(Floats v) {
  float sum = 0;
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// out[r] = rows[r] (depth) . x (depth) for `count` rows that lie one after another, four at once.
template <class S>
void dots(const S* rows, int64_t count, const S* x, int64_t depth, float* out) {
  for (int64_t r = 0; r < count; r += 4) {
    const int64_t some = std::min<int64_t>(4, count - r);
    const S* from[4];
    for (int64_t i = 0; i < 4; ++i) from[i] = rows + (r + std::min(i, some - 1)) * depth;
    Floats sum[4] = {};
    int64_t j = 0;
    for (; j + LANES <= depth; j += LANES) {
      const Floats column = load(x + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += load(from[i] + j) * column;
    }
    for (int64_t i = 0; i < some; ++i) {
      float total = sum_of(sum[i]);
      for (int64_t l = j; l < depth; ++l) total += float(from[i][l]) * float(x[l]);
      out[r + i] = total;
    }
  }
}

// y (width) += sum_r z[r] rows[r] for `count` rows that lie one after another, eight at once.
template <class S>
void add_rows(const S* rows, int64_t count, const float* z, int64_t width, float* y) {
  for (int64_t r = 0; r < count; r += 8) {
    const S* from[8];
    float times[8];
    for (int64_t i = 0; i < 8; ++i) {
      from[i] = rows + std::min(r + i, count - 1) * width;
      times[i] = r + i < count ? z[r + i] : 0.f;
    }
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
      Floats sum = load(y + j);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum += times[i] * load(from[i] + j);
      store(y + j, sum);
    }
    for (; j < width; ++j)
      for (int i = 0; i < 8; ++i) y[j] += times[i] * float(from[i][j]);
  }
}

// y (width) += x, rounded once.
template <class S>
void add_to(S* y, const float* x, int64_t width) {
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) store(y + j, load(y + j) + load(x + j));
  for (; j < width; ++j) y[j] = float(y[j]) + x[j];
}

float norm_of(const float* z, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t r = 0; r < count; ++r) sum += z[r] * z[r];
  return std::sqrt(sum);
}

// Projections x rows^T (tokens, experts, g), and their norms (tokens, experts). float32: where a processor has bfloat16
// arithmetic, torch's product of such is the faster one.
std::tuple<at::Tensor, at::Tensor> scores(const at::Tensor& x, const at::Tensor& rows, int64_t experts) {
  const int64_t tokens = x.size(0), d_in = x.size(1), all = rows.size(0), g = all / experts;
  const at::Tensor z = at::empty({tokens, experts, g}, x.options()), norms = at::empty({tokens, experts}, x.options());
  const float *in = x.const_data_ptr<float>(), *from = rows.const_data_ptr<float>();
  float *out = z.data_ptr<float>(), *norm = norms.data_ptr<float>();
  if (tokens < FEW) {
    at::parallel_for(0, experts, 1, [&](int64_t first, int64_t last) {
      for (int64_t e = first; e < last; ++e)
        for (int64_t t = 0; t < tokens; ++t) {
          dots(from + e * g * d_in, g, in + t * d_in, d_in, out + (t * experts + e) * g);
          norm[t * experts + e] = norm_of(out + (t * experts + e) * g, g);
        }
    });
    return {z, norms};
  }
  const int64_t panels = panels_of(all, WIDE);
  const at::Tensor packed = at::empty({panels, d_in, WIDE}, x.options());
  float* panel = packed.data_ptr<float>();

  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      pack(from + p * WIDE * d_in, std::min(WIDE, all - p * WIDE), d_in, WIDE, panel + p * d_in * WIDE);
  });
  at::parallel_for(0, panels_of(tokens, CHUNK), 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * CHUNK; begin < std::min(tokens, last * CHUNK); begin += CHUNK) {
      const int64_t end = std::min(tokens, begin + CHUNK);
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = begin; t < end; t += 6) {
          const int64_t count = std::min<int64_t>(6, end - t);
          const float* x_of[6];
          float* z_of[6];
          for (int64_t i = 0; i < count; ++i) {
            x_of[i] = in + (t + i) * d_in;
            z_of[i] = out + (t + i) * all + p * WIDE;
          }
          project<6, 4>(x_of, count, panel + p * d_in * WIDE, d_in, z_of, all - p * WIDE);
        }
      for (int64_t i = begin * experts; i < end * experts; ++i) norm[i] = norm_of(out + i * g, g);
    }
  });
  return {z, norms};
}

// `count` <= 12 rows of x as float32: where they lie, or converted into a buffer (12, d_in).
template <class S>
void rows_of(const S* x, const int64_t* tokens, int64_t count, int64_t d_in, std::vector<float>& buffer,
             const float** rows) {
  for (int64_t i = 0; i < count; ++i) {
    const S* from = x + tokens[i] * d_in;
    if constexpr (std::is_same_v<S, float>) {
      rows[i] = from;
    } else {
      buffer.resize(12 * d_in);
      float* to = buffer.data() + i * d_in;
      int64_t j = 0;
      for (; j + LANES <= d_in; j += LANES) store(to + j, load(from + j));
      for (; j < d_in; ++j) to[j] = from[j];
      rows[i] = to;
    }
  }
}

// y[t] += gate (up_e^T (down_e x[t]) + bias_e) for the experts e = index[t, :], in place.
//
// y (tokens, d_out), x (tokens, d_in), index (tokens, k) int64, gates (tokens, k) or none for 1, down (experts rank,
// d_in), up (experts rank, d_out), bias (experts, d_out) or none, leading (tokens, experts, g) or none: the first g of
// each expert's projections of x.
template <class S>
void add(const at::Tensor& y, const at::Tensor& x, const at::Tensor& index, const std::optional<at::Tensor>& gates,
         const at::Tensor& down, const at::Tensor& up, const std::optional<at::Tensor>& bias, int64_t experts,
         const std::optional<at::Tensor>& leading) {
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = y.size(1), k = index.size(1);
  const int64_t rank = down.size(0) / experts, g = leading ? leading->size(2) : 0, rest = rank - g;
  const int64_t depth = rank + (bias ? 1 : 0);  // the bias is one more rank, its projection 1
  const int64_t width = rest <= LANES ? LANES : 2 * LANES, panels = panels_of(rest, width);
  const int64_t blocks = panels_of(d_out, WIDE), whole = d_out / WIDE;
  S* out = y.data_ptr<S>();
  const S *in = x.const_data_ptr<S>(), *from_down = down.const_data_ptr<S>();
  const S *from_up = up.const_data_ptr<S>(), *from_bias = bias ? bias->const_data_ptr<S>() : nullptr;
  const S* lead = leading ? leading->const_data_ptr<S>() : nullptr;
  const float* gate = gates ? gates->const_data_ptr<float>() : nullptr;
  const int64_t* chosen = index.const_data_ptr<int64_t>();

  std::vector<int64_t> load_of(experts), place_of(experts, -1), busy;  // the busy experts' weights are put into panels
  for (int64_t i = 0; i < tokens * k; ++i) ++load_of[chosen[i]];
  for (int64_t e = 0; e < experts; ++e)
    if (load_of[e] >= FEW) {
      place_of[e] = busy.size();
      busy.push_back(e);
    }
  const auto floats = y.options().dtype(at::kFloat);
  const at::Tensor packed_down = at::empty({int64_t(busy.size()), panels, d_in, width}, floats);
  const at::Tensor packed_up = at::empty({int64_t(busy.size()), blocks, depth, WIDE}, floats);
  float *downs = packed_down.data_ptr<float>(), *ups = packed_up.data_ptr<float>();

  at::parallel_for(0, busy.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t place = first; place < last; ++place) {
      const int64_t e = busy[place];
      pack(from_down + (e * rank + g) * d_in, rest, d_in, width, downs + place * panels * d_in * width);
      for (int64_t r = 0; r < depth; ++r) {
        const S* from = r < rank ? from_up + (e * rank + r) * d_out : from_bias + e * d_out;
        for (int64_t b = 0; b < blocks; ++b) {
          float* to = ups + ((place * blocks + b) * depth + r) * WIDE;
          const int64_t count = std::min(WIDE, d_out - b * WIDE);
          std::copy_n(from + b * WIDE, count, to);
          std::fill(to + count, to + WIDE, 0.f);
        }
      }
    }
  });

  struct Work {
    int64_t expert, begin, end;  // positions in the order of experts
  };
  for (int64_t slot = 0; slot < k; ++slot) {  // a token's experts one after another: no two threads add to one row
    std::vector<int64_t> start(experts + 1), order(tokens);
    for (int64_t t = 0; t < tokens; ++t) ++start[chosen[t * k + slot] + 1];
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    std::vector<Work> work;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t begin = start[e]; begin < start[e + 1]; begin += CHUNK)
        work.push_back({e, begin, std::min(start[e + 1], begin + CHUNK)});
    for (int64_t t = 0; t < tokens; ++t) order[start[chosen[t * k + slot]]++] = t;

    at::parallel_for(0, work.size(), 1, [&](int64_t first, int64_t last) {
      std::vector<float> buffer(CHUNK * depth), converted, added;
      for (int64_t w = first; w < last; ++w) {
        const auto [e, begin, end] = work[w];
        const int64_t* mine = order.data() + begin;
        const int64_t count = end - begin, place = place_of[e];
        const bool few = place < 0;
        float* z = buffer.data();
        for (int64_t t = 0; few && t < count; ++t)
          dots(from_down + (e * rank + g) * d_in, rest, in + mine[t] * d_in, d_in, z + t * depth + g);
        for (int64_t t = 0; !few && t < count; t += 12) {
          const int64_t some = std::min<int64_t>(12, count - t);
          const float* x_of[12];
          float* z_of[12];
          rows_of(in, mine + t, some, d_in, converted, x_of);
          for (int64_t p = 0; p < panels; ++p) {
            const float* panel = downs + (place * panels + p) * d_in * width;
            for (int64_t i = 0; i < some; ++i) z_of[i] = z + (t + i) * depth + g + p * width;
            if (width == LANES)
              project<12, 1>(x_of, some, panel, d_in, z_of, rest - p * width);
            else
              project<12, 2>(x_of, some, panel, d_in, z_of, rest - p * width);
          }
        }
        for (int64_t t = 0; t < count; ++t) {
          float* row = z + t * depth;
          if (g) std::copy_n(lead + (mine[t] * experts + e) * g, g, row);
          if (bias) row[rank] = 1.f;
          if (gate)
            for (int64_t r = 0; r < depth; ++r) row[r] *= gate[mine[t] * k + slot];
        }
        for (int64_t t = 0; few && t < count; ++t) {
          added.assign(d_out, 0.f);
          add_rows(from_up + e * rank * d_out, rank, z + t * depth, d_out, added.data());
          if (bias) add_rows(from_bias + e * d_out, 1, z + t * depth + rank, d_out, added.data());
          add_to(out + mine[t] * d_out, added.data(), d_out);
        }
        for (int64_t t = 0; !few && t < count; t += 6) {
          const int64_t some = std::min<int64_t>(6, count - t);
          for (int64_t b = 0; b < blocks; ++b) {
            const float* panel = ups + (place * blocks + b) * depth * WIDE;
            const float* z_of[6];
            S* y_of[6];
            for (int64_t i = 0; i < some; ++i) {
              z_of[i] = z + (t + i) * depth;
              y_of[i] = out + mine[t + i] * d_out + b * WIDE;
            }
            if (some == 6 && b < whole) {
              multiply<6, 4, true>(z_of, panel, depth, y_of);
              continue;
            }
            float sums[WIDE], *to[1] = {sums};
            for (int64_t i = 0; i < some; ++i) {
              multiply<1, 4, false>(z_of + i, panel, depth, to);
              add_to(y_of[i], sums, std::min(WIDE, d_out - b * WIDE));
            }
          }
        }
      }
    });
  }
}

void add_experts(at::Tensor y, const at::Tensor& x, const at::Tensor& index, const std::optional<at::Tensor>& gates,
                 const at::Tensor& down, const at::Tensor& up, const std::optional<at::Tensor>& bias, int64_t experts,
                 const std::optional<at::Tensor>& leading) {
  const auto run = y.scalar_type() == at::kFloat ? add<float> : add<at::BFloat16>;
  run(y, x, index, gates, down, up, bias, experts, leading);
}

}  // namespace

TORCH_LIBRARY(coterie, library) {
  library.def("scores(Tensor x, Tensor rows, int experts) -> (Tensor, Tensor)");
  library.def(
      "add_experts(Tensor(a!) y, Tensor x, Tensor index, Tensor? gates, Tensor down, Tensor up, Tensor? bias, "
      "int experts, Tensor? leading) -> ()");
}

TORCH_LIBRARY_IMPL(coterie, CPU, library) {
  library.impl("scores", scores);
  library.impl("add_experts", add_experts);
}
