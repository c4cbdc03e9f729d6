#include "lowbit_linear/lowbit_linear.h"
#include "python/module.h"
#include "quantize_activations/quantize_activations.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

bw::LinearShape shape_of(int64_t n, int64_t k, int bits, int64_t group_size) {
  bw::LinearShape shape;
  shape.n = n;
  shape.k = k;
  shape.bits = bits;
  shape.group_size = group_size;
  return shape;
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def("linear_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::linear_variants(&count);
    return variant_table(isas, count);
  });
  module.def("quantize_rows_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::quantize_rows_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "linear_select", [](const char* ceiling) { return bw::isa_name(bw::linear_select(isa_or_raise(ceiling))); },
      py::arg("ceiling") = "");
  module.def("linear_layout_bytes", [](int64_t n, int64_t k, int bits, int64_t group_size, const char* isa) {
    return bw::linear_layout_bytes(shape_of(n, k, bits, group_size), isa_or_raise(isa));
  });
  module.def(
      "linear_pack", [](int64_t n, int64_t k, int bits, int64_t group_size, const char* isa, std::uintptr_t codes,
                        std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t layout, int64_t layout_bytes) {
        const bw::Isa target = isa_or_raise(isa);
        py::gil_scoped_release unlocked;
        return static_cast<int>(bw::linear_pack(shape_of(n, k, bits, group_size), target, as_pointer<uint8_t>(codes),
                                                as_pointer<float>(scale), as_pointer<float>(zero),
                                                as_pointer<void>(layout), layout_bytes));
      });
  module.def("linear_unpack", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t codes,
                                 std::uintptr_t scale, std::uintptr_t zero) {
    return static_cast<int>(bw::linear_unpack(as_pointer<void>(layout), layout_bytes, as_pointer<uint8_t>(codes),
                                              as_pointer<float>(scale), as_pointer<float>(zero)));
  });
  module.def(
      "linear_describe",
      [](std::uintptr_t layout, int64_t layout_bytes) {
        bw::LinearShape shape;
        bw::Isa isa = bw::Isa::reference;
        const bw::Status status = bw::linear_describe(as_pointer<void>(layout), layout_bytes, &shape, &isa);
        return py::make_tuple(static_cast<int>(status), shape.n, shape.k, shape.bits, shape.group_size,
                              bw::isa_name(isa));
      },
      "(status, n, k, bits, group_size, kernel) of a packed buffer");
  module.def("linear_forward", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t x, int64_t ldx, int64_t m,
                                  std::uintptr_t bias, std::uintptr_t y, int64_t ldy) {
    py::gil_scoped_release unlocked;
    bw::LinearArgs args;
    args.x = as_pointer<float>(x);
    args.ldx = ldx;
    args.m = m;
    args.bias = as_pointer<float>(bias);
    args.y = as_pointer<float>(y);
    args.ldy = ldy;
    return static_cast<int>(bw::linear_forward(as_pointer<void>(layout), layout_bytes, args));
  });
  module.def("padded_row_bytes", &bw::padded_row_bytes, "Bytes from one int8 activation row to the next");
  module.def("quantize_rows", [](std::uintptr_t x, int64_t ldx, int64_t m, int64_t k, int64_t group_size,
                                 std::uintptr_t q, std::uintptr_t scale, std::uintptr_t sums, const char* isa) {
    bw::QuantizeRowsArgs args;
    args.x = as_pointer<float>(x);
    args.ldx = ldx;
    args.m = m;
    args.k = k;
    args.group_size = group_size;
    args.q = as_pointer<int8_t>(q);
    args.scale = as_pointer<float>(scale);
    args.sums = as_pointer<int32_t>(sums);
    return static_cast<int>(bw::quantize_rows(args, isa_or_raise(isa)));
  });
}
