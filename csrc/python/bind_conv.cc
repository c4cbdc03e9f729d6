#include "depthwise_conv/depthwise_conv.h"
#include "lowbit_conv/lowbit_conv.h"
#include "python/module.h"
#include "quantize_images/quantize_images.h"

namespace bw = bantamweight;
namespace py = pybind11;

void bind_conv(py::module_& module) {
  py::class_<bw::ConvShape>(module, "ConvShape", "Geometry, bits and scale groups of one packed convolution")
      .def(py::init<>())
      .def_readwrite("in_channels", &bw::ConvShape::in_channels)
      .def_readwrite("out_channels", &bw::ConvShape::out_channels)
      .def_readwrite("groups", &bw::ConvShape::groups)
      .def_readwrite("kernel_h", &bw::ConvShape::kernel_h)
      .def_readwrite("kernel_w", &bw::ConvShape::kernel_w)
      .def_readwrite("stride_h", &bw::ConvShape::stride_h)
      .def_readwrite("stride_w", &bw::ConvShape::stride_w)
      .def_readwrite("pad_top", &bw::ConvShape::pad_top)
      .def_readwrite("pad_bottom", &bw::ConvShape::pad_bottom)
      .def_readwrite("pad_left", &bw::ConvShape::pad_left)
      .def_readwrite("pad_right", &bw::ConvShape::pad_right)
      .def_readwrite("dilation_h", &bw::ConvShape::dilation_h)
      .def_readwrite("dilation_w", &bw::ConvShape::dilation_w)
      .def_readwrite("bits", &bw::ConvShape::bits)
      .def_readwrite("group_size", &bw::ConvShape::group_size)
      .def_property_readonly("depthwise", &bw::ConvShape::depthwise);

  module.def("quantize_images_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::quantize_images_variants(&count);
    return variant_table(isas, count);
  });
  module.def("depthwise_variants", [] {
    std::size_t count;
    const bw::Isa* isas = bw::depthwise_variants(&count);
    return variant_table(isas, count);
  });
  module.def(
      "conv_select",
      [](const bw::ConvShape& shape, const char* ceiling) {
        return bw::isa_name(bw::conv_select(shape, isa_or_raise(ceiling)));
      },
      py::arg("shape"), py::arg("ceiling") = "");
  module.def("conv_layout_bytes", [](const bw::ConvShape& shape, const char* isa) {
    return bw::conv_layout_bytes(shape, isa_or_raise(isa));
  });
  module.def("conv_pack", [](const bw::ConvShape& shape, const char* isa, std::uintptr_t codes, std::uintptr_t scale,
                             std::uintptr_t zero, std::uintptr_t layout, int64_t layout_bytes) {
    const bw::Isa target = isa_or_raise(isa);
    py::gil_scoped_release unlocked;
    return static_cast<int>(bw::conv_pack(shape, target, as_pointer<uint8_t>(codes), as_pointer<float>(scale),
                                          as_pointer<float>(zero), as_pointer<void>(layout), layout_bytes));
  });
  module.def("conv_unpack", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t codes, std::uintptr_t scale,
                               std::uintptr_t zero) {
    return static_cast<int>(bw::conv_unpack(as_pointer<void>(layout), layout_bytes, as_pointer<uint8_t>(codes),
                                            as_pointer<float>(scale), as_pointer<float>(zero)));
  });
  module.def(
      "conv_describe",
      [](std::uintptr_t layout, int64_t layout_bytes) {
        bw::ConvShape shape;
        bw::Isa isa = bw::Isa::reference;
        const bw::Status status = bw::conv_describe(as_pointer<void>(layout), layout_bytes, &shape, &isa);
        return py::make_tuple(static_cast<int>(status), shape, bw::isa_name(isa));
      },
      "(status, shape, kernel) of a packed buffer");
  module.def("conv_forward", [](std::uintptr_t layout, int64_t layout_bytes, std::uintptr_t x, int64_t images,
                                int64_t height, int64_t width, int64_t stride_n, int64_t stride_c, int64_t stride_h,
                                int64_t stride_w, std::uintptr_t bias, std::uintptr_t y) {
    const bw::ConvInput input = {as_pointer<float>(x), images, height, width, stride_n, stride_c, stride_h, stride_w};
    py::gil_scoped_release unlocked;
    return static_cast<int>(
        bw::conv_forward(as_pointer<void>(layout), layout_bytes, input, as_pointer<float>(bias), as_pointer<float>(y)));
  });
  module.def("quantize_images",
             [](std::uintptr_t x, int64_t images, int64_t channels, int64_t height, int64_t width, int64_t stride_n,
                int64_t stride_c, int64_t stride_h, int64_t stride_w, int64_t padding, int64_t slice_size,
                std::uintptr_t q, std::uintptr_t scale, std::uintptr_t sums, const char* isa) {
               const bw::QuantizeImagesArgs args = {as_pointer<float>(x),
                                                    images,
                                                    channels,
                                                    height,
                                                    width,
                                                    stride_n,
                                                    stride_c,
                                                    stride_h,
                                                    stride_w,
                                                    padding,
                                                    padding,
                                                    padding,
                                                    padding,
                                                    slice_size,
                                                    as_pointer<int8_t>(q),
                                                    as_pointer<float>(scale),
                                                    as_pointer<int32_t>(sums)};
               return static_cast<int>(bw::quantize_images(args, isa_or_raise(isa)));
             });
}
