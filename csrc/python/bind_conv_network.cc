#include <pybind11/stl.h>

#include "conv_network/conv_network.h"
#include "python/module.h"

namespace bw = bantamweight;
namespace py = pybind11;

namespace {

bw::NetworkStep::Kind kind_of(const std::string& name) {
  using Kind = bw::NetworkStep::Kind;
  if (name == "conv") return Kind::conv;
  if (name == "max_pool") return Kind::max_pool;
  if (name == "average") return Kind::average;
  if (name == "subsample") return Kind::subsample;
  if (name == "add") return Kind::add;
  throw py::value_error("kind is '" + name + "', but must be conv, max_pool, average, subsample or add");
}

}  // namespace

void bind_conv_network(py::module_& module) {
  using Step = bw::NetworkStep;
  py::class_<Step>(module, "NetworkStep", "One step of a ConvNetwork")
      .def(py::init<>())
      .def_property(
          "kind", [](const Step& step) { return static_cast<int>(step.kind); },
          [](Step& step, const std::string& name) { step.kind = kind_of(name); })
      .def("set_conv",
           [](Step& step, std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t bias) {
             step.layout = as_pointer<void>(layout);
             step.layout_bytes = layout_bytes;
             step.bias = as_pointer<float>(bias);
           })
      .def_readwrite("input", &Step::input)
      .def_readwrite("residual", &Step::residual)
      .def_readwrite("relu", &Step::relu)
      .def_readwrite("kernel_h", &Step::kernel_h)
      .def_readwrite("kernel_w", &Step::kernel_w)
      .def_readwrite("stride_h", &Step::stride_h)
      .def_readwrite("stride_w", &Step::stride_w)
      .def_readwrite("pad_h", &Step::pad_h)
      .def_readwrite("pad_w", &Step::pad_w)
      .def_readwrite("scale", &Step::scale)
      .def_readwrite("zero", &Step::zero)
      .def_readwrite("channels_before", &Step::channels_before)
      .def_readwrite("channels_after", &Step::channels_after);

  py::class_<bw::ConvNetwork>(module, "ConvNetwork", "A chain of packed convolutions; the layouts must outlive it")
      .def(py::init<std::vector<Step>>())
      .def("output_size",
           [](const bw::ConvNetwork& network, int64_t channels, int64_t height, int64_t width) {
             bw::ImageSize size;
             const bw::Status status = network.output_size({channels, height, width}, &size);
             return py::make_tuple(static_cast<int>(status), size.channels, size.height, size.width);
           })
      .def("forward",
           [](const bw::ConvNetwork& network, std::uintptr_t x, int64_t images, int64_t channels, int64_t height,
              int64_t width, int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w, std::uintptr_t y) {
             const bw::ConvInput input = {
                 as_pointer<float>(x), images, height, width, stride_n, stride_c, stride_h, stride_w};
             py::gil_scoped_release unlocked;
             return static_cast<int>(network.forward(input, channels, as_pointer<float>(y)));
           });
}
