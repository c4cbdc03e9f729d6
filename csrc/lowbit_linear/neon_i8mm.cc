// AArch64 with the 8-bit matrix-multiply extension: USMMLA for pairs of rows, USDOT for a last one.
// Codes are unsigned here, so bytes are stored as they nest.
//
// Inner loop for 256 weights (16 channels x 16 k), instructions as g++ 12 -O3 emits them
// (bench/arm_instructions.py counts them, and what a group of k adds):
//   bits  bytes  mask/shift   one row (16 USDOT)   two (16 USMMLA)   four (32 USMMLA)
//     2     64       12               37                  38                 58
//     3     96       20               50                  51                 71
//     4    128        8               35                  36                 56
//     8    256        0               34                  34                 56
// That is 0.057 instructions a weight and row at 2 bits with four rows, against 0.084 with SDOT by
// lane; one row gains nothing over it (0.14) and keeps this layout. KleidiAI's 4-bit kernels (after
// v1.30, read in August 2026) need 0.066 with four rows and 0.053 with eight, of activations that
// were interleaved before; ours 0.055 of rows as they are.
//
// What bounds it: vector instructions again. Four rows at 2 bits are 32 USMMLA, 12 AND and 4 ZIP
// that pair the rows' activations: 24 cycles on two vector pipes for 1024 multiply-adds, where SDOT
// needs 38. Six rows would divide the masks among more, but spill.
#include "lowbit_linear/lowbit_linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "lowbit_linear/neon_tile.h"

namespace bantamweight {
namespace {

struct MatMulInt8 {
  static constexpr bool kSigned = false;

  static int64_t k_align(int) { return 8; }

  // A vector is 2 channels x 8 k of each of its nests; two vectors side by side are a quad.
  static Place place(int bits, int64_t n, int64_t k) {
    const int nests = nests_of(bits);
    const int64_t quad = n / 4;
    return {k / 8 * (8 / nests) + quad / nests * 2 + n % 4 / 2, static_cast<int>(n % 2 * 8 + k % 8),
            static_cast<int>(quad % nests)};
  }

  // Nested sums of channels 4j + 2h, 4j + 2h + 1 in at[..][2j + h]: two rows share a register,
  // {channel 0 row 0, channel 0 row 1, channel 1 row 0, channel 1 row 1}; one row alone has
  // {channel 0 even half of k, channel 0 odd half, channel 1 even half, channel 1 odd half}.
  template <int kBits, int kRows>
  struct Sums {
    static constexpr int kPairs = (kRows + 1) / 2;
    int32x4_t at[kPairs][8];

    BANTAMWEIGHT_INLINE Sums() {
      for (int r = 0; r < kPairs; ++r) {
        for (int i = 0; i < 8; ++i) at[r][i] = vdupq_n_s32(0);
      }
    }

    BANTAMWEIGHT_INLINE void dot(int i, uint8x16_t weight, const int8x16_t (&a)[kPairs]) {
      for (int r = 0; r < kPairs; ++r) {
        // As intrinsics, GCC 12 copied sums from register to register around them.
        int32x4_t sum = at[r][i];
        if constexpr (kRows == 1) {
          asm("usdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(weight), "w"(a[r]));
        } else {
          asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(weight), "w"(a[r]));
        }
        at[r][i] = sum;
      }
    }

    // Vector `slot` of a step with two nests: quads 2 (slot / 2) and the next.
    BANTAMWEIGHT_INLINE void two_nests(int slot, uint8x16_t low, uint8x16_t both, const int8x16_t (&a)[kPairs]) {
      dot(slot / 2 * 4 + slot % 2, low, a);
      dot(slot / 2 * 4 + slot % 2 + 2, both, a);
    }

