// The pybind11 face: raw pointers and sizes in, a status code out. Tensors stay on the Python side.
#include "python/module.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "bantamweight's kernels over raw pointers; every function that works returns a status code (0 is ok)";
  bind_runtime(module);
  bind_attention(module);
  bind_batch_norm(module);
  bind_linear(module);
  bind_conv(module);
  bind_conv_network(module);
  bind_embedding(module);
  bind_gpfq(module);
  bind_vector_ops(module);
  bind_machine_limits(module);
}
