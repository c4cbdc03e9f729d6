#include <string>

#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

// As KernelError, so that the command line shows it as the user's to mend and not as its own failure.
[[noreturn]] static void raise_kernel_error(const std::string& sentence) {
  const py::object type = py::module_::import("bantamweight.errors").attr("KernelError");
  py::set_error(type, sentence.c_str());
  throw py::error_already_set();
}

bw::Isa isa_or_raise(const char* name) {
  bw::Isa isa;
  if (*name == '\0') {
    if (const char* why = bw::isa_ceiling(&isa)) raise_kernel_error(why);
    return isa;
  }
  if (!bw::isa_from_name(name, &isa)) raise_kernel_error(std::string("'") + name + "' names no kernel");
  if (const char* missing = bw::isa_missing(isa)) raise_kernel_error(std::string(name) + ": " + missing);
  return isa;
}

py::list variant_table(const bw::Isa* isas, std::size_t count) {
  py::list rows;
  for (std::size_t i = 0; i < count; ++i) {
    const char* missing = bw::isa_missing(isas[i]);
    rows.append(py::make_tuple(bw::isa_name(isas[i]), missing == nullptr ? "" : missing));
  }
  return rows;
}

void bind_runtime(py::module_& module) {
  module.def("status_message", [](int code) { return bw::status_message(static_cast<bw::Status>(code)); });
  module.def(
      "isa_table", [] { return variant_table(bw::kAllIsas, sizeof bw::kAllIsas / sizeof bw::kAllIsas[0]); },
      "[(name, what is missing or '')] over every instruction set, best first");
  module.def(
      "isa_ceiling", [] { return bw::isa_name(isa_or_raise("")); },
      "The instruction set that kernels may use now: BANTAMWEIGHT_FORCE_KERNEL or the best of this CPU");
}
