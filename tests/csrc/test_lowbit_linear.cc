// Every variant of the packed matmul that this CPU runs, bit for bit against the reference; the
// reference against plain double arithmetic.
//
// BANTAMWEIGHT_FORCE_KERNEL=name runs that variant only, and fails if it is not here to be run.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "lowbit_linear/lowbit_linear.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace bantamweight;

namespace {

enum class Zeros { uniform, uniform_per_call, per_channel_and_group };
const char* name_of(Zeros zeros) { return zeros == Zeros::per_channel_and_group ? "float zeros" : "uniform zero"; }

struct Weights {
  LinearShape shape;
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
};

int64_t groups_of(const LinearShape& s) { return s.k == 0 ? 0 : (s.k + s.group_size - 1) / s.group_size; }

// `levels`: codes 0 .. levels - 1, or 0 for as many as the bits hold.
Weights make_weights(const LinearShape& shape, Zeros zeros, check::Random& random, int levels = 0) {
  Weights w;
  w.shape = shape;
  if (levels == 0) levels = 1 << shape.bits;
  for (int64_t i = 0; i < shape.n * shape.k; ++i) w.codes.push_back(static_cast<uint8_t>(random.below(levels)));
  const float one_zero = zeros == Zeros::uniform ? static_cast<float>(levels / 2) : 0.0f;
  for (int64_t i = 0; i < shape.n * groups_of(shape); ++i) {
    w.scale.push_back(0.01f + 0.05f * (1.0f + random.uniform()));
    w.zero.push_back(zeros == Zeros::per_channel_and_group ? static_cast<float>(levels) * random.uniform() : one_zero);
  }
  return w;
}

// 64-byte aligned memory of exactly the asked size, so that the sanitizers see one byte too many.
class Layout {
 public:
  Layout(const Weights& w, Isa isa) : bytes_(linear_layout_bytes(w.shape, isa)) {
    CHECK(bytes_ > 0 && bytes_ % 64 == 0);
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    std::memset(memory_, 0xa5, static_cast<size_t>(bytes_));
    status_ = linear_pack(w.shape, isa, w.codes.data(), w.scale.data(), w.zero.data(), memory_, bytes_);
    CHECK(status_ == Status::ok);
  }
  ~Layout() { std::free(memory_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  uint8_t* data() const { return memory_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  uint8_t* memory_ = nullptr;
  Status status_ = Status::ok;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// A weight as `kernel` lays it out at `bits`, which reads back as it was; its codes have `code_bits`.
class Packed {
 public:
  Packed(const LinearKernel& kernel, int bits, int code_bits, int64_t n, int64_t k, int64_t groups,
         const std::vector<KPiece>& pieces, const std::vector<uint8_t>& codes, const std::vector<float>& scale,
         const std::vector<float>& zero) {
    const auto piece_count = static_cast<int64_t>(pieces.size());
    const int64_t bytes = packed_view_bytes(kernel, bits, n, groups, pieces.data(), piece_count);
    memory_ = std::aligned_alloc(64, static_cast<size_t>(bytes));
    packed_view_write(kernel, bits, code_bits, n, groups, pieces.data(), piece_count, codes.data(), k, scale.data(),
                      zero.data(), memory_);
    CHECK(packed_view_read(kernel, memory_, bytes, &view) == Status::ok && view.bits == bits);
    std::vector<uint8_t> codes_back(codes.size(), 7);
    std::vector<float> scale_back(scale.size()), zero_back(zero.size());
    packed_view_unpack(view, k, codes_back.data(), scale_back.data(), zero_back.data());
    CHECK(codes_back == codes && same_bits(scale_back, scale) && same_bits(zero_back, zero));
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  ~Packed() { std::free(memory_); }

  PackedView view;

 private:
  void* memory_;
};

constexpr float kUntouched = -12345.5f;

Status run_forward(const void* layout, int64_t layout_bytes, const float* x, int64_t ldx, int64_t m, const float* bias,
                   float* y, int64_t ldy) {
  LinearArgs args;
  args.x = x;
  args.ldx = ldx;
  args.m = m;
  args.bias = bias;
  args.y = y;
  args.ldy = ldy;
  return linear_forward(layout, layout_bytes, args);
}

std::vector<float> forward(const Layout& layout, const LinearShape& s, const float* x, int64_t ldx, int64_t m,
                           const float* bias, int64_t ldy) {
  std::vector<float> y(static_cast<size_t>(m * ldy), kUntouched);
  CHECK(run_forward(layout.data(), layout.bytes(), x, ldx, m, bias, y.data(), ldy) == Status::ok);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = s.n; i < ldy; ++i) CHECK(y[static_cast<size_t>(r * ldy + i)] == kUntouched);
  }
  return y;
}

// The formula of lowbit_linear.h in doubles, with the activations rounded the way it says.
void check_reference(const Weights& w, const float* x, int64_t ldx, int64_t m, const float* bias,
                     const std::vector<float>& y, int64_t ldy) {
  const LinearShape& s = w.shape;
  const int64_t groups = groups_of(s);
  for (int64_t r = 0; r < m; ++r) {
    float max = 0.0f;
    for (int64_t k = 0; k < s.k; ++k) max = std::fmax(max, std::fabs(x[r * ldx + k]));
    for (int64_t n = 0; n < s.n; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < s.k; ++k) {
        const double a = max == 0.0f ? 0.0 : std::nearbyint(x[r * ldx + k] * (127.0f / max));
        const size_t g = static_cast<size_t>(n * groups + k / s.group_size);
        const double code = w.codes[static_cast<size_t>(n * s.k + k)];
        sum += static_cast<double>(w.scale[g]) * (code - w.zero[g]) * a;
        size += std::fabs(static_cast<double>(w.scale[g]) * (code + std::fabs(w.zero[g])) * a);
      }
      const double a_scale = max / 127.0, b = bias == nullptr ? 0.0 : bias[n];
      const double got = y[static_cast<size_t>(r * ldy + n)];
      CHECK_NOTE(std::fabs(got - (a_scale * sum + b)) <= 1e-6 * (a_scale * size + std::fabs(b)) + 1e-30,
                 "row %d channel %d: %g instead of %g", static_cast<int>(r), static_cast<int>(n), got,
                 a_scale * sum + b);
    }
  }
}

void check_unpack(const Layout& layout, const Weights& w, Isa isa) {
  LinearShape shape;
  Isa read_isa = Isa::reference;
  CHECK(linear_describe(layout.data(), layout.bytes(), &shape, &read_isa) == Status::ok);
  CHECK_NOTE(read_isa == isa, "asked for %s, the buffer says %s", isa_name(isa), isa_name(read_isa));
  CHECK(shape.n == w.shape.n && shape.k == w.shape.k && shape.bits == w.shape.bits &&
        shape.group_size == w.shape.group_size);
  std::vector<uint8_t> codes(w.codes.size());
  std::vector<float> scale(w.scale.size()), zero(w.zero.size());
  CHECK(linear_unpack(layout.data(), layout.bytes(), codes.data(), scale.data(), zero.data()) == Status::ok);
  CHECK(codes == w.codes);
  CHECK(same_bits(scale, w.scale) && same_bits(zero, w.zero));
}

struct Case {
  int64_t m, n, k, group_size;
  int levels = 0;  // 3: ternary codes, in 2 bits only
};

constexpr Case kCases[] = {
    {0, 5, 7, 7},
    {3, 0, 7, 7},
    {2, 3, 0, 1},
    {1, 1, 1, 1},
    {1, 3, 3, 3},
    {3, 1, 5, 2},
    {2, 15, 4, 4},
    {4, 16, 8, 8},
    {5, 17, 9, 3},
    {7, 33, 15, 15},
    {8, 31, 16, 16},
    {9, 64, 17, 5},
    {1, 63, 63, 32},
    {3, 65, 65, 32},
    {16, 64, 64, 64},
    {17, 66, 96, 32},
    {1, 128, 128, 64},
    {6, 129, 100, 33},
    {1, 40, 255, 128},
    {2, 24, 256, 128},
    {15, 130, 127, 64},
    {1, 200, 200, 7},
    {33, 20, 48, 16},
    {65, 18, 40, 40},
    {12, 70, 130, 128},
    {1, 96, 1030, 1030},
    {5, 48, 700, 128},
    // Enough ternary codes and rows for tables over the batch, with remainders of either size.
    {12, 128, 20, 20, 3},
    {17, 131, 100, 33, 3},
    {33, 200, 127, 64, 3},
    {41, 1100, 36, 36, 3},
    {58, 140, 600, 600, 3},
    // More rows, channels and k than AVX2 takes at a time, over one group and over many.
    {101, 300, 520, 520},
    {99, 90, 1100, 64},
    {400, 400, 16, 16},  // outputs that are mapped as they are written
};

void over_awkward_shapes(Isa isa) {
  check::Random random(1);
  for (const Case& c : kCases) {
    for (int bits : {2, 3, 4, 8}) {
      if (c.levels == 3 && bits != 2) continue;
      for (Zeros zeros : {Zeros::uniform, Zeros::uniform_per_call, Zeros::per_channel_and_group}) {
        const int failed = check::failed;
        const LinearShape shape = {c.n, c.k, bits, c.group_size};
        const Weights w = make_weights(shape, zeros, random, c.levels);
        const Layout tested(w, isa), oracle(w, Isa::reference);
        check_unpack(tested, w, isa);

        // x starts one float past an aligned address, with rows further apart than k.
        const int64_t ldx = c.k + 1 + c.k % 3, ldy = c.n + c.m % 4;
        std::vector<float> storage(static_cast<size_t>(c.m * ldx + 1)), bias(static_cast<size_t>(c.n));
        for (float& v : storage) v = random.uniform();
        for (float& v : bias) v = random.uniform();
        if (c.m > 2) std::fill(storage.begin() + 1 + ldx, storage.begin() + 1 + 2 * ldx, 0.0f);  // a row of zeros
        const float* x = storage.data() + 1;
        const float* b = zeros == Zeros::uniform_per_call ? nullptr : bias.data();
        const std::vector<float> y = forward(tested, shape, x, ldx, c.m, b, ldy);
        const std::vector<float> expected = forward(oracle, shape, x, ldx, c.m, b, ldy);
        CHECK(same_bits(y, expected));
        if (isa == Isa::reference) check_reference(w, x, ldx, c.m, b, y, ldy);
        if (check::failed > failed) {
          check::note("%s: m=%d n=%d k=%d bits=%d group_size=%d, %s", isa_name(isa), static_cast<int>(c.m),
                      static_cast<int>(c.n), static_cast<int>(c.k), bits, static_cast<int>(c.group_size),
                      name_of(zeros));
        }
      }
    }
  }
}

// Sums as large as they come. K = 4096 with every weight +1 wraps an int16 accumulator at
// activations of 64; the largest code over kMaxGroupK columns all but fills an int32.
void at_the_largest_sums(Isa isa) {
  for (int bits : {2, 3, 4, 8}) {
    const int top = (1 << bits) - 1;
    struct Extreme {
      int64_t n, k;
      int code, zero;
    };
    const Extreme extremes[] = {{20, 4096, 2, 1},        {20, 4096, 0, 1},        {20, 4096, top, 0},
                                {130, 4096, 2, 1},       {130, 4096, 0, 1},       {130, 4096, top, 0},
                                {3, kMaxGroupK, top, 0}, {3, kMaxGroupK, 0, top}, {2, kMaxGroupK + 100, top, 1}};
    for (const Extreme& e : extremes) {
      const int failed = check::failed;
      Weights w;
      w.shape = {e.n, e.k, bits, e.k};
      w.codes.assign(static_cast<size_t>(e.n * e.k), static_cast<uint8_t>(e.code));
      w.scale.assign(static_cast<size_t>(e.n), 1.0f);
      w.zero.assign(static_cast<size_t>(e.n), static_cast<float>(e.zero));
      const Layout tested(w, isa), oracle(w, Isa::reference);
      check_unpack(tested, w, isa);
      // One activation of 127 fixes the row's scale at exactly 1.
      const float values[] = {64.0f, -64.0f, 127.0f, -127.0f};
      const int64_t m = e.k > 4096 ? 2 : e.n > 20 ? 75 : 4;
      std::vector<float> x(static_cast<size_t>(m * e.k));
      for (int64_t r = 0; r < m; ++r) {
        const float value = values[e.k > 4096 ? r + 2 : r % 4];
        for (int64_t k = 0; k < e.k; ++k) x[static_cast<size_t>(r * e.k + k)] = value;
        x[static_cast<size_t>(r * e.k)] = 127.0f;
      }
      const std::vector<float> y = forward(tested, w.shape, x.data(), e.k, m, nullptr, e.n);
      CHECK(same_bits(y, forward(oracle, w.shape, x.data(), e.k, m, nullptr, e.n)));
      for (int64_t r = 0; r < m && e.k == 4096; ++r) {
        double sum = 0.0;
        for (int64_t k = 0; k < e.k; ++k)
          sum += (e.code - e.zero) * static_cast<double>(x[static_cast<size_t>(r * e.k + k)]);
        CHECK_NOTE(y[static_cast<size_t>(r * e.n)] == static_cast<float>(sum), "%g instead of %g",
                   static_cast<double>(y[static_cast<size_t>(r * e.n)]), sum);
      }
      if (check::failed > failed) {
        check::note("%s: bits=%d k=%d code=%d zero=%d", isa_name(isa), bits, static_cast<int>(e.k), e.code, e.zero);
      }
    }
  }
}

// What a convolution asks for: several pieces a group, out of order in the row, behind row pointers
// of any alignment, with other data right behind every piece.
void over_pieces(Isa isa) {
  const LinearKernel& kernel = *linear_kernel(isa);
  const LinearKernel& reference = *linear_kernel(Isa::reference);
  check::Random random(3);
  for (int round = 0; round < 88; ++round) {
    const bool ternary = round >= 80;  // wide and tall enough for tables over the batch
    const int bits = ternary ? 2 : (const int[]){2, 3, 4, 8}[round % 4];
    const int64_t m = ternary ? 12 + random.below(40) : 1 + random.below(round % 5 == 0 ? 150 : 7),
                  n = ternary ? 128 + random.below(70) : 1 + random.below(round % 7 == 0 ? 200 : 40),
                  groups = 1 + random.below(3);
    std::vector<KPiece> pieces;
    int64_t k = 0, row_bytes = 0;
    for (int64_t g = 0; g < groups; ++g) {
      for (int piece = 1 + random.below(3); piece > 0; --piece) {
        const int64_t size = 1 + random.below(round % 3 == 0 ? 70 : 21);
        pieces.push_back({k, size, 0, g});
        k += size;
      }
    }
    for (size_t p = pieces.size(); p-- > 0;) {  // the last piece comes first in the row
      pieces[p].row_offset = row_bytes;
      row_bytes += pieces[p].k_size + random.below(5);
    }
    const auto piece_count = static_cast<int64_t>(pieces.size());
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(ternary ? 3 : 1 << bits));
    std::vector<float> scale(static_cast<size_t>(n * groups)), zero(scale.size(), 1.0f), bias(static_cast<size_t>(n));
    for (float& s : scale) s = random.uniform();
    for (float& b : bias) b = random.uniform();
    if (round % 2 == 1) {
      for (float& z : zero) z = 3.0f * random.uniform();
    }

    const int64_t row_step = row_bytes + random.below(9);
    std::vector<int8_t> data(static_cast<size_t>(m * row_step + 64 + 1));
    for (int8_t& a : data) a = static_cast<int8_t>(random.below(255) - 127);
    std::vector<const int8_t*> rows;
    std::vector<float> row_scale;
    std::vector<int32_t> row_sums;
    for (int64_t r = 0; r < m; ++r) {
      rows.push_back(data.data() + 1 + r * row_step);
      row_scale.push_back(0.5f + 0.01f * static_cast<float>(r));
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (const KPiece& p : pieces) {
          for (int64_t i = 0; i < p.k_size && p.group == g; ++i) sum += rows.back()[p.row_offset + i];
        }
        row_sums.push_back(sum);
      }
    }

    std::vector<float> out[2];
    const LinearKernel* kernels[] = {&kernel, &reference};
    for (int which = 0; which < 2; ++which) {
      const LinearKernel& one = *kernels[which];
      const Packed packed(one, bits, bits, n, k, groups, pieces, codes, scale, zero);
      out[which].assign(static_cast<size_t>(m * (n + 1)), kUntouched);
      packed_view_run(packed.view, rows.data(), row_scale.data(), row_sums.data(), m, bias.data(), out[which].data(),
                      n + 1);
    }
    CHECK_NOTE(same_bits(out[0], out[1]), "%s: bits=%d m=%d n=%d k=%d in %d pieces", isa_name(isa), bits,
               static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(piece_count));
  }
}

// Rows enough for kernels that unpack codes once for many of them: every height of the last tile, groups
// of less and more than such a panel, and rows behind pointers.
void many_rows(Isa isa) {
  const LinearKernel& kernel = *linear_kernel(isa);
  const LinearKernel& reference = *linear_kernel(Isa::reference);
  check::Random random(8);
  const int64_t row_counts[] = {63, 64, 80, 97, 128, 213, 300}, widths[] = {33, 64, 81, 160, 257},
                group_sizes[] = {32, 64, 96, 128, 256, 300, 200, 770, 1500};
  for (int round = 0; round < 72; ++round) {
    const int bits = (const int[]){2, 4, 8, 3}[round % 4];
    const int64_t m = row_counts[round % 7], n = widths[round % 5], group_size = group_sizes[round / 8],
                  groups = 1 + random.below(group_size > 300 ? 2 : 7), k = groups * group_size - random.below(31);
    const bool uniform = round % 3 != 0, scaled = round % 5 == 3, spaced = round % 2 == 0;
    std::vector<KPiece> pieces;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group_size;
      pieces.push_back({begin, std::min(group_size, k - begin), begin, g});
    }
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(1 << bits));
    std::vector<float> scale(static_cast<size_t>(n * groups)), bias(static_cast<size_t>(n)),
        zero(scale.size(), static_cast<float>(1 << (bits - 1)));
    for (float& s : scale) s = random.uniform();
    for (float& b : bias) b = random.uniform();
    if (!uniform) {
      for (float& z : zero) z = 3.0f * random.uniform();
    }
    const int64_t row_step = (k + 63) / 64 * 64;
    std::vector<int8_t> data(static_cast<size_t>(m * row_step + 64));
    for (int8_t& a : data) a = static_cast<int8_t>(random.below(255) - 127);
    std::vector<const int8_t*> rows;
    std::vector<float> row_scale, group_scale;
    std::vector<int32_t> row_sums;
    for (int64_t r = 0; r < m; ++r) {
      rows.push_back(data.data() + (spaced ? r : random.below(static_cast<int>(m))) * row_step);
      row_scale.push_back(0.5f + 0.01f * static_cast<float>(r));
      for (const KPiece& p : pieces) {
        int32_t sum = 0;
        for (int64_t i = 0; i < p.k_size; ++i) sum += rows.back()[p.row_offset + i];
        row_sums.push_back(sum);
        group_scale.push_back(random.uniform());
      }
    }
    std::vector<int8_t> codes_out[2], added(static_cast<size_t>(m * n));
    std::vector<const int8_t*> added_rows;
    for (int8_t& a : added) a = static_cast<int8_t>(random.below(255) - 127);
    for (int64_t r = 0; r < m; ++r) added_rows.push_back(added.data() + r * n);
    std::vector<float> out[2], small_scale = row_scale;
    for (float& s : small_scale) s *= 3e-3f / std::sqrt(static_cast<float>(k));  // codes of every size
    const LinearKernel* kernels[] = {&kernel, &reference};
    for (int which = 0; which < 2; ++which) {
      const LinearKernel& one = *kernels[which];
      const Packed packed(one, bits, bits, n, k, groups, pieces, codes, scale, zero);
      out[which].assign(static_cast<size_t>(m * (n + 1)), kUntouched);
      packed_view_run(packed.view, rows.data(), row_scale.data(), row_sums.data(), m, bias.data(), out[which].data(),
                      n + 1, {}, scaled ? group_scale.data() : nullptr);
      codes_out[which].assign(static_cast<size_t>(m * (n + 3)), int8_t{55});
      std::vector<int8_t*> code_rows;
      for (int64_t r = 0; r < m; ++r) code_rows.push_back(codes_out[which].data() + r * (n + 3));
      const CodeOutputs to = {code_rows.data(), round % 2 == 0 ? added_rows.data() : nullptr, 0.7f};
      CHECK(packed_view_run_codes(packed.view, rows.data(), small_scale.data(), row_sums.data(), m, bias.data(), to, 0,
                                  (n + one.block_n - 1) / one.block_n) == Status::ok);
    }
    CHECK_NOTE(codes_out[0] == codes_out[1], "%s: codes of bits=%d m=%d n=%d k=%d in groups of %d", isa_name(isa), bits,
               static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(group_size));
    CHECK_NOTE(same_bits(out[0], out[1]), "%s: bits=%d m=%d n=%d k=%d in groups of %d%s%s", isa_name(isa), bits,
               static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), static_cast<int>(group_size),
               uniform ? "" : ", zeros", scaled ? ", scaled" : "");
  }
}

