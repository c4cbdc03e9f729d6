// AMX tiles for files that are compiled for them. Everything is static: each file that includes it keeps
// a copy with its own flags.
#pragma once

#include <cstdint>

namespace bantamweight {

constexpr int64_t kTileRows = 16, kTileBytes = 1024, kTileInts = kTileBytes / 4;

// Written with memory clobbers: the compiler sees neither what a tile load reads nor what a store writes.
#define TILE_OPERANDS(address, stride) ::"r"(address), "r"(static_cast<int64_t>(stride)) : "memory"
#define TILE_LOAD(tile, address, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile TILE_OPERANDS(address, stride))
// The same past L1, for what is read once: L1 keeps what it has.
#define TILE_LOAD_ONCE(tile, address, stride) \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile TILE_OPERANDS(address, stride))
#define TILE_STORE(tile, address, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" TILE_OPERANDS(address, stride))
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::: "memory")
// sum += activations x codes: signed x unsigned, and signed x signed
#define TILE_MULTIPLY(sum, activations, codes) \
  __asm__ volatile("tdpbsud %%tmm" #codes ", %%tmm" #activations ", %%tmm" #sum::: "memory")
#define TILE_MULTIPLY_SIGNED(sum, activations, codes) \
  __asm__ volatile("tdpbssd %%tmm" #codes ", %%tmm" #activations ", %%tmm" #sum::: "memory")

// Tiles 0 .. 3 hold the sums of `rows` rows, the next ones up to first_codes their activations, k bytes
// each, and the others codes for as many k.
static inline void configure(int64_t rows, int64_t k = 64, int first_codes = 5) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;  // palette
  for (int t = 0; t < 8; ++t) {
    const bool activations = t >= 4 && t < first_codes;
    config[16 + 2 * t] = static_cast<uint8_t>(activations ? k : 64);  // bytes a row
    config[48 + t] = static_cast<uint8_t>(t < first_codes ? rows : k / 4);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// Nothing of the tiles is left behind: the next context switch need not save them.
static inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

}  // namespace bantamweight
