// Working memory that a thread keeps between calls, so that a small layer allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace bantamweight {

// Adds up the parts of one allocation; each part starts on a cache line.
class ScratchPlan {
 public:
  // The byte offset of a part of `count` Ts.
  template <class T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Hold one as a thread_local. Memory above kKept is given back at the next smaller request.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // At least `bytes` bytes, 64-byte aligned, contents undefined; null when out of memory.
  uint8_t* get(int64_t bytes) {
    if (bytes > size_ || (size_ > kKept && bytes <= kKept)) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<std::size_t>(size_)));
      if (memory_ == nullptr) size_ = 0;
    }
    return memory_;
  }

 private:
  static constexpr int64_t kKept = int64_t{64} << 20;
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace bantamweight
