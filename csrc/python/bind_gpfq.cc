#include <pybind11/stl.h>

#include <array>

#include "gpfq/gpfq.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

// shape: (problems, rows, columns, groups); grid: the addresses of scale, inverse_scale, zero;
// modes: (feedback, rounding, shrink) as numbered in gpfq.h.
template <class T>
bw::GpfqPanel<T> panel_of(std::array<int64_t, 4> shape, std::uintptr_t panel, std::uintptr_t lower,
                          std::array<std::uintptr_t, 3> grid, std::uintptr_t group_of_row, std::uintptr_t previous,
                          std::uintptr_t codes, int levels, std::array<int, 3> modes, double threshold, uint32_t seed,
                          int64_t first_row) {
  bw::GpfqPanel<T> p;
  p.problems = shape[0];
  p.rows = shape[1];
  p.columns = shape[2];
  p.groups = shape[3];
  p.panel = as_pointer<T>(panel);
  p.lower = as_pointer<T>(lower);
  p.scale = as_pointer<T>(grid[0]);
  p.inverse_scale = as_pointer<T>(grid[1]);
  p.zero = as_pointer<T>(grid[2]);
  p.group_of_row = as_pointer<int32_t>(group_of_row);
  p.previous = as_pointer<T>(previous);
  p.codes = as_pointer<uint8_t>(codes);
  p.levels = levels;
  p.feedback = static_cast<bw::GpfqFeedback>(modes[0]);
  p.rounding = static_cast<bw::GpfqRounding>(modes[1]);
  p.shrink = static_cast<bw::GpfqShrink>(modes[2]);
  p.threshold = static_cast<T>(threshold);
  p.seed = seed;
  p.first_row = first_row;
  return p;
}

}  // namespace

void bind_gpfq(py::module_& module) {
  module.attr("gpfq_max_rows") = bw::kGpfqMaxRows;
  module.def("gpfq_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::gpfq_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "gpfq_select", [](const char* ceiling) { return bw::isa_name(bw::gpfq_select(isa_or_raise(ceiling))); },
      py::arg("ceiling") = "");
  module.def("gpfq_panel_f32", [](std::array<int64_t, 4> shape, std::uintptr_t panel, std::uintptr_t lower,
                                  std::array<std::uintptr_t, 3> grid, std::uintptr_t group_of_row,
                                  std::uintptr_t previous, std::uintptr_t codes, int levels, std::array<int, 3> modes,
                                  double threshold, uint32_t seed, int64_t first_row, const char* isa) {
    const bw::Isa ceiling = isa_or_raise(isa);
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::gpfq_panel(panel_of<float>(shape, panel, lower, grid, group_of_row, previous, codes,
                                                           levels, modes, threshold, seed, first_row),
                                           ceiling));
  });
  module.def("gpfq_panel_f64", [](std::array<int64_t, 4> shape, std::uintptr_t panel, std::uintptr_t lower,
                                  std::array<std::uintptr_t, 3> grid, std::uintptr_t group_of_row,
                                  std::uintptr_t previous, std::uintptr_t codes, int levels, std::array<int, 3> modes,
                                  double threshold, uint32_t seed, int64_t first_row) {
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::gpfq_panel(panel_of<double>(shape, panel, lower, grid, group_of_row, previous, codes,
                                                            levels, modes, threshold, seed, first_row)));
  });
}
