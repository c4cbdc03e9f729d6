#include "lowbit_linear/lowbit_linear.h"
namespace bantamweight {
const LinearKernel* linear_kernel_neon_i8mm() { return nullptr; }
}  // namespace bantamweight
