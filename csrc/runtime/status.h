// What every kernel returns: kernels never throw, print or abort.
#pragma once

namespace bantamweight {

enum class Status : int {
  ok = 0,
  invalid_argument = 1,  // a size, stride or pointer that no call may pass
  unsupported = 2,       // a valid request that this build or this CPU cannot serve
  out_of_memory = 3,
  wrong_layout = 4,  // a packed buffer made by another version, for another kernel, or cut short
  not_finite = 5,    // NaN or infinity in the activations
  out_of_range = 6,  // an index outside its table
};

inline const char* status_message(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::invalid_argument:
      return "a size, stride or pointer is out of range";
    case Status::unsupported:
      return "this CPU or this build cannot run the kernel";
    case Status::out_of_memory:
      return "out of memory";
    case Status::wrong_layout:
      return "the packed weights were made by another version or for another CPU; load them again from the file";
    case Status::not_finite:
      return "the input holds NaN or infinity";
    case Status::out_of_range:
      return "an index is outside the table";
  }
  return "unknown status";
}

}  // namespace bantamweight