// Three bits take three where four would not fit a core's cache; where they would, a kernel may use four.
void three_bits_by_size(Isa isa) {
  check::Random random(4);
  const LinearShape small = {64, 1024, 3, 1024}, large = {321, 7003, 3, 1000};
  if (linear_kernel(isa)->expand_block != nullptr) {
    const LinearShape as_four = {64, 1024, 4, 1024};
    CHECK(linear_layout_bytes(small, isa) == linear_layout_bytes(as_four, isa));
    const double bytes = static_cast<double>(linear_layout_bytes(large, isa));
    CHECK_NOTE(bytes < 0.45 * 384 * 7100, "%g bytes", bytes);
    // A zero that only 4 bits hold is not an integer zero of 3.
    Weights w = make_weights(small, Zeros::uniform, random);
    w.zero.assign(w.zero.size(), 8.0f);
    std::vector<float> x(1024);
    for (float& v : x) v = random.uniform();
    CHECK(same_bits(forward(Layout(w, isa), small, x.data(), 1024, 1, nullptr, 64),
                    forward(Layout(w, Isa::reference), small, x.data(), 1024, 1, nullptr, 64)));
  }
  const Weights w = make_weights(large, Zeros::uniform, random);
  const Layout tested(w, isa), oracle(w, Isa::reference);
  check_unpack(tested, w, isa);
  std::vector<float> x(static_cast<size_t>(21 * large.k));
  for (float& v : x) v = random.uniform();
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 21}) {
    CHECK_NOTE(same_bits(forward(tested, large, x.data(), large.k, m, nullptr, large.n),
                         forward(oracle, large, x.data(), large.k, m, nullptr, large.n)),
               "%s: %d rows of 3 bits", isa_name(isa), static_cast<int>(m));
  }
}

