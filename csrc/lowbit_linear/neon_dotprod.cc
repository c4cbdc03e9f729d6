// AArch64 with the dot-product extension: SDOT by lane, one register of activations for 16 k.
//
// Inner loop for 256 weights (16 channels x 16 k), instructions as g++ 12 -O3 emits them:
//   bits  bytes  SDOT  mask/shift  other   one row   four rows
//     2     64     16      12        11       39         90
//     3     96     16      20        18       54        109
//     4    128     16       8        17       41         87
//     8    256     16       0        24       40         89
// That is 0.15 instructions a weight and row at 2 bits with one row and 0.09 with four. KleidiAI's
// 2-bit kernel (qai8dxp1x4 x qsu2cxp4x4, read in August 2026) unpacks 64 weights with 3 AND, 3 USHR
// and 4 TBL before its 4 SDOT, 72 instructions for the same 256 weights; the nested masks need 3 AND.
//
// What bounds it: vector instructions. On a core with two vector pipes one row at 2 bits takes
// 28 / 2 = 14 cycles for 64 bytes, 4.6 bytes a cycle, so one thread stays below its bandwidth from
// the second-level cache and the loop is worth its few instructions; four rows take 76 / 2 cycles
// for 256 weights x 4, 84% of them SDOT. The four chains of SDOT accumulate in fewer cycles than
// that (latency 3, 1 when only forwarding the sum).
#include "lowbit_linear/lowbit_linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include "lowbit_linear/neon_tile.h"

namespace bantamweight {
namespace {

struct Dotprod {
  static constexpr bool kSigned = true;

  static int64_t k_align(int bits) { return bits == 3 ? 8 : 4; }

  // A vector is 4 channels x 4 k of each of its nests.
  static Place place(int bits, int64_t n, int64_t k) {
    const int nests = nests_of(bits);
    const int64_t quad = n / 4;
    return {k / 4 * (4 / nests) + quad / nests, static_cast<int>(n % 4 * 4 + k % 4), static_cast<int>(quad % nests)};
  }

  // Nested sums: at[r][j] is row r, channels 4j .. 4j + 3.
  template <int kBits, int kRows>
  struct Sums {
    int32x4_t at[kRows][4];

    BANTAMWEIGHT_INLINE Sums() {
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < 4; ++j) at[r][j] = vdupq_n_s32(0);
      }
    }

    template <int kLane>
    BANTAMWEIGHT_INLINE void dot(int j, uint8x16_t weight, const int8x16_t (&a)[kRows]) {
      for (int r = 0; r < kRows; ++r) {
        at[r][j] = vdotq_laneq_s32(at[r][j], vreinterpretq_s8_u8(weight), a[r], kLane);
      }
    }

    // Four k of all 16 channels, against lane kLane of the activations.
    template <int kLane>
    BANTAMWEIGHT_INLINE void four_k(const uint8_t* weight, const int8x16_t (&a)[kRows]) {
      if constexpr (kBits == 2) {
        const uint8x16_t x = vld1q_u8(weight);
        dot<kLane>(0, vandq_u8(x, vdupq_n_u8(0x03)), a);
        dot<kLane>(1, vandq_u8(x, vdupq_n_u8(0x0f)), a);
        dot<kLane>(2, vandq_u8(x, vdupq_n_u8(0x3f)), a);
        dot<kLane>(3, x, a);
      } else if constexpr (kBits == 4) {
        for (int pair = 0; pair < 2; ++pair) {
          const uint8x16_t x = vld1q_u8(weight + pair * kVector);
          dot<kLane>(2 * pair, vandq_u8(x, vdupq_n_u8(0x0f)), a);
          dot<kLane>(2 * pair + 1, x, a);
        }
      } else {
        for (int j = 0; j < 4; ++j) dot<kLane>(j, vld1q_u8(weight + j * kVector), a);
      }
    }

    // 3 bits: eight k in three vectors, against lanes kLane and kLane + 1.
    template <int kLane>
    BANTAMWEIGHT_INLINE void eight_k(const uint8_t* weight, const int8x16_t (&a)[kRows]) {
      const uint8x16_t x0 = vld1q_u8(weight), x1 = vld1q_u8(weight + kVector), x2 = vld1q_u8(weight + 2 * kVector);
      const uint8x16_t x3 = spare_bits(x0, x1, x2), low = vdupq_n_u8(0x07), both = vdupq_n_u8(0x3f);
      dot<kLane>(0, vandq_u8(x0, low), a);
      dot<kLane>(1, vandq_u8(x0, both), a);
      dot<kLane>(2, vandq_u8(x1, low), a);
      dot<kLane>(3, vandq_u8(x1, both), a);
      dot<kLane + 1>(0, vandq_u8(x2, low), a);
      dot<kLane + 1>(1, vandq_u8(x2, both), a);
      dot<kLane + 1>(2, vandq_u8(x3, low), a);
      dot<kLane + 1>(3, x3, a);
    }

    BANTAMWEIGHT_INLINE void add_piece(const uint8_t* weight, const int8_t* const (&rows)[kRows], int64_t k_size) {
      constexpr int64_t kFour = 4 * kBits * kBlockN / 8;  // bytes of four k
      for (int64_t k = 0; k < k_size; k += 16, weight += 4 * kFour) {
        int8x16_t a[kRows];  // the last one may read past the piece, where the codes are 0
        for (int r = 0; r < kRows; ++r) a[r] = vld1q_s8(rows[r] + k);
        const int64_t left = k_size - k;
        if constexpr (kBits == 3) {
          eight_k<0>(weight, a);
          if (left > 8) eight_k<2>(weight + 2 * kFour, a);
        } else if (left > 12) {
          four_k<0>(weight, a);
          four_k<1>(weight + kFour, a);
          four_k<2>(weight + 2 * kFour, a);
          four_k<3>(weight + 3 * kFour, a);
        } else {
          four_k<0>(weight, a);
          if (left > 4) four_k<1>(weight + kFour, a);
          if (left > 8) four_k<2>(weight + 2 * kFour, a);
        }
      }
    }

    BANTAMWEIGHT_INLINE void of_row(int r, int32x4_t (&dots)[4]) const {
      for (int j = 0; j < 4; ++j) dots[j] = at[r][j];
    }
  };
};

constexpr LinearKernel kernel = {
    Isa::neon_dotprod,     kBlockN,     block_bytes<Dotprod>, lane_factor, pack_block<Dotprod>,
    unpack_block<Dotprod>, run<Dotprod>};

}  // namespace

const LinearKernel* linear_kernel_neon_dotprod() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_neon_dotprod() { return nullptr; }
}  // namespace bantamweight

#endif
