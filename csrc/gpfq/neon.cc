// Four rows by four registers of columns at a time: the rows above the block are applied to its
// sixteen accumulators as in a matrix product, then the block's own triangle is solved in registers.
#include "gpfq/gpfq.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

namespace bantamweight {
namespace {

constexpr int kRows = 4;
constexpr int kVectors = 4;
constexpr int kLanes = 4;
constexpr int64_t kWidth = kVectors * kLanes;  // a slice is taken in runs of this many columns
static_assert(kGpfqSlice % kWidth == 0, "a slice is whole runs");

struct Run {
  const GpfqPanel<float>* panel;
  int64_t problem, begin;
  int64_t lanes[kVectors];  // columns that each register really has
};

float32x4_t load(const float* from, int64_t lanes) {
  if (lanes == kLanes) return vld1q_f32(from);
  float part[kLanes] = {};
  if (lanes > 0) std::memcpy(part, from, static_cast<size_t>(lanes) * sizeof(float));
  return vld1q_f32(part);
}

void store(float* to, int64_t lanes, float32x4_t value) {
  if (lanes == kLanes) return vst1q_f32(to, value);
  float part[kLanes];
  vst1q_f32(part, value);
  if (lanes > 0) std::memcpy(to, part, static_cast<size_t>(lanes) * sizeof(float));
}

uint32x4_t mix(uint32x4_t x) {
  x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 16)), vdupq_n_u32(0x85ebca6bu));
  x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 13)), vdupq_n_u32(0xc2b2ae35u));
  return veorq_u32(x, vshrq_n_u32(x, 16));
}

// Uniform in [0, 1): 24 bits of the counter's hash.
float32x4_t random_offset(const Run& run, int64_t row, int64_t column) {
  const uint32_t key = gpfq_row_key(run.panel->seed, run.problem, run.panel->first_row + row);
  const uint32_t first[kLanes] = {0, 1, 2, 3};
  const uint32x4_t counter = vaddq_u32(vdupq_n_u32(static_cast<uint32_t>(column)), vld1q_u32(first));
  const uint32x4_t bits = mix(vmlaq_n_u32(vdupq_n_u32(key), counter, kGpfqColumnStride));
  return vmulq_n_f32(vcvtq_f32_u32(vshrq_n_u32(bits, 8)), 1.0f / 16777216.0f);
}

// How an argument becomes a code, and what is fed back; writes the row's codes.
float32x4_t quantize(const Run& run, int64_t row, int v, float32x4_t z) {
  const GpfqPanel<float>& p = *run.panel;
  const int64_t lanes = run.lanes[v], column = run.begin + v * kLanes;
  const int64_t grid = (run.problem * p.groups + p.group_of_row[row]) * p.columns + column;
  const int64_t at = (run.problem * p.rows + row) * p.columns + column;
  const float32x4_t none = vdupq_n_f32(0.0f), zero = load(p.zero + grid, lanes);

  float32x4_t offset = vdupq_n_f32(0.5f);
  if (p.rounding == GpfqRounding::stochastic) offset = random_offset(run, row, column);
  float32x4_t steps = vmulq_f32(z, load(p.inverse_scale + grid, lanes));
  const float32x4_t size = vabsq_f32(steps), threshold = vdupq_n_f32(p.threshold);
  if (p.shrink == GpfqShrink::soft) {
    const float32x4_t left = vmaxnmq_f32(vsubq_f32(size, threshold), none);
    steps = vbslq_f32(vdupq_n_u32(0x80000000u), steps, left);
  } else if (p.shrink == GpfqShrink::hard) {
    steps = vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(size, threshold), vreinterpretq_u32_f32(steps)));
  }
  // FMAXNM gives the number when the other side is NaN: code 0.
  float32x4_t code = vmaxnmq_f32(vrndmq_f32(vaddq_f32(steps, vaddq_f32(zero, offset))), none);
  code = vminq_f32(code, vdupq_n_f32(static_cast<float>(p.levels - 1)));
  uint32_t words[kLanes];
  vst1q_u32(words, vcvtq_u32_f32(code));
  for (int64_t i = 0; i < lanes; ++i) p.codes[at + i] = static_cast<uint8_t>(words[i]);

  const float32x4_t q = vmulq_f32(load(p.scale + grid, lanes), vsubq_f32(code, zero));
  if (p.feedback == GpfqFeedback::change) return vsubq_f32(q, load(p.previous + at, lanes));
  if (p.feedback == GpfqFeedback::error) return vsubq_f32(q, z);
  return q;
}

void run_columns(const Run& run) {
  const GpfqPanel<float>& p = *run.panel;
  float* panel = p.panel + run.problem * p.rows * p.columns + run.begin;
  const float* lower = p.lower + run.problem * p.rows * p.rows;
  float done[kGpfqMaxRows][kWidth];  // the amounts so far, without the panel's stride

  for (int64_t top = 0; top < p.rows; top += kRows) {
    const int64_t rows = p.rows - top < kRows ? p.rows - top : kRows;
    const float* l[kRows];
    float32x4_t acc[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      // Rows past the end repeat the last one; their results are dropped.
      const int64_t row = top + (i < rows ? i : rows - 1);
      l[i] = lower + row * p.rows;
      for (int v = 0; v < kVectors; ++v) acc[i][v] = load(panel + row * p.columns + v * kLanes, run.lanes[v]);
    }
    for (int64_t k = 0; k < top; ++k) {
      float32x4_t a[kVectors];
      for (int v = 0; v < kVectors; ++v) a[v] = vld1q_f32(done[k] + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const float32x4_t factor = vdupq_n_f32(l[i][k]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = vfmsq_f32(acc[i][v], factor, a[v]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      float32x4_t amount[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        amount[v] = quantize(run, top + i, v, acc[i][v]);
        vst1q_f32(done[top + i] + v * kLanes, amount[v]);
        store(panel + (top + i) * p.columns + v * kLanes, run.lanes[v], amount[v]);
      }
      for (int below = i + 1; below < kRows; ++below) {
        const float32x4_t factor = vdupq_n_f32(l[below][top + i]);
        for (int v = 0; v < kVectors; ++v) acc[below][v] = vfmsq_f32(acc[below][v], factor, amount[v]);
      }
    }
  }
}

void run(const GpfqPanel<float>& p, int64_t problem, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWidth) {
    Run columns = {&p, problem, at, {}};
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = end - at - v * kLanes;
      columns.lanes[v] = left >= kLanes ? kLanes : left > 0 ? left : 0;
    }
    run_columns(columns);
  }
}

constexpr GpfqKernel kernel = {Isa::neon, run};

}  // namespace

const GpfqKernel* gpfq_kernel_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {

const GpfqKernel* gpfq_kernel_neon() { return nullptr; }

}  // namespace bantamweight

#endif