// Ternary codes in 5/3 bits, forced at every size: rows and channels for each of the kernel's ways, from one row to
// those for which it unpacks codes once, and pieces and channels that fill no step. The reference has them in 2 bits.
void trits(Isa isa) {
  const LinearKernel& kernel = *linear_kernel(isa);
  const LinearKernel& reference = *linear_kernel(Isa::reference);
  CHECK(kernel.takes_trits == (isa == Isa::avx512_vbmi || isa == Isa::amx));
  if (!kernel.takes_trits) return;
  check::Random random(21);
  const int64_t row_counts[] = {1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 23, 24, 37, 47, 48, 64, 101},
                widths[] = {1, 15, 16, 17, 32, 33, 63, 64, 65, 130, 200, 257, 330},
                sizes[] = {1, 5, 23, 24, 25, 48, 63, 64, 65, 96, 130, 191, 192, 193, 200, 520, 1701};
  for (int round = 0; round < 260; ++round) {
    const int64_t m = row_counts[round % 17], n = widths[round % 13], groups = round % 4 == 3 ? 1 + random.below(4) : 1;
    std::vector<KPiece> pieces;
    int64_t k = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t size = sizes[random.below(17)];
      pieces.push_back({k, size, k, g});
      k += size;
    }
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (uint8_t& code : codes) code = round % 13 == 0 ? 2 : static_cast<uint8_t>(random.below(3));
    std::vector<float> scale(static_cast<size_t>(n * groups)), zero(scale.size(), 1.0f), bias(static_cast<size_t>(n));
    for (float& s : scale) s = random.uniform();
    for (float& b : bias) b = random.uniform();
    if (round % 3 == 1) {
      for (float& z : zero) z = 3.0f * random.uniform();
    }
    const int64_t row_step = (k + 63) / 64 * 64;
    std::vector<int8_t> data(static_cast<size_t>(m * row_step + 64));
    for (int8_t& a : data) a = round % 13 == 0 ? -127 : static_cast<int8_t>(random.below(255) - 127);
    std::vector<const int8_t*> rows;
    std::vector<float> row_scale;
    std::vector<int32_t> row_sums;
    for (int64_t r = 0; r < m; ++r) {
      rows.push_back(data.data() + (round % 2 == 0 ? r : random.below(static_cast<int>(m))) * row_step);
      row_scale.push_back(0.5f + 0.01f * static_cast<float>(r));
      for (const KPiece& p : pieces) {
        int32_t sum = 0;
        for (int64_t i = 0; i < p.k_size; ++i) sum += rows.back()[p.row_offset + i];
        row_sums.push_back(sum);
      }
    }
    std::vector<float> out[2];
    const LinearKernel* kernels[] = {&kernel, &reference};
    for (int which = 0; which < 2; ++which) {
      const LinearKernel& one = *kernels[which];
      const int bits = which == 0 ? kTrits : 2;
      const Packed packed(one, bits, 2, n, k, groups, pieces, codes, scale, zero);
      out[which].assign(static_cast<size_t>(m * (n + 1)), kUntouched);
      packed_view_run(packed.view, rows.data(), row_scale.data(), row_sums.data(), m, bias.data(), out[which].data(),
                      n + 1);
    }
    CHECK_NOTE(same_bits(out[0], out[1]), "%s: trits, m=%d n=%d k=%d in %d groups", isa_name(isa), static_cast<int>(m),
               static_cast<int>(n), static_cast<int>(k), static_cast<int>(groups));
  }
}

