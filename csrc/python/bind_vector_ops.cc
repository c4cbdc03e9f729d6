#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "python/module.h"
#include "vector_ops/vector_ops.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<int64_t>;

// Python's list of data_ptr()s as the array of pointers that the kernels take.
template <class T>
T* const* as_pointers(const Addresses& addresses) {
  static_assert(sizeof(T*) == sizeof(std::uintptr_t), "an address is as wide as a pointer");
  return reinterpret_cast<T* const*>(addresses.data());
}

void same_length_or_raise(std::size_t a, std::size_t b, const char* what) {
  if (a != b) throw py::value_error(std::string(what) + " differ in length");
}

}  // namespace

void bind_vector_ops(py::module_& module) {
  module.def("vector_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::vector_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "vector_select", [](const char* ceiling) { return bw::isa_name(bw::vector_select(isa_or_raise(ceiling))); },
      py::arg("ceiling") = "");
  module.def(
      "vector_measure",
      [](const Addresses& parts, const Sizes& sizes, const Addresses& rows, int64_t n, const char* isa) {
        same_length_or_raise(parts.size(), sizes.size(), "parts and sizes");
        const bw::Isa ceiling = isa_or_raise(isa);
        std::vector<double> dots(rows.size());
        bw::Status status;
        {
          py::gil_scoped_release unlocked;
          status = bw::vector_measure(as_pointers<const float>(parts), sizes.data(), static_cast<int64_t>(sizes.size()),
                                      as_pointers<const float>(rows), static_cast<int64_t>(rows.size()), n, dots.data(),
                                      ceiling);
        }
        return py::make_tuple(static_cast<int>(status), dots);
      },
      "(status, <rows[i], x>) for the parts end to end, x");
  module.def(
      "vector_remove",
      [](const Addresses& parts, const Sizes& sizes, float scale, const Addresses& removed,
         const std::vector<float>& coefficients, const Addresses& rows, std::uintptr_t w, int64_t n, const char* isa) {
        same_length_or_raise(parts.size(), sizes.size(), "parts and sizes");
        same_length_or_raise(removed.size(), coefficients.size(), "removed and coefficients");
        const bw::Isa ceiling = isa_or_raise(isa);
        std::vector<double> dots(rows.size());
        double norm2 = 0.0;
        bw::Status status;
        {
          py::gil_scoped_release unlocked;
          status = bw::vector_remove(as_pointers<const float>(parts), sizes.data(), static_cast<int64_t>(sizes.size()),
                                     scale, as_pointers<const float>(removed), coefficients.data(),
                                     static_cast<int64_t>(removed.size()), as_pointers<const float>(rows),
                                     static_cast<int64_t>(rows.size()), as_pointer<float>(w), n, dots.data(), &norm2,
                                     ceiling);
        }
        return py::make_tuple(static_cast<int>(status), dots, norm2);
      },
      "(status, <rows[i], w>, <w, w>) after w = scale * the parts end to end - sum_i coefficients[i] * removed[i]");
  module.def("vector_dot", [](const Addresses& x, const Addresses& y, const Sizes& sizes, const char* isa) {
    same_length_or_raise(x.size(), sizes.size(), "x and sizes");
    same_length_or_raise(y.size(), sizes.size(), "y and sizes");
    const bw::Isa ceiling = isa_or_raise(isa);
    double result = 0.0;
    bw::Status status;
    {
      py::gil_scoped_release unlocked;
      status = bw::vector_dot(as_pointers<const float>(x), as_pointers<const float>(y), sizes.data(),
                              static_cast<int64_t>(sizes.size()), &result, ceiling);
    }
    return py::make_tuple(static_cast<int>(status), result);
  });
  module.def("vector_axpy", [](float a, const Addresses& x, const Addresses& y, const Sizes& sizes, const char* isa) {
    same_length_or_raise(x.size(), sizes.size(), "x and sizes");
    same_length_or_raise(y.size(), sizes.size(), "y and sizes");
    const bw::Isa ceiling = isa_or_raise(isa);
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::vector_axpy(a, as_pointers<const float>(x), as_pointers<float>(y), sizes.data(),
                                            static_cast<int64_t>(sizes.size()), ceiling));
  });
  module.def("vector_scale", [](float a, const Addresses& x, const Sizes& sizes, const char* isa) {
    same_length_or_raise(x.size(), sizes.size(), "x and sizes");
    const bw::Isa ceiling = isa_or_raise(isa);
    py::gil_scoped_release unlocked;
    return static_cast<int>(
        bw::vector_scale(a, as_pointers<float>(x), sizes.data(), static_cast<int64_t>(sizes.size()), ceiling));
  });
}
