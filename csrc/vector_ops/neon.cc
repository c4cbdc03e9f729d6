#include "vector_ops/vector_ops.h"
namespace bantamweight {
const VectorKernel* vector_kernel_neon() { return nullptr; }
}  // namespace bantamweight
