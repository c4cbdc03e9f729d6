#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "lowbit_linear/lowbit_linear.h"
#include "python/module.h"
#include "quantize_activations/quantize_activations.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

bw::LinearShape shape_of(int64_t n, int64_t k, int bits, int64_t group_size, int activations, bool ternary) {
  bw::LinearShape shape;
  shape.n = n;
  shape.k = k;
  shape.bits = bits;
  shape.group_size = group_size;
  shape.activations = static_cast<bw::Activations>(activations);
  shape.ternary = ternary;
  return shape;
}

// Rounded rows as Python holds them: addresses of q, scale and sums, and the group size.
using RowAddresses = std::array<std::uintptr_t, 4>;

bw::QuantizedRows rows_at(const RowAddresses& rows) {
  return {as_pointer<int8_t>(rows[0]), as_pointer<float>(rows[1]), as_pointer<int32_t>(rows[2]),
          static_cast<int64_t>(rows[3])};
}

bw::LinearWeight weight_at(std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t bias) {
  return {as_pointer<void>(layout), layout_bytes, as_pointer<float>(bias)};
}

// Weights over the same rows. It holds addresses: the Python object around it keeps the memory.
class LinearGroup {
 public:
  explicit LinearGroup(const std::vector<std::tuple<std::uintptr_t, int64_t, std::uintptr_t>>& weights) {
    for (const auto& [layout, bytes, bias] : weights) weights_.push_back(weight_at(layout, bytes, bias));
  }

  int forward(std::uintptr_t x, int64_t ldx, const RowAddresses& rows, int64_t m, int activation,
              std::uintptr_t residual, int64_t ldr, std::uintptr_t y, int64_t ldy) const {
    py::gil_scoped_release unlocked;
    bw::LinearArgs args;
    args.x = as_pointer<float>(x);
    args.ldx = ldx;
    args.rows = rows_at(rows);
    args.m = m;
    args.epilogue = {static_cast<bw::Activation>(activation), as_pointer<float>(residual), ldr};
    args.y = as_pointer<float>(y);
    args.ldy = ldy;
    return static_cast<int>(bw::linears_forward(weights_.data(), static_cast<int64_t>(weights_.size()), args));
  }

 private:
  std::vector<bw::LinearWeight> weights_;
};

// (weight, bias, eps) of a layer norm, addresses of the first two, or None.
using NormAddresses = py::object;

bool norm_at(const NormAddresses& norm, bw::LayerNorm* to) {
  if (norm.is_none()) return false;
  const auto [weight, bias, eps] = norm.cast<std::tuple<std::uintptr_t, std::uintptr_t, float>>();
  *to = {as_pointer<float>(weight), as_pointer<float>(bias), eps};
  return true;
}

// Linear layers in a row, with what stands between them; holds addresses as LinearGroup does.
class LinearChain {
 public:
  using Stage = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, int, int, NormAddresses>;

  LinearChain(const std::vector<Stage>& stages, const NormAddresses& first_norm) : norms_(stages.size() + 1) {
    has_first_norm_ = norm_at(first_norm, &norms_[0]);
    for (const auto& [layout, bytes, bias, activation, residual, norm] : stages) {
      bw::LayerNorm* place = &norms_[stages_.size() + 1];
      const bool normalized = norm_at(norm, place);
      stages_.push_back({weight_at(layout, bytes, bias), static_cast<bw::Activation>(activation), residual,
                         normalized ? place : nullptr});
    }
  }
  LinearChain(const LinearChain&) = delete;
  LinearChain& operator=(const LinearChain&) = delete;

  int forward(std::uintptr_t x, int64_t ldx, const RowAddresses& rows, int64_t m, std::uintptr_t residual, int64_t ldr,
              std::uintptr_t y, int64_t ldy, const RowAddresses& rounded) const {
    py::gil_scoped_release unlocked;
    bw::ChainArgs args;
    args.x = as_pointer<float>(x);
    args.ldx = ldx;
    args.rows = rows_at(rows);
    args.norm = has_first_norm_ ? norms_.data() : nullptr;
    args.residual = as_pointer<float>(residual);
    args.ldr = ldr;
    args.m = m;
    args.y = as_pointer<float>(y);
    args.ldy = ldy;
    args.q = as_pointer<int8_t>(rounded[0]);
    args.scale = as_pointer<float>(rounded[1]);
    args.sums = as_pointer<int32_t>(rounded[2]);
    args.group_size = static_cast<int64_t>(rounded[3]);
    return static_cast<int>(bw::linear_chain(stages_.data(), static_cast<int64_t>(stages_.size()), args));
  }

 private:
  std::vector<bw::LayerNorm> norms_;  // the first norm, then one a stage; stages_ points into it
  bool has_first_norm_ = false;
  std::vector<bw::ChainStage> stages_;
};

