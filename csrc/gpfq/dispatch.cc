// Checks the panel, picks the variant and shares slices of columns out over OpenMP's threads.
#include <algorithm>

#include "gpfq/gpfq.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<GpfqKernel>& variants() {
  static const VariantList<GpfqKernel> list = {gpfq_kernel_avx512(), gpfq_kernel_avx2(), gpfq_kernel_neon(),
                                               gpfq_kernel_reference()};
  return list;
}

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 18;

template <class T>
bool valid(const GpfqPanel<T>& p) {
  const bool sizes = p.problems >= 0 && p.rows >= 0 && p.columns >= 0 && p.rows <= kGpfqMaxRows && p.groups >= 1;
  const bool grid = p.levels >= 2 && p.levels <= 256 && p.threshold >= T(0);
  if (!sizes || !grid) return false;
  const bool empty = p.problems == 0 || p.rows == 0 || p.columns == 0;
  if (p.feedback == GpfqFeedback::change && p.previous == nullptr && !empty) return false;
  return std::all_of(p.group_of_row, p.group_of_row + p.rows,
                     [&](int32_t group) { return group >= 0 && group < p.groups; });
}

template <class T, class Run>
Status for_slices(const GpfqPanel<T>& p, Run run) {
  if (!valid(p)) return Status::invalid_argument;
  const int64_t slices = (p.columns + kGpfqSlice - 1) / kGpfqSlice;
  const int64_t tasks = p.problems * slices;
  const bool worthwhile = p.problems * p.columns * p.rows * p.rows >= 2 * kWorkPerThread;
  for_each_shared(tasks, worthwhile, [&](int64_t task) {
    const int64_t begin = task % slices * kGpfqSlice;
    run(p, task / slices, begin, std::min(begin + kGpfqSlice, p.columns));
  });
  return Status::ok;
}

}  // namespace

Isa gpfq_select(Isa ceiling) { return variants().pick(ceiling)->isa; }

const Isa* gpfq_variants(std::size_t* count) { return variants().isas(count); }

Status gpfq_panel(const GpfqPanel<float>& panel, Isa ceiling) {
  return for_slices(panel, variants().pick(ceiling)->run);
}

Status gpfq_panel(const GpfqPanel<double>& panel) { return for_slices(panel, gpfq_columns); }

}  // namespace bantamweight
