// The long vectors of power iteration and Lanczos: lists of tensors and bases in flat storage.
//
// Orthogonalising costs two passes over the basis: vector_project gathers a list of tensors into
// flat storage and takes its dot products with basis vectors in the same reading, and
// vector_subtract removes them and measures what rounding left behind. A Lanczos step knows most
// coefficients beforehand (nearly all are zero), so it projects on one vector only and makes one
// pass over the whole basis: the one that measures.
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

// w = scale * concatenation of the list; dots[i] = <rows[i], w>; *norm2 = <w, w>.
Status vector_project(const float* const* parts,  // [count] the list
                      const int64_t* sizes,       // [count] their elements, n in all
                      int64_t count, float scale,
                      const float* const* rows,  // [k] basis vectors of n floats each
                      int64_t k,
                      float* w,  // out [n], no overlap with anything above
                      int64_t n,
                      double* dots,   // out [k]
                      double* norm2,  // out
                      Isa ceiling);

// w -= sum_i coefficients[i] * removed[i]; then dots[i] = <rows[i], w> and *norm2 = <w, w> of the
// new w, all in one pass over memory.
Status vector_subtract(const float* const* removed,  // [r] vectors of n floats each
                       const float* coefficients,    // [r]
                       int64_t r,
                       const float* const* rows,  // [k] vectors of n floats each, `removed` among them or not
                       int64_t k,
                       float* w,  // in and out [n]
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
// One variant, on one chunk of n <= kVectorChunk floats; pointers need no alignment.

struct VectorKernel {
  Isa isa;
  // sums[i] = <rows[i] + at, w> for i < k.
  void (*dots)(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums);
  // w -= coefficients[i] * (rows[i] + at), i ascending.
  void (*subtract)(const float* const* rows, const float* coefficients, int64_t k, int64_t at, float* w, int64_t n);
  // y = fma(a, x, y)
  void (*axpy)(float a, const float* x, float* y, int64_t n);
  // y = a * x (x may be y)
  void (*scale)(float a, const float* x, float* y, int64_t n);
};

const VectorKernel* vector_kernel_reference();
const VectorKernel* vector_kernel_avx2();
const VectorKernel* vector_kernel_avx512();
const VectorKernel* vector_kernel_neon();

}  // namespace bantamweight