// linear_forward(layout, layout_bytes, x, ldx, m, bias, y, ldy) -> status, by CPython's own calling
// convention: converting eight ints through pybind11 takes 0.2 us, a tenth of a small layer.
PyObject* linear_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 8;
  if (count != kCount) {
    return PyErr_Format(PyExc_TypeError, "linear_forward takes %zd ints, but %zd arguments came", kCount, count);
  }
  int64_t value[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    value[i] = PyLong_AsLongLong(arguments[i]);
    if (value[i] == -1 && PyErr_Occurred() != nullptr) return nullptr;
  }
  const auto [layout, layout_bytes, x, ldx, m, bias, y, ldy] = value;
  bw::LinearArgs args;
  args.x = as_pointer<float>(static_cast<std::uintptr_t>(x));
  args.ldx = ldx;
  args.m = m;
  args.bias = as_pointer<float>(static_cast<std::uintptr_t>(bias));
  args.y = as_pointer<float>(static_cast<std::uintptr_t>(y));
  args.ldy = ldy;
  bw::Status status;
  {
    py::gil_scoped_release unlocked;
    status = bw::linear_forward(as_pointer<void>(static_cast<std::uintptr_t>(layout)), layout_bytes, args);
  }
  return PyLong_FromLong(static_cast<long>(status));
}

void add_linear_forward(py::module_& module) {
  static PyMethodDef definition = {
      "linear_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_forward)), METH_FASTCALL,
      "linear_forward(layout, layout_bytes, x, ldx, m, bias, y, ldy): addresses and sizes; a status"};
  PyObject* function = PyCFunction_NewEx(&definition, nullptr, module.attr("__name__").ptr());
  if (function == nullptr) throw py::error_already_set();
  module.add_object("linear_forward", py::reinterpret_steal<py::object>(function));
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
  // activations: 0 int8, 1 int8_block, 2 int16; ternary: no code is 3
  module.def(
      "linear_layout_bytes",
      [](int64_t n, int64_t k, int bits, int64_t group_size, const char* isa, int activations, bool ternary) {
        return bw::linear_layout_bytes(shape_of(n, k, bits, group_size, activations, ternary), isa_or_raise(isa));
      },
      py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("isa"), py::arg("activations") = 0,
      py::arg("ternary") = false);
  module.def(
      "linear_pack",
      [](int64_t n, int64_t k, int bits, int64_t group_size, const char* isa, std::uintptr_t codes,
         std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t layout, int64_t layout_bytes, int activations,
         bool ternary) {
        const bw::Isa target = isa_or_raise(isa);
        py::gil_scoped_release unlocked;
        return static_cast<int>(bw::linear_pack(shape_of(n, k, bits, group_size, activations, ternary), target,
                                                as_pointer<uint8_t>(codes), as_pointer<float>(scale),
                                                as_pointer<float>(zero), as_pointer<void>(layout), layout_bytes));
      },
      py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("isa"), py::arg("codes"),
      py::arg("scale"), py::arg("zero"), py::arg("layout"), py::arg("layout_bytes"), py::arg("activations") = 0,
      py::arg("ternary") = false);
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
        double stored = 0.0;
        const bw::Status status = bw::linear_describe(as_pointer<void>(layout), layout_bytes, &shape, &isa, &stored);
        return py::make_tuple(static_cast<int>(status), shape.n, shape.k, shape.bits, shape.group_size,
                              bw::isa_name(isa), static_cast<int>(shape.activations), stored);
      },
      "(status, n, k, bits, group_size, kernel, activations, stored bits a code) of a packed buffer");
  add_linear_forward(module);
  py::class_<LinearGroup>(module, "LinearGroup", "Packed weights over the same rows: [(layout, bytes, bias), ..]")
      .def(py::init<const std::vector<std::tuple<std::uintptr_t, int64_t, std::uintptr_t>>&>())
      .def("forward", &LinearGroup::forward);
  py::class_<LinearChain>(
      module, "LinearChain",
      "Packed weights in a row: [(layout, bytes, bias, activation, residual, norm), ..], first norm")
      .def(py::init<const std::vector<LinearChain::Stage>&, const NormAddresses&>())
      .def("forward", &LinearChain::forward);
  module.def("layer_norm",
             [](std::uintptr_t x, int64_t ldx, std::uintptr_t residual, int64_t ldr, int64_t m, int64_t n,
                std::uintptr_t weight, std::uintptr_t bias, float eps, std::uintptr_t y, int64_t ldy, const char* isa) {
               bw::LayerNormArgs args;
               args.x = as_pointer<float>(x);
               args.ldx = ldx;
               args.residual = as_pointer<float>(residual);
               args.ldr = ldr;
               args.m = m;
               args.n = n;
               args.norm = {as_pointer<float>(weight), as_pointer<float>(bias), eps};
               args.y = as_pointer<float>(y);
               args.ldy = ldy;
               return static_cast<int>(bw::layer_norm(args, isa_or_raise(isa)));
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
