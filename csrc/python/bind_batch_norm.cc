#include "batch_norm/batch_norm.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

void bind_batch_norm(py::module_& module) {
  module.def("batch_norm_second_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::batch_norm_second_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "batch_norm_second",
      [](std::uintptr_t u, std::uintptr_t dy, std::uintptr_t x, int64_t n, int64_t channels, int64_t length,
         std::uintptr_t mean, std::uintptr_t r, std::uintptr_t weight, std::uintptr_t dweight, std::uintptr_t dbias,
         std::uintptr_t p, std::uintptr_t q, std::uintptr_t to_dy, std::uintptr_t to_x, std::uintptr_t to_weight,
         const char* isa) {
        bw::BatchNormSecondArgs args;
        args.u = as_pointer<float>(u);
        args.dy = as_pointer<float>(dy);
        args.x = as_pointer<float>(x);
        args.n = n;
        args.channels = channels;
        args.length = length;
        args.mean = as_pointer<float>(mean);
        args.r = as_pointer<float>(r);
        args.weight = as_pointer<float>(weight);
        args.dweight = as_pointer<float>(dweight);
        args.dbias = as_pointer<float>(dbias);
        args.p = as_pointer<float>(p);
        args.q = as_pointer<float>(q);
        args.to_dy = as_pointer<float>(to_dy);
        args.to_x = as_pointer<float>(to_x);
        args.to_weight = as_pointer<float>(to_weight);
        const bw::Isa ceiling = isa_or_raise(isa);
        py::gil_scoped_release unlocked;
        return static_cast<int>(bw::batch_norm_second(args, ceiling));
      },
      "The second derivative of batch normalisation; 0 for what is absent");
}