// Ternary layers take 5/3 bits a code where their 2-bit bytes outgrow the L2 of the threads, in one group
// and with int8 rows; and may be read with any number of threads.
void ternary_by_size(Isa isa) {
#if defined(_OPENMP)
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
#endif
  check::Random random(22);
  const bool takes = linear_kernel(isa)->takes_trits;
  const LinearShape large = {1301, 8201, 2, 8201, Activations::int8, true};
  const auto bytes_of = [&](LinearShape shape, bool ternary) {
    shape.ternary = ternary;
    return static_cast<double>(linear_layout_bytes(shape, isa));
  };
  const double ratio = bytes_of(large, true) / bytes_of(large, false);
  CHECK_NOTE(takes ? ratio < 0.85 : ratio == 1.0, "%s: %g of the bytes", isa_name(isa), ratio);
  for (const LinearShape& kept : {LinearShape{1301, 801, 2, 801}, LinearShape{1301, 8201, 2, 1024},
                                  LinearShape{1301, 8201, 2, 8201, Activations::int16},
                                  LinearShape{1301, 8201, 2, 8201, Activations::int8_block}}) {
    CHECK(bytes_of(kept, true) == bytes_of(kept, false));
  }
  CHECK(linear_layout_bytes({8, 8, 4, 8, Activations::int8, true}, isa) == -1);

  const Weights w = make_weights(large, Zeros::uniform, random, 3);
  const Layout tested(w, isa);
#if defined(_OPENMP)
  omp_set_num_threads(threads > 1 ? threads : 2);
#endif
  check_unpack(tested, w, isa);
  LinearShape shape;
  Isa read_isa = Isa::reference;
  double stored = 0.0;
  CHECK(linear_describe(tested.data(), tested.bytes(), &shape, &read_isa, &stored) == Status::ok);
  CHECK(shape.ternary && stored == (takes ? 5.0 / 3.0 : 2.0));
  if (takes) {  // the rest is as at any size
    const Layout oracle(w, Isa::reference);
    std::vector<float> x(static_cast<size_t>(7 * large.k)), residual(static_cast<size_t>(7 * large.n));
    for (float& v : x) v = random.uniform();
    for (float& v : residual) v = random.uniform();
    std::vector<float> y[2];
    for (int which = 0; which < 2; ++which) {
      const Layout& layout = which == 0 ? tested : oracle;
      y[which].assign(residual.size(), kUntouched);
      LinearArgs args;
      args.x = x.data();
      args.ldx = large.k;
      args.m = 7;
      args.epilogue = {Activation::relu, residual.data(), large.n};
      args.y = y[which].data();
      args.ldy = large.n;
      CHECK(linear_forward(layout.data(), layout.bytes(), args) == Status::ok);
    }
    CHECK(same_bits(y[0], y[1]));
  }
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#endif
}

