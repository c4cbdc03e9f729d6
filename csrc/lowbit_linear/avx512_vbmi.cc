// AVX-512 VBMI: the kernel of avx512_vnni.cc, and ternary codes in 5/3 bits each (trits_avx512.h).
//
// One row against a weight that comes from beyond L2 waits for bytes alone, and these are 5/6 of those at 2
// bits. vpermb turns a row of triples into c0 | c1 << 2 | c2 << 4, which is masked as at 2 bits; the fourth
// 16 channels have lookups and sums of their own. Per 256 weights, 53 1/3 bytes: 0.83 loads, 2 vpermb, 2 and,
// 1.67 shifts, merges and additions for the three rows out of top bits, and 4 products and 1 broadcast for
// each row of activations; at 2 bits 1 load, 3 and, and the same for each row.
//
// One thread, one row, against 2 bits in the same process: 4096 x 4096 145 us to 119, 4096 x 14336 500 to
// 420, where memory again delivers 29 to 30 GB/s; in L2 it is slower (2560 x 2560: 34 to 40 us), because ports
// 0 and 5 then count, 4.8 cycles of them for 3.5. They meet at 2 to 2.5 MB of 2-bit codes for each thread, which
// is stored_bits' threshold. Two rows break even; more want what is unpacked for each of them: 3 rows take 1.06
// times as long as at 2 bits, 4 to 20 on AMX 1.2 to 1.3; from 24 on, it takes 0.9 to 1.05 times as long.
//
// Tried: five codes a byte (s + 128, vpermi2b on its absolute value, a masked subtraction, the byte itself for
// the fifth): 0.79 of the speed of 2 bits in L2, 1.10 beyond it, where these have 0.98 and 1.2 as loops alone.
// Expanding blocks for few rows: 2 us for 64 channels of 4096 k, stores into L2 most of it.
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "lowbit_linear/nested_avx512.h"
#include "lowbit_linear/trits_avx512.h"

namespace bantamweight {
namespace {

static_assert(step_k(kTrits) == kTritK && step_bytes(kTrits) == kTritBytes, "both headers mean one step");

template <>
struct Step<kTrits> {
  template <int kRows, int kTiles>
  __attribute__((always_inline)) static void multiply(const uint8_t* w, const int8_t* const (&a)[kRows], int64_t k,
                                                      __m512i (&into)[kRows][kTiles]) {
    const __m512i low2 = _mm512_set1_epi8(0x03), low4 = _mm512_set1_epi8(0x0f);
    const TritStep step(w);
#pragma GCC unroll 6
    for (int q = 0; q < kTritQuads; ++q) {
      const __m512i three = step.three(q);
      const __m512i x[4] = {_mm512_and_si512(three, low2), _mm512_and_si512(three, low4), three,
                            kTiles > 2 ? step.fourth(q) : three};
      multiply_quad(x, a, k + 4 * q, into);
    }
  }
};

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) { return bytes_of(bits, pieces, piece_count); }

float lane_factor(int bits, int64_t lane) {
  return linear_kernel_avx512_vnni()->lane_factor(bits == kTrits ? 2 : bits, lane);
}

// The code of a triple's `at`-th column: rows 6 and 7 hold one channel at three times four k.
struct TripleCode {
  int64_t channel, k;
};
TripleCode code_of(int64_t row, int at, int64_t lane, int64_t kk) {
  if (row < kTritQuads) return {lane + 16 * at, 4 * row + kk};
  return {lane + 48, 4 * (3 * (row - kTritQuads) + at) + kk};
}

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  if (bits != kTrits) {
    linear_kernel_avx512_vnni()->pack_block(bits, pieces, piece_count, codes, ldk, valid_n, block);
    return;
  }
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t begin = 0; begin < pieces[p].k_size; begin += kTritK, block += kTritBytes) {
      const uint8_t* from = codes + pieces[p].k_begin + begin;
      const int64_t left = pieces[p].k_size - begin;
      for (int64_t byte = 0; byte < 64; ++byte) {
        int triple[8], top[5];
        for (int64_t row = 0; row < 8; ++row) {
          triple[row] = 0;
          for (int at = 2; at >= 0; --at) {
            const TripleCode c = code_of(row, at, byte / 4, byte % 4);
            triple[row] = 3 * triple[row] + (c.channel < valid_n && c.k < left ? from[c.channel * ldk + c.k] : 0);
          }
        }
        spread_triples(triple, top);
        for (int64_t row = 0; row < kTritRows; ++row) {
          block[64 * row + byte] = static_cast<uint8_t>(triple[row] | top[row] << 5);
        }
      }
    }
  }
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  if (bits != kTrits) {
    linear_kernel_avx512_vnni()->unpack_block(bits, pieces, piece_count, block, ldk, valid_n, codes);
    return;
  }
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t begin = 0; begin < pieces[p].k_size; begin += kTritK, block += kTritBytes) {
      uint8_t* to = codes + pieces[p].k_begin + begin;
      const int64_t left = pieces[p].k_size - begin;
      for (int64_t byte = 0; byte < 64; ++byte) {
        int triple[8], top[5];
        for (int64_t row = 0; row < kTritRows; ++row) {
          triple[row] = block[64 * row + byte] & 31;
          top[row] = block[64 * row + byte] >> 5;
        }
        gather_triples(top, triple);
        for (int64_t row = 0; row < 8; ++row) {
          for (int at = 0; at < 3; ++at, triple[row] /= 3) {
            const TripleCode c = code_of(row, at, byte / 4, byte % 4);
            if (c.channel < valid_n && c.k < left) to[c.channel * ldk + c.k] = static_cast<uint8_t>(triple[row] % 3);
          }
        }
      }
    }
  }
}

void expand_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, uint8_t* expanded) {
  if (bits != kTrits) {
    linear_kernel_avx512_vnni()->expand_block(bits, pieces, piece_count, block, expanded);
    return;
  }
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t quads = steps_of(2, pieces[p]); quads > 0; quads -= kTritQuads, block += kTritBytes) {
      const TritStep step(block);
#pragma GCC unroll 6
      for (int q = 0; q < kTritQuads; ++q) {
        if (q >= quads) break;
        _mm512_store_si512(expanded, _mm512_or_si512(step.three(q), step.fourth(q)));
        expanded += 64;
      }
    }
  }
}

int64_t expand_rows(int bits) { return bits == kTrits ? 24 : linear_kernel_avx512_vnni()->expand_rows(bits); }

void run(int bits, const TileTask& task) {
  if (bits == kTrits && task.piece_count > 0) {
    run_bits<kTrits>(task);
  } else {
    linear_kernel_avx512_vnni()->run(bits, task);
  }
}

constexpr LinearKernel kernel = [] {
  LinearKernel all = {Isa::avx512_vbmi, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};
  all.expand_block = expand_block;
  all.expand_rows = expand_rows;
  all.writes_codes = true;
  all.takes_trits = true;
  return all;
}();

}  // namespace

const LinearKernel* linear_kernel_avx512_vbmi() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx512_vbmi() { return nullptr; }
}  // namespace bantamweight

#endif
