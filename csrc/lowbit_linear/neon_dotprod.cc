// AArch64 with the dot-product extension: SDOT by lane, one register of activations for 16 k.
//
// Inner loop for 256 weights (16 channels x 16 k), instructions as g++ 12 -O3 emits them
// (bench/arm_instructions.py counts them, and what a group of k adds):
//   bits  bytes  SDOT  mask/shift  other   one row   four rows
//     2     64     16      12         7       35         86
//     3     96     16      20        12       48        103
//     4    128     16       8         9       33         89
//     8    256     16       0        21       37         83
// That is 0.14 instructions a weight and row at 2 bits with one row and 0.08 with four. KleidiAI
// (after v1.30, read in August 2026) needs for the same 256 weights and one row 72 at 2 bits, where
// 40 instructions unpack, 46 at 4 and 44 at 8; for several rows and weight 0.096, 0.084 and 0.086
// where ours are 0.084, 0.087 and 0.081. In groups of 32 k ours takes 70 instructions for one row
// and KleidiAI 59: it has no zero to subtract, and 8 channels a tile.
//
// What bounds it: vector instructions. On a core with two vector pipes one row at 2 bits takes
// 28 / 2 = 14 cycles for 64 bytes, 4.6 bytes a cycle, so one thread stays below its bandwidth from
// the second-level cache and the loop is worth its few instructions; four rows take 76 / 2 cycles
// for 256 weights x 4, 84% of them SDOT. The four chains of SDOT accumulate in fewer cycles than
// that (latency 3, 1 when only forwarding the sum). Six rows spill; so does one sum of four rows at
// 4 bits, whatever the order of the source.
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
        // As an intrinsic, GCC 12 copied sums from register to register around it.
        int32x4_t sum = at[r][j];
        asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(weight), "w"(a[r]), "i"(kLane));
        at[r][j] = sum;
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
          dot<kLane>(2 * pair + 1, x, a);
          dot<kLane>(2 * pair, vandq_u8(x, vdupq_n_u8(0x0f)), a);
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

    BANTAMWEIGHT_INLINE void load(const int8_t* const (&rows)[kRows], int64_t k, int8x16_t (&a)[kRows]) {
      for (int r = 0; r < kRows; ++r) a[r] = vld1q_s8(rows[r] + k);
    }

    // Returns the end of the piece's bytes.
    BANTAMWEIGHT_INLINE const uint8_t* add_piece(const uint8_t* weight, const int8_t* const (&rows)[kRows],
                                                 int64_t k_size) {
      constexpr int64_t kFour = 4 * kBits * kBlockN / 8;  // bytes of four k
      constexpr int64_t kStep = kBits == 3 ? 8 : 4;
      int8x16_t a[kRows];
      int64_t k = 0;
      for (; k + 16 <= k_size; k += 16, weight += 4 * kFour) {
        load(rows, k, a);
        if constexpr (kBits == 3) {
          eight_k<0>(weight, a);
          eight_k<2>(weight + 2 * kFour, a);
        } else {
          four_k<0>(weight, a);
          four_k<1>(weight + kFour, a);
          four_k<2>(weight + 2 * kFour, a);
          four_k<3>(weight + 3 * kFour, a);
        }
      }
      for (; k < k_size; k += kStep, weight += kStep / 4 * kFour) {
        load(rows, k, a);  // may read past the piece, where the codes are 0
        if constexpr (kBits == 3) {
          eight_k<0>(weight, a);
        } else {
          four_k<0>(weight, a);
        }
      }
      return weight;
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