void bad_input(Isa isa) {
  check::Random random(5);
  const LinearShape shape = {19, 37, 4, 16};
  const Weights w = make_weights(shape, Zeros::per_channel_and_group, random);
  Layout layout(w, isa);
  std::vector<float> x(2 * 37, 1.0f), y(2 * 19);
  const auto run = [&](int64_t bytes) {
    return run_forward(layout.data(), bytes, x.data(), 37, 2, nullptr, y.data(), 19);
  };
  CHECK(run(layout.bytes()) == Status::ok);

  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    for (size_t at : {size_t{0}, size_t{15}, size_t{36}, size_t{37 + 16}, size_t{37 + 36}}) {
      x[at] = bad;
      CHECK_NOTE(run(layout.bytes()) == Status::not_finite, "%g at %d", static_cast<double>(bad), static_cast<int>(at));
      x[at] = 1.0f;
    }
  }

  for (int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{100}, int64_t{128},
                        layout.bytes() - 64, layout.bytes() - 1}) {
    CHECK_NOTE(run(bytes) == Status::wrong_layout, "cut to %d bytes", static_cast<int>(bytes));
  }
  // Any damaged byte of the headers and the pieces is refused, or changes nothing that bounds a loop.
  for (int64_t at = 0; at < 64 + 128 + 3 * 32; ++at) {
    for (int flip : {0x01, 0x80, 0xff}) {
      layout.data()[at] ^= static_cast<uint8_t>(flip);
      LinearShape read;
      Isa read_isa;
      const Status status = linear_describe(layout.data(), layout.bytes(), &read, &read_isa);
      CHECK(status == Status::wrong_layout || status == Status::ok);
      if (status == Status::ok) {
        CHECK_NOTE(read.n == shape.n && read.k == shape.k && run(layout.bytes()) == Status::ok, "byte %d",
                   static_cast<int>(at));
      }
      layout.data()[at] ^= static_cast<uint8_t>(flip);
    }
  }
  CHECK(run(layout.bytes()) == Status::ok);

  const auto strides = [&](int64_t ldx, int64_t m, int64_t ldy) {
    return run_forward(layout.data(), layout.bytes(), x.data(), ldx, m, nullptr, y.data(), ldy);
  };
  CHECK(strides(36, 2, 19) == Status::invalid_argument);
  CHECK(strides(37, 2, 18) == Status::invalid_argument);
  CHECK(strides(37, -1, 19) == Status::invalid_argument);
  for (const LinearShape& bad : {LinearShape{-1, 4, 2, 4}, LinearShape{4, -1, 2, 4}, LinearShape{4, 4, 5, 4},
                                 LinearShape{4, 4, 2, 0}, LinearShape{4, int64_t{1} << 40, 2, 4}}) {
    CHECK(linear_layout_bytes(bad, isa) == -1);
    CHECK(linear_pack(bad, isa, w.codes.data(), w.scale.data(), w.zero.data(), layout.data(), layout.bytes()) ==
          Status::invalid_argument);
  }
  CHECK(linear_pack(shape, isa, w.codes.data(), w.scale.data(), w.zero.data(), layout.data(), layout.bytes() - 1) ==
        Status::invalid_argument);
}

