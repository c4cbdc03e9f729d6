// The loops over any vectors: F of runtime/floats_*.h, and C of the including file, which turns F::kLanes
// codes into a vector of floats and back and has bytes to compare. Everything is static: each file that
// includes it keeps a copy with its own flags.
#pragma once

#include "code_maps/code_maps.h"

namespace bantamweight {

template <class F, class C>
static inline typename F::Vector weighted(const WeightedSum& sum, int64_t i) {
  auto t = F::all(sum.shift);
  if (sum.floats != nullptr) t = F::multiply_add(F::load(sum.floats + i), F::all(sum.factor), t);
  if (sum.a != nullptr) t = F::multiply_add(C::load(sum.a + i), F::all(sum.factor_a), t);
  if (sum.b != nullptr) t = F::multiply_add(C::load(sum.b + i), F::all(sum.factor_b), t);
  return t;
}

// What is left of the sum behind whole vectors, in memory that is as long as a vector.
template <class F>
struct SumTail {
  float floats[F::kLanes] = {};
  int8_t a[F::kLanes] = {}, b[F::kLanes] = {};
  WeightedSum sum;

  SumTail(const WeightedSum& whole, int64_t from) : sum(whole) {
    for (int64_t i = from; i < whole.count; ++i) {
      if (whole.floats != nullptr) floats[i - from] = whole.floats[i];
      if (whole.a != nullptr) a[i - from] = whole.a[i];
      if (whole.b != nullptr) b[i - from] = whole.b[i];
    }
    if (whole.floats != nullptr) sum.floats = floats;
    if (whole.a != nullptr) sum.a = a;
    if (whole.b != nullptr) sum.b = b;
  }
};

template <class F, class C>
static inline void store_codes(const WeightedSum& sum, int64_t i, int8_t* codes) {
  const auto most = F::smaller(weighted<F, C>(sum, i), F::all(127.0f));
  C::store(codes, F::larger(most, F::all(-127.0f)));
}

template <class F, class C>
static void to_codes(const WeightedSum& sum, int8_t* codes) {
  int64_t i = 0;
  for (; i + F::kLanes <= sum.count; i += F::kLanes) store_codes<F, C>(sum, i, codes + i);
  if (i == sum.count) return;
  const SumTail<F> tail(sum, i);
  int8_t left[F::kLanes];
  store_codes<F, C>(tail.sum, 0, left);
  for (int64_t j = 0; i < sum.count; ++i, ++j) codes[i] = left[j];
}

template <class F, class C>
static void to_floats(const WeightedSum& sum, bool relu, float* y) {
  const auto value = [&](const WeightedSum& of, int64_t at) __attribute__((always_inline)) {
    const auto t = weighted<F, C>(of, at);
    return relu ? F::larger(t, F::all(0.0f)) : t;
  };
  int64_t i = 0;
  for (; i + F::kLanes <= sum.count; i += F::kLanes) F::store(y + i, value(sum, i));
  if (i == sum.count) return;
  const SumTail<F> tail(sum, i);
  F::store(y + i, value(tail.sum, 0), F::part(sum.count - i));
}

template <class C>
static void largest(const int8_t* const* rows, int64_t row_count, int64_t count, int8_t* codes) {
  int64_t i = 0;
  for (; i + C::kBytes <= count; i += C::kBytes) {
    auto most = C::load_bytes(rows[0] + i);
    for (int64_t r = 1; r < row_count; ++r) most = C::larger(most, C::load_bytes(rows[r] + i));
    C::store_bytes(codes + i, most);
  }
  for (; i < count; ++i) {
    int8_t most = rows[0][i];
    for (int64_t r = 1; r < row_count; ++r) most = rows[r][i] > most ? rows[r][i] : most;
    codes[i] = most;
  }
}

}  // namespace bantamweight
