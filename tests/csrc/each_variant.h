// The walk over an op's variants: each that this CPU runs is tested and named, as run.sh prints it.
#pragma once

#include <cstddef>
#include <cstdio>
#include <initializer_list>

#include "check.h"
#include "runtime/isa.h"

namespace check {

template <class Test>
void variant(bantamweight::Isa isa, const Test& test) {
  if (const char* missing = bantamweight::isa_missing(isa)) {
    std::printf("  %-12s not run: %s\n", bantamweight::isa_name(isa), missing);
    return;
  }
  const int before = failed;
  test();
  std::printf("  %-12s %s\n", bantamweight::isa_name(isa),
              failed == before ? "ran, equal to the reference" : "ran, DIFFERS");
}

// test(isa) for each of the op's list, which ends with the reference.
template <class Test>
void each_variant(const bantamweight::Isa* (*list)(std::size_t*), const Test& test) {
  std::size_t count = 0;
  const bantamweight::Isa* isas = list(&count);
  CHECK(count > 0 && isas[count - 1] == bantamweight::Isa::reference);
  for (std::size_t i = 0; i < count; ++i) variant(isas[i], [&] { test(isas[i]); });
}

// test(kernel) for each that was compiled, of which the op's list holds all, in this order.
template <class Kernel, class Test>
void each_kernel(const bantamweight::Isa* (*list)(std::size_t*), std::initializer_list<const Kernel*> kernels,
                 const Test& test) {
  std::size_t listed = 0, compiled = 0;
  const bantamweight::Isa* isas = list(&listed);
  for (const Kernel* kernel : kernels) {
    if (kernel == nullptr) continue;
    CHECK(compiled < listed && isas[compiled] == kernel->isa);
    ++compiled;
    variant(kernel->isa, [&] { test(*kernel); });
  }
  CHECK(compiled == listed);
}

}  // namespace check