// Activation and residual give what the epilogue's reference makes of the bare outputs, and rows that
// were rounded before, with sums of these groups or of others, what the float rows give.
void fused(Isa isa) {
  check::Random random(11);
  for (const Case& c : {Case{1, 70, 65, 65}, Case{3, 19, 37, 8}, Case{37, 130, 96, 32}, Case{70, 5000, 40, 40},
                        Case{130, 2100, 768, 768}}) {
    const LinearShape shape = {c.n, c.k, 4, c.group_size};
    const Weights w = make_weights(shape, Zeros::uniform, random);
    const Layout layout(w, isa);
    std::vector<float> x(static_cast<size_t>(c.m * c.k)), residual(static_cast<size_t>(c.m * (c.n + 3)));
    std::vector<float> bias(static_cast<size_t>(c.n));
    for (auto* values : {&x, &residual, &bias}) {
      for (float& v : *values) v = random.uniform();
    }
    const std::vector<float> bare = forward(layout, shape, x.data(), c.k, c.m, bias.data(), c.n + 1);
    LinearArgs args;
    args.x = x.data();
    args.ldx = c.k;
    args.m = c.m;
    args.bias = bias.data();
    args.ldy = c.n + 1;
    for (int activation = 0; activation < kActivationCount; ++activation) {
      for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(residual.data())}) {
        args.epilogue = {static_cast<Activation>(activation), added, c.n + 3};
        std::vector<float> expected = bare, y(bare.size(), kUntouched);
        epilogue_reference()->run({expected.data(), c.n + 1, c.m, c.n, args.epilogue});
        args.y = y.data();
        CHECK(linear_forward(layout.data(), layout.bytes(), args) == Status::ok);
        CHECK_NOTE(same_bits(y, expected), "%s: activation %d, m=%d n=%d", isa_name(isa), activation,
                   static_cast<int>(c.m), static_cast<int>(c.n));
      }
    }
    args.epilogue = {Activation::none, residual.data(), c.n - 1};
    CHECK(linear_forward(layout.data(), layout.bytes(), args) == Status::invalid_argument);
    args.epilogue = {};

    for (int64_t group_size : {c.group_size, int64_t{7}}) {
      const int64_t groups = (c.k + group_size - 1) / group_size;
      std::vector<int8_t> q(static_cast<size_t>(c.m * padded_row_bytes(c.k) + kRowAlign));
      std::vector<float> scale(static_cast<size_t>(c.m));
      std::vector<int32_t> sums(static_cast<size_t>(c.m * groups));
      CHECK(quantize_rows({x.data(), c.k, c.m, c.k, group_size, q.data(), scale.data(), sums.data()}, isa) ==
            Status::ok);
      std::vector<float> y(bare.size(), kUntouched);
      args.x = nullptr;
      args.rows = {q.data(), scale.data(), sums.data(), group_size};
      args.y = y.data();
      CHECK(linear_forward(layout.data(), layout.bytes(), args) == Status::ok);
      CHECK_NOTE(same_bits(y, bare), "%s: rounded rows, groups of %d", isa_name(isa), static_cast<int>(group_size));
    }
    args.rows = {};
    CHECK(linear_forward(layout.data(), layout.bytes(), args) == Status::invalid_argument);
  }
}

