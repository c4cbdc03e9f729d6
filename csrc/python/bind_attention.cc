#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

using Rows = std::array<int64_t, 3>;  // address, floats from item to item, from row to row

bw::AttentionRows rows_at(const Rows& rows) {
  return {as_pointer<float>(static_cast<std::uintptr_t>(rows[0])), rows[1], rows[2]};
}

int attention(const Rows& q, const Rows& k, const Rows& v, const std::array<int64_t, 4>& mask,
              const std::array<int64_t, 5>& sizes, float scale, bool bfloat16, const Rows& out) {
  bw::AttentionArgs args;
  args.q = rows_at(q);
  args.k = rows_at(k);
  args.v = rows_at(v);
  args.mask = as_pointer<float>(static_cast<std::uintptr_t>(mask[0]));
  args.mask_batch = mask[1];
  args.mask_head = mask[2];
  args.mask_query = mask[3];
  args.batch = sizes[0];
  args.heads = sizes[1];
  args.queries = sizes[2];
  args.keys = sizes[3];
  args.head_size = sizes[4];
  args.scale = scale;
  args.bfloat16 = bfloat16;
  args.out = as_pointer<float>(static_cast<std::uintptr_t>(out[0]));
  args.out_batch = out[1];
  args.out_row = out[2];
  const bw::Isa ceiling = isa_or_raise("");
  py::gil_scoped_release unlocked;
  return static_cast<int>(bw::attention(args, ceiling));
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::attention_variants(&count);
    return variant_table(isas, count);
  });
  module.def("attention", attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("sizes"),
             py::arg("scale"), py::arg("bfloat16"), py::arg("out"),
             "(address, batch, row) of q, k, v and out; (address, batch, head, query) of the mask, address 0 for none; "
             "(batch, heads, queries, keys, head_size)");
}
