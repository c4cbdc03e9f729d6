// The long vectors of power iteration and Lanczos: lists of tensors and bases in flat storage.
//
// Orthogonalising costs two passes over memory. vector_measure reads a list of tensors as it lies
// and takes its dot products with basis vectors; vector_remove reads the list again, writes it to
// flat storage without its projections, and measures what rounding left behind while everything is
// still in the cache. A Lanczos step knows most coefficients beforehand (nearly all are zero), so
// its first pass reads one basis vector only, and its second the whole basis.
//
// Sums run over chunks of kVectorChunk elements of the flat vector. Inside a chunk, element i is
// added to lane i % 32 by fused multiply-adds in ascending order, and the lanes are folded in
// halves (16, 8, 4, 2, 1), all in float; the chunks' sums are added in double, in order. So every
// variant and every number of threads gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

constexpr int64_t kVectorChunk = 2048;
constexpr int64_t kVectorLanes = 32;

// ---------------------------------------------------------------------------------------------
// What callers use. A list of tensors is `count` pointers to contiguous floats and `count` sizes;
// taken one after the other they are one flat vector.

// dots[i] = <rows[i], x> for the concatenation x of the list.
Status vector_measure(const float* const* parts,  // [count] the list
                      const int64_t* sizes,       // [count] their elements, n in all
                      int64_t count,
                      const float* const* rows,  // [k] vectors of n floats each
                      int64_t k, int64_t n,
                      double* dots,  // out [k]
                      Isa ceiling);

// w = scale * x - sum_i coefficients[i] * removed[i] for the concatenation x of the list; then
// dots[i] = <rows[i], w> and *norm2 = <w, w>, all in one pass over memory.
Status vector_remove(const float* const* parts,  // [count] the list; w itself may be its only part
                     const int64_t* sizes,       // [count] their elements, n in all
                     int64_t count, float scale,
                     const float* const* removed,  // [r] vectors of n floats each
                     const float* coefficients,    // [r]
                     int64_t r,
                     const float* const* rows,  // [k] vectors of n floats each, `removed` among them or not
                     int64_t k,
                     float* w,  // out [n], no overlap with rows or removed
                     int64_t n,
                     double* dots,   // out [k]
                     double* norm2,  // out
                     Isa ceiling);

// *result = <x, y> over two lists of the same sizes (the same list twice: the squared norm).
Status vector_dot(const float* const* x, const float* const* y, const int64_t* sizes, int64_t count, double* result,
                  Isa ceiling);

// y += a * x over two lists of the same sizes.
Status vector_axpy(float a, const float* const* x, float* const* y, const int64_t* sizes, int64_t count, Isa ceiling);

// x *= a over a list.
Status vector_scale(float a, float* const* x, const int64_t* sizes, int64_t count, Isa ceiling);

// Variants this op has in this build, best first.
const Isa* vector_variants(std::size_t* count);

// The variant this op would run under `ceiling`.
Isa vector_select(Isa ceiling);

// ---------------------------------------------------------------------------------------------
// One variant, on one chunk of n <= kVectorChunk floats; pointers need no alignment. Rows are
// fetched one chunk ahead: there are more of them than a CPU follows by itself, and it stops
// following at the end of each page.

struct VectorKernel {
  Isa isa;
  // sums[i] = <rows[i] + at, w> for i < k.
  void (*dots)(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums);
  // w = scale * x - coefficients[i] * (rows[i] + at), i ascending, by fused multiply-adds; w may be x.
  void (*combine)(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t k,
                  int64_t at, float* w, int64_t n);
  // to = from, past the caches where the CPU can; `to` is not read soon.
  void (*stream)(const float* from, float* to, int64_t n);
};

const VectorKernel* vector_kernel_reference();
const VectorKernel* vector_kernel_avx2();
const VectorKernel* vector_kernel_avx512();
const VectorKernel* vector_kernel_neon();

}  // namespace bantamweight
