#include "machine_limits/machine_limits.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

void bind_machine_limits(py::module_& module) {
  module.def(
      "read_memory",
      [](std::uintptr_t words, int64_t count, int64_t repeats, const char* isa) {
        uint64_t sum = 0;
        const bw::Isa ceiling = isa_or_raise(isa);
        bw::Status status;
        {
          const py::gil_scoped_release unlocked;
          status = bw::read_memory(as_pointer<const uint64_t>(words), count, repeats, ceiling, &sum);
        }
        return py::make_tuple(static_cast<int>(status), sum);
      },
      "(status, sum of the words), having read uint64 words [count] `repeats` times on all threads", py::arg("words"),
      py::arg("count"), py::arg("repeats"), py::arg("isa") = "");
  module.def(
      "multiply_int8",
      [](int64_t steps, const char* isa) {
        int64_t products = 0;
        const bw::Isa ceiling = isa_or_raise(isa);
        bw::Status status;
        {
          const py::gil_scoped_release unlocked;
          status = bw::multiply_int8(steps, ceiling, &products);
        }
        return py::make_tuple(static_cast<int>(status), products);
      },
      "(status, multiply-adds done), having run `steps` steps of the int8 loop on every thread", py::arg("steps"),
      py::arg("isa") = "");
  module.def(
      "multiply_int8_variants",
      [] {
        std::size_t count = 0;
        const bw::Isa* isas = bw::multiply_int8_variants(&count);
        return variant_table(isas, count);
      },
      "[(name, what is missing or '')] of the int8 loops, best first");
}
