// Picks the variant and shares the flat vector out over OpenMP's threads.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "runtime/threads.h"
#include "runtime/variants.h"
#include "vector_ops/vector_ops.h"

namespace bantamweight {
namespace {

const VariantList<VectorKernel>& variants() {
  static const VariantList<VectorKernel> list = {vector_kernel_avx512(), vector_kernel_avx2(), vector_kernel_neon(),
                                                 vector_kernel_reference()};
  return list;
}

// A task is this many chunks: enough work to be worth handing to a thread.
constexpr int64_t kTask = 16 * kVectorChunk;

// A vector of this many floats (16 MiB) will have left the caches before anything reads it again.
constexpr int64_t kStreamed = int64_t{4} << 20;

int64_t task_count(int64_t n) { return (n + kTask - 1) / kTask; }

bool valid_list(const int64_t* sizes, int64_t count, int64_t* total) {
  if (count < 0 || (count > 0 && sizes == nullptr)) return false;
  *total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (sizes[i] < 0 || sizes[i] > (int64_t{1} << 60) - *total) return false;
    *total += sizes[i];
  }
  return true;
}

// Where the tensors of a list start in the flat vector they make up.
std::vector<int64_t> starts_of(const int64_t* sizes, int64_t count) {
  std::vector<int64_t> starts(static_cast<size_t>(count) + 1, 0);
  for (int64_t i = 0; i < count; ++i) starts[static_cast<size_t>(i) + 1] = starts[static_cast<size_t>(i)] + sizes[i];
  return starts;
}

// Calls visit(part, offset in the part, offset in the range, length) over [begin, end) of the flat vector.
template <class Visit>
void for_parts(const std::vector<int64_t>& starts, int64_t begin, int64_t end, Visit visit) {
  // upper_bound skips empty tensors: the last start that is not above begin owns it.
  auto part = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (int64_t at = begin; at < end; ++part) {
    const int64_t stop = std::min(end, starts[static_cast<size_t>(part) + 1]);
    if (stop > at) visit(part, at - starts[static_cast<size_t>(part)], at - begin, stop - at);
    at = std::max(at, stop);
  }
}

// Runs body(begin, end, sums) over the chunks of [0, n) and adds each chunk's `width` sums up in order.
template <class Body>
void sum_over_chunks(int64_t n, int64_t width, double* totals, Body body) {
  const int64_t tasks = task_count(n);
  std::vector<double> partial(static_cast<size_t>(tasks * width), 0.0);
  std::vector<float> chunk_sums(static_cast<size_t>(tasks * width));
  for_each_shared(tasks, true, [&](int64_t task) {
    double* sums = partial.data() + task * width;
    float* one = chunk_sums.data() + task * width;
    for (int64_t begin = task * kTask; begin < std::min(n, (task + 1) * kTask); begin += kVectorChunk) {
      body(begin, std::min(n, begin + kVectorChunk), one);
      for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<double>(one[i]);
    }
  });
  std::fill(totals, totals + width, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < width; ++i) totals[i] += partial[static_cast<size_t>(task * width + i)];
  }
}

}  // namespace

const Isa* vector_variants(std::size_t* count) { return variants().isas(count); }

Isa vector_select(Isa ceiling) { return variants().pick(ceiling)->isa; }

