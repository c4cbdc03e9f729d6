#include "quantize_images/quantize_images.h"
namespace bantamweight {
const QuantizeImagesKernel* quantize_images_avx512() { return nullptr; }
}  // namespace bantamweight
