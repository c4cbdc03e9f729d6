#include "embedding/embedding.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

bw::EmbeddingShape shape_of(int64_t rows, int64_t dim, int bits, int64_t group_size) {
  return {rows, dim, bits, group_size};
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("embedding_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::embedding_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "embedding_select", [](const char* ceiling) { return bw::isa_name(bw::embedding_select(isa_or_raise(ceiling))); },
      py::arg("ceiling") = "");
  module.def("embedding_layout_bytes", [](int64_t rows, int64_t dim, int bits, int64_t group_size, bool uniform_zero) {
    return bw::embedding_layout_bytes(shape_of(rows, dim, bits, group_size), uniform_zero);
  });
  module.def("embedding_pack", [](int64_t rows, int64_t dim, int bits, int64_t group_size, const char* isa,
                                  std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, bool uniform_zero,
                                  std::uintptr_t layout, int64_t layout_bytes) {
    const bw::Isa target = isa_or_raise(isa);
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::embedding_pack(
        shape_of(rows, dim, bits, group_size), target, as_pointer<uint8_t>(codes), as_pointer<float>(scale),
        as_pointer<float>(zero), uniform_zero, as_pointer<void>(layout), layout_bytes));
  });
  module.def("embedding_unpack", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t codes,
                                    std::uintptr_t scale, std::uintptr_t zero) {
    return static_cast<int>(bw::embedding_unpack(as_pointer<void>(layout), layout_bytes, as_pointer<uint8_t>(codes),
                                                 as_pointer<float>(scale), as_pointer<float>(zero)));
  });
  module.def(
      "embedding_describe",
      [](std::uintptr_t layout, int64_t layout_bytes) {
        bw::EmbeddingShape shape;
        bw::Isa isa = bw::Isa::reference;
        const bw::Status status = bw::embedding_describe(as_pointer<void>(layout), layout_bytes, &shape, &isa);
        return py::make_tuple(static_cast<int>(status), shape.rows, shape.dim, shape.bits, shape.group_size,
                              bw::isa_name(isa));
      },
      "(status, rows, dim, bits, group_size, kernel) of a packed table");
  module.def("embedding_forward", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t index, int index_bytes,
                                     int64_t count, std::uintptr_t y, int64_t ldy) {
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::embedding_forward(as_pointer<void>(layout), layout_bytes, as_pointer<void>(index),
                                                  index_bytes, count, as_pointer<float>(y), ldy));
  });
}
