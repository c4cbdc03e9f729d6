// Attention over vectors (runtime/floats_*.h), six queries at a time: their scores with all keys, the softmax, their
// sums over the values; what lies between stays in L1. Everything is static: each file that includes it keeps a copy
// with its own flags.
//
// Both products are the same tile: six rows of numbers, each broadcast, times rows of vectors. For the scores the
// vectors are keys side by side, so a head's keys are transposed first, in blocks of 64 that lie together; its values
// are copied together, too: rows a few KB apart share few sets of L1. Keys and elements are padded to 16, the keys by
// ones that the mask hides; queries are padded by the last one.
//
// Beside the two products a score costs 20 vector operations, of which 15 are exp.
#pragma once

#include "attention/attention.h"
#include "attention/exponential.h"

namespace bantamweight {

static constexpr int64_t kQueries = 6;     // at a time: six rows by four vectors leave room among 32 registers
static constexpr int64_t kBlockKeys = 64;  // [head_size][64] floats are 16 KB of 64 elements

// So many vectors at a time as the registers hold beside six rows: AVX2 has 16 of them, the others 32.
template <class F>
static constexpr int kMostVectors = F::kLanes == 8 ? 2 : 4;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// c[r] = sum over i < depth of a[r][i] * b[i], kVectors vectors from b + i * ldb.
template <class F, int kVectors>
static inline void multiply_rows(const float* const (&a)[kQueries], const float* b, int64_t ldb, int64_t depth,
                                 typename F::Vector (&c)[kQueries][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) c[r][j] = F::all(0.0f);
  }
  for (int64_t i = 0; i < depth; ++i, b += ldb) {
    typename F::Vector x[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) x[j] = F::load(b + j * F::kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kQueries; ++r) {
      const auto number = F::all(a[r][i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) c[r][j] = F::multiply_add(number, x[j], c[r][j]);
    }
  }
}

// Scores of six queries with kVectors vectors of keys, into scores [6][padded].
template <class F, int kVectors>
static inline void score_keys(const float* const (&q)[kQueries], const float* keys, int64_t width, int64_t head_size,
                              float* scores, int64_t padded) {
  typename F::Vector c[kQueries][kVectors];
  multiply_rows<F, kVectors>(q, keys, width, head_size, c);
  for (int r = 0; r < kQueries; ++r) {
    for (int j = 0; j < kVectors; ++j) F::store(scores + r * padded + j * F::kLanes, c[r][j]);
  }
}

template <class F>
static inline typename F::Vector exponential(typename F::Vector x) {
  x = F::larger(x, F::all(kExpLowest));
  const auto shifted = F::multiply_add(x, F::all(kLog2E), F::all(kRoundToExponent));
  const auto n = F::subtract(shifted, F::all(kRoundToExponent));
  const auto r = F::subtract_product(F::subtract_product(x, n, F::all(kLn2High)), n, F::all(kLn2Low));
  auto p = F::all(kExpPolynomial[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = F::multiply_add(p, r, F::all(kExpPolynomial[i]));
  p = F::add(F::multiply_add(p, F::multiply(r, r), r), F::all(1.0f));
  return F::multiply(p, F::shifted_to_exponent(shifted));
}

// Scores [padded] of one query to exp(score * scale + mask - largest); returns the inverse of their sum, or 0 and
// zeros where all are hidden. `mask` hides the padding. *poison turns NaN if a score is not finite.
template <class F>
static inline float exponentials(float* scores, const float* mask, int64_t padded, float scale,
                                 typename F::Vector* poison) {
  constexpr int64_t kLanes = F::kLanes, kVectors = kAttentionLanes / kLanes;
  const auto scales = F::all(scale), zero = F::all(0.0f);
  auto largest = F::all(-__builtin_inff());
  for (int64_t i = 0; i < padded; i += kLanes) {
    const auto score = F::load(scores + i);
    *poison = F::multiply_add(score, zero, *poison);
    const auto masked = F::multiply_add(score, scales, F::load(mask + i));
    largest = F::larger(masked, largest);
    F::store(scores + i, masked);
  }
  const float most = F::largest(largest);
  if (most == -__builtin_inff()) {
    for (int64_t i = 0; i < padded; i += kLanes) F::store(scores + i, zero);
    return 0.0f;
  }
  const auto mosts = F::all(most);
  typename F::Vector sum[kVectors];
  for (int64_t j = 0; j < kVectors; ++j) sum[j] = zero;
  for (int64_t i = 0; i < padded; i += kAttentionLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
      float* at = scores + i + kLanes * j;
      const auto p = exponential<F>(F::subtract(F::load(at), mosts));
      F::store(at, p);
      sum[j] = F::add(sum[j], p);
    }
  }
  for (int64_t half = kVectors / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sum[j] = F::add(sum[j], sum[j + half]);
  }
  return 1.0f / F::sum(sum[0]);
}

// `count` elements of six outputs, at most kVectors vectors.
template <class F, int kVectors>
static inline void sum_values(const float* const (&p)[kQueries], const float* values, int64_t width, int64_t keys,
                              int64_t count, const float (&inverse)[kQueries], float* const (&out)[kQueries]) {
  typename F::Vector c[kQueries][kVectors];
  multiply_rows<F, kVectors>(p, values, width, keys, c);
  for (int r = 0; r < kQueries; ++r) {
    const auto by = F::all(inverse[r]);
    for (int j = 0; j < kVectors; ++j) {
      F::store(out[r] + j * F::kLanes, F::multiply(c[r][j], by), F::part(count - j * F::kLanes));
    }
  }
}

// A head's keys as [keys / 64][head_size][64], the last block as wide as it is full. The same columns of the next head
// are fetched meanwhile: no prefetcher follows rows that lie pages apart.
static inline void transpose_keys(const float* k, int64_t ldk, int64_t keys, int64_t padded, int64_t head_size,
                                  float* to) {
  for (int64_t block = 0; block < padded; block += kBlockKeys, to += kBlockKeys * head_size) {
    const int64_t width = padded - block < kBlockKeys ? padded - block : kBlockKeys;
    for (int64_t j = 0; j < width; ++j) {
      const float* row = k + (block + j) * ldk;
      const bool there = block + j < keys;
      for (int64_t e = 0; there && e < head_size; e += 16) __builtin_prefetch(row + head_size + e, 0, 3);
      for (int64_t e = 0; e < head_size; ++e) to[e * width + j] = there ? row[e] : 0.0f;
    }
  }
}

// A head's values as [keys][width], zeros behind the elements.
template <class F>
static inline void gather_values(const float* v, int64_t ldv, int64_t keys, int64_t head_size, int64_t width,
                                 float* to) {
  for (int64_t j = 0; j < keys; ++j, v += ldv, to += width) {
    for (int64_t e = 0; e < head_size; e += 16) __builtin_prefetch(v + head_size + e, 0, 3);
    for (int64_t e = 0; e < width; e += F::kLanes) F::store(to + e, F::load(v + e, F::part(head_size - e)));
  }
}

// mask [keys], behind which the padding is hidden; false if it holds NaN or +infinity.
static inline bool pad_mask(const float* mask, int64_t keys, int64_t padded, float* to) {
  int bad = 0;
  for (int64_t i = 0; i < keys; ++i) {
    to[i] = mask == nullptr ? 0.0f : mask[i];
    bad |= !(to[i] < __builtin_inff());
  }
  for (int64_t i = keys; i < padded; ++i) to[i] = -__builtin_inff();
  return bad == 0;
}

static inline int64_t attention_scratch_floats(int64_t keys, int64_t head_size) {
  constexpr int64_t kScoresAndMask = kQueries + 1;
  return (head_size + kScoresAndMask) * attention_padded(keys) + keys * attention_padded(head_size);
}

template <class F>
static bool attention_queries(const AttentionTask& task) {
  constexpr int64_t kMost = kMostVectors<F>, kStep = kMost * F::kLanes;
  const int64_t keys = task.keys, padded = attention_padded(keys), size = task.head_size,
                width = attention_padded(size);
  float* transposed = task.scratch;            // [padded / 64][size][64]
  float* values = transposed + size * padded;  // [keys][width]
  float* scores = values + keys * width;       // [6][padded]
  float* mask = scores + kQueries * padded;    // [padded]
  transpose_keys(task.k, task.ldk, keys, padded, size, transposed);
  gather_values<F>(task.v, task.ldv, keys, size, width, values);
  const bool one_mask = task.mask == nullptr || task.ldm == 0;
  if (one_mask && !pad_mask(task.mask, keys, padded, mask)) return false;
  auto poison = F::all(0.0f);
  for (int64_t first = 0; first < task.queries; first += kQueries) {
    const float *q[kQueries], *p[kQueries];
    float *out[kQueries], inverse[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) {
      const int64_t row = first + r < task.queries ? first + r : task.queries - 1;
      q[r] = task.q + row * task.ldq;
      p[r] = scores + r * padded;
      out[r] = task.out + row * task.ldo;
      for (int64_t e = 0; e < size; e += 16) __builtin_prefetch(q[r] + size + e, 0, 3);
    }
    for (int64_t block = 0; block < padded; block += kBlockKeys) {
      const int64_t in_block = padded - block < kBlockKeys ? padded - block : kBlockKeys;
      const float* from = transposed + block * size;
      float* to = scores + block;
      int64_t j = 0;
      for (; j + kStep <= in_block; j += kStep) score_keys<F, kMost>(q, from + j, in_block, size, to + j, padded);
      for (; j < in_block; j += F::kLanes) score_keys<F, 1>(q, from + j, in_block, size, to + j, padded);
    }
    for (int64_t r = 0; r < kQueries; ++r) {
      const int64_t row = first + r < task.queries ? first + r : task.queries - 1;
      if (!one_mask && !pad_mask(task.mask + row * task.ldm, keys, padded, mask)) return false;
      inverse[r] = exponentials<F>(scores + r * padded, mask, padded, task.scale, &poison);
    }
    int64_t e = 0;
    const auto sum = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      sum_values<F, kVectors>(p, values + e, width, keys, size - e, inverse, out);
      e += kVectors * F::kLanes;
      for (auto& to : out) to += kVectors * F::kLanes;
    };
    while (e + kStep <= width) sum(Count<kMost>());
    while (e + 2 * F::kLanes <= width) sum(Count<2>());
    while (e < size) sum(Count<1>());
  }
  return F::sum(poison) == 0.0f;
}

}  // namespace bantamweight