// The environment's ceiling picks this variant, and no other, for a new layer.
void forced_by_the_environment(Isa isa) {
  setenv("BANTAMWEIGHT_FORCE_KERNEL", isa_name(isa), 1);
  Isa ceiling = Isa::reference;
  CHECK(isa_ceiling(&ceiling) == nullptr);
  CHECK_NOTE(linear_select(ceiling) == isa, "%s was forced, %s was picked", isa_name(isa),
             isa_name(linear_select(ceiling)));
  unsetenv("BANTAMWEIGHT_FORCE_KERNEL");
}

}  // namespace

int main() {
  const char* forced = std::getenv("BANTAMWEIGHT_FORCE_KERNEL");
  const std::vector<char> name =
      forced == nullptr ? std::vector<char>(1) : std::vector<char>(forced, forced + std::strlen(forced) + 1);
  bool forced_ran = false;
  std::size_t count = 0;
  const Isa* isas = linear_variants(&count);
  CHECK(count > 0 && isas[count - 1] == Isa::reference);
  for (std::size_t i = 0; i < count; ++i) {
    const bool wanted = name[0] == '\0' || std::strcmp(name.data(), isa_name(isas[i])) == 0;
    if (const char* missing = isa_missing(isas[i])) {
      std::printf("  %-12s not run: %s\n", isa_name(isas[i]), missing);
      continue;
    }
    if (!wanted) continue;
    const int failed = check::failed;
    forced_by_the_environment(isas[i]);
    over_awkward_shapes(isas[i]);
    at_the_largest_sums(isas[i]);
    over_pieces(isas[i]);
    many_rows(isas[i]);
    fused(isas[i]);
    three_bits_by_size(isas[i]);
    trits(isas[i]);
    ternary_by_size(isas[i]);
    bad_input(isas[i]);
    forced_ran = true;
    std::printf("  %-12s %s\n", isa_name(isas[i]),
                check::failed == failed ? "ran, equal to the reference" : "ran, DIFFERS");
  }
  CHECK_NOTE(forced_ran, "%s was forced and did not run", name.data());
  return check::report("test_lowbit_linear");
}