Status vector_measure(const float* const* parts, const int64_t* sizes, int64_t count, const float* const* rows,
                      int64_t k, int64_t n, double* dots, Isa ceiling) try {
  int64_t total;
  if (k < 0 || !valid_list(sizes, count, &total) || total != n) return Status::invalid_argument;
  const VectorKernel& kernel = *variants().pick(ceiling);
  const std::vector<int64_t> starts = starts_of(sizes, count);
  sum_over_chunks(n, k, dots, [&](int64_t begin, int64_t end, float* sums) {
    float gathered[kVectorChunk];
    const float* chunk = gathered;
    for_parts(starts, begin, end, [&](int64_t part, int64_t from, int64_t to, int64_t length) {
      if (length == end - begin) {
        chunk = parts[part] + from;  // the whole chunk lies in one tensor
      } else {
        std::copy(parts[part] + from, parts[part] + from + length, gathered + to);
      }
    });
    kernel.dots(rows, k, begin, chunk, end - begin, sums);
  });
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status vector_remove(const float* const* parts, const int64_t* sizes, int64_t count, float scale,
                     const float* const* removed, const float* coefficients, int64_t r, const float* const* rows,
                     int64_t k, float* w, int64_t n, double* dots, double* norm2, Isa ceiling) try {
  int64_t total;
  if (r < 0 || k < 0 || norm2 == nullptr || !valid_list(sizes, count, &total) || total != n) {
    return Status::invalid_argument;
  }
  const VectorKernel& kernel = *variants().pick(ceiling);
  const std::vector<int64_t> starts = starts_of(sizes, count);
  std::vector<double> totals(static_cast<size_t>(k) + 1);
  const bool past_caches = n >= kStreamed;
  sum_over_chunks(n, k + 1, totals.data(), [&](int64_t begin, int64_t end, float* sums) {
    alignas(64) float made[kVectorChunk];
    float* chunk = past_caches ? made : w + begin;
    for_parts(starts, begin, end, [&](int64_t part, int64_t from, int64_t to, int64_t length) {
      kernel.combine(parts[part] + from, scale, removed, coefficients, r, begin + to, chunk + to, length);
    });
    // The rows that were removed are still in the cache: their second reading costs no memory traffic.
    kernel.dots(rows, k, begin, chunk, end - begin, sums);
    const float* const self = chunk;
    kernel.dots(&self, 1, 0, chunk, end - begin, sums + k);
    if (past_caches) kernel.stream(made, w + begin, end - begin);
  });
  std::copy(totals.begin(), totals.end() - 1, dots);
  *norm2 = totals.back();
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status vector_dot(const float* const* x, const float* const* y, const int64_t* sizes, int64_t count, double* result,
                  Isa ceiling) try {
  int64_t n;
  if (result == nullptr || !valid_list(sizes, count, &n)) return Status::invalid_argument;
  const VectorKernel& kernel = *variants().pick(ceiling);
  const std::vector<int64_t> starts = starts_of(sizes, count);
  sum_over_chunks(n, 1, result, [&](int64_t begin, int64_t end, float* sums) {
    *sums = 0.0f;
    for_parts(starts, begin, end, [&](int64_t part, int64_t from, int64_t, int64_t length) {
      float sum;
      kernel.dots(x + part, 1, from, y[part] + from, length, &sum);
      *sums += sum;
    });
  });
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status vector_axpy(float a, const float* const* x, float* const* y, const int64_t* sizes, int64_t count,
                   Isa ceiling) try {
  int64_t n;
  if (!valid_list(sizes, count, &n)) return Status::invalid_argument;
  const VectorKernel& kernel = *variants().pick(ceiling);
  const std::vector<int64_t> starts = starts_of(sizes, count);
  sum_over_chunks(n, 0, nullptr, [&](int64_t begin, int64_t end, float*) {
    for_parts(starts, begin, end, [&](int64_t part, int64_t from, int64_t, int64_t length) {
      const float minus = -a;
      const float* const row = x[part] + from;
      float* const to = y[part] + from;
      kernel.combine(to, 1.0f, &row, &minus, 1, 0, to, length);
    });
  });
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status vector_scale(float a, float* const* x, const int64_t* sizes, int64_t count, Isa ceiling) try {
  int64_t n;
  if (!valid_list(sizes, count, &n)) return Status::invalid_argument;
  const VectorKernel& kernel = *variants().pick(ceiling);
  const std::vector<int64_t> starts = starts_of(sizes, count);
  sum_over_chunks(n, 0, nullptr, [&](int64_t begin, int64_t end, float*) {
    for_parts(starts, begin, end, [&](int64_t part, int64_t from, int64_t, int64_t length) {
      kernel.combine(x[part] + from, a, nullptr, nullptr, 0, 0, x[part] + from, length);
    });
  });
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
