// One bind function an op; each stands in a file of its own.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

void bind_runtime(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_batch_norm(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_conv(pybind11::module_& module);
void bind_conv_network(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_gpfq(pybind11::module_& module);
void bind_vector_ops(pybind11::module_& module);
void bind_machine_limits(pybind11::module_& module);

// An address as Python's tensor.data_ptr() gives it.
template <class T>
T* as_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Isa by name, or the ceiling of BANTAMWEIGHT_FORCE_KERNEL for an empty name; raises errors.KernelError
// with the reason for a name that this CPU cannot run.
bantamweight::Isa isa_or_raise(const char* name);

// The names of an op's variants, best first, with what is missing ("" if this CPU runs it).
pybind11::list variant_table(const bantamweight::Isa* isas, std::size_t count);
