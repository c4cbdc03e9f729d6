#include "lowbit_linear/lowbit_linear.h"
namespace bantamweight {
const LinearKernel* linear_kernel_neon_dotprod() { return nullptr; }
}  // namespace bantamweight