    // Eight k of all 16 channels.
    BANTAMWEIGHT_INLINE void eight_k(const uint8_t* weight, const int8x16_t (&a)[kPairs]) {
      if constexpr (kBits == 2) {
        for (int half = 0; half < 2; ++half) {
          const uint8x16_t x = vld1q_u8(weight + half * kVector);
          dot(half, vandq_u8(x, vdupq_n_u8(0x03)), a);
          dot(half + 2, vandq_u8(x, vdupq_n_u8(0x0f)), a);
          dot(half + 4, vandq_u8(x, vdupq_n_u8(0x3f)), a);
          dot(half + 6, x, a);
        }
      } else if constexpr (kBits == 3) {
        const uint8x16_t x0 = vld1q_u8(weight), x1 = vld1q_u8(weight + kVector), x2 = vld1q_u8(weight + 2 * kVector);
        const uint8x16_t x3 = spare_bits(x0, x1, x2), low = vdupq_n_u8(0x07), both = vdupq_n_u8(0x3f);
        two_nests(0, vandq_u8(x0, low), vandq_u8(x0, both), a);
        two_nests(1, vandq_u8(x1, low), vandq_u8(x1, both), a);
        two_nests(2, vandq_u8(x2, low), vandq_u8(x2, both), a);
        two_nests(3, vandq_u8(x3, low), x3, a);
      } else if constexpr (kBits == 4) {
        for (int slot = 0; slot < 4; ++slot) {
          const uint8x16_t x = vld1q_u8(weight + slot * kVector);
          two_nests(slot, vandq_u8(x, vdupq_n_u8(0x0f)), x, a);
        }
      } else {
        for (int i = 0; i < 8; ++i) dot(i, vld1q_u8(weight + i * kVector), a);
      }
    }

    // Returns the end of the piece's bytes.
    BANTAMWEIGHT_INLINE const uint8_t* add_piece(const uint8_t* weight, const int8_t* const (&rows)[kRows],
                                                 int64_t k_size) {
      constexpr int64_t kEight = kBits * kBlockN;  // bytes of eight k
      int64_t k = 0;
      for (; k + 16 <= k_size; k += 16, weight += 2 * kEight) {
        int8x16_t first[kPairs], second[kPairs];  // eight k each
        for (int r = 0; r < kPairs; ++r) {
          const int64x2_t even = vreinterpretq_s64_s8(vld1q_s8(rows[2 * r] + k));
          const int64x2_t odd =
              kRows == 1 ? even : vreinterpretq_s64_s8(vld1q_s8(rows[kRows == 1 ? 0 : 2 * r + 1] + k));
          first[r] = vreinterpretq_s8_s64(vzip1q_s64(even, odd));
          second[r] = vreinterpretq_s8_s64(vzip2q_s64(even, odd));
        }
        eight_k(weight, first);
        eight_k(weight + kEight, second);
      }
      for (; k < k_size; k += 8, weight += kEight) {
        int8x16_t a[kPairs];  // the last one may read past the piece, where the codes are 0
        for (int r = 0; r < kPairs; ++r) {
          a[r] = vcombine_s8(vld1_s8(rows[2 * r] + k), vld1_s8(rows[kRows == 1 ? 0 : 2 * r + 1] + k));
        }
        eight_k(weight, a);
      }
      return weight;
    }

    BANTAMWEIGHT_INLINE void of_row(int r, int32x4_t (&dots)[4]) const {
      for (int j = 0; j < 4; ++j) {
        const int32x4_t first = at[r / 2][2 * j], second = at[r / 2][2 * j + 1];
        dots[j] = kRows == 1   ? vpaddq_s32(first, second)
                  : r % 2 == 0 ? vuzp1q_s32(first, second)
                               : vuzp2q_s32(first, second);
      }
    }
  };
};

constexpr LinearKernel kernel = {
    Isa::neon_i8mm,           kBlockN,        block_bytes<MatMulInt8>, lane_factor, pack_block<MatMulInt8>,
    unpack_block<MatMulInt8>, run<MatMulInt8>};

}  // namespace

const LinearKernel* linear_kernel_neon_i8mm() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_neon_i8mm() { return nullptr; }
}  // namespace bantamweight

#endif
