// The variants of one op that this build has, best first.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "runtime/isa.h"

namespace bantamweight {

// Kernel has a member `Isa isa`. Accessors of variants that were not compiled give null and are
// left out.
template <class Kernel>
class VariantList {
 public:
  VariantList(std::initializer_list<const Kernel*> best_first) {
    for (const Kernel* kernel : best_first) {
      if (kernel == nullptr) continue;
      kernels_[count_] = kernel;
      isas_[count_] = kernel->isa;
      ++count_;
    }
  }

  const Isa* isas(std::size_t* count) const {
    *count = count_;
    return isas_;
  }

  // The best variant that is not above the ceiling and that this CPU runs; the reference always is.
  const Kernel* pick(Isa ceiling) const {
    for (std::size_t i = 0; i < count_; ++i) {
      if (isas_[i] <= ceiling && isa_missing(isas_[i]) == nullptr) return kernels_[i];
    }
    return nullptr;
  }

  const Kernel* find(Isa isa) const {
    for (std::size_t i = 0; i < count_; ++i) {
      if (isas_[i] == isa) return kernels_[i];
    }
    return nullptr;
  }

 private:
  static constexpr std::size_t kMax = 8;
  const Kernel* kernels_[kMax] = {};
  Isa isas_[kMax] = {};
  std::size_t count_ = 0;
};

}  // namespace bantamweight
