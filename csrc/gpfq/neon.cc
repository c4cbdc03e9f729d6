#include "gpfq/gpfq.h"
namespace bantamweight {
const GpfqKernel* gpfq_kernel_neon() { return nullptr; }
}  // namespace bantamweight
