#include "lowbit_linear/lowbit_linear.h"
namespace bantamweight {
const LinearKernel* linear_kernel_avx512_vnni() { return nullptr; }
}  // namespace bantamweight
