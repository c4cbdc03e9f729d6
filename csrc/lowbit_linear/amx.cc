#include "lowbit_linear/lowbit_linear.h"
namespace bantamweight {
const LinearKernel* linear_kernel_amx() { return nullptr; }
}  // namespace bantamweight
