#include "lowbit_linear/lowbit_linear.h"
namespace bantamweight {
const LinearKernel* linear_kernel_avx2() { return nullptr; }
}  // namespace bantamweight
