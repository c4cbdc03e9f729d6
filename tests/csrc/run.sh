#!/bin/sh
# Builds and runs the C++ tests: run.sh native | sanitize | aarch64
#   native    this machine's compiler; every kernel this CPU runs
#   sanitize  the same with the address and undefined-behaviour sanitizers
#   aarch64   cross-compiled and run under qemu, so that the NEON kernels are tested on any machine
set -eu
cd "$(dirname "$0")/../.."
mode=${1:-native}
build=build/$mode
jobs=$(nproc 2>/dev/null || echo 2)
options="-DBANTAMWEIGHT_PYTHON=OFF -DBANTAMWEIGHT_TESTS=ON"

generator=
if command -v ninja >/dev/null; then generator="-G Ninja"; fi

configure() {
  # shellcheck disable=SC2086  (the options are words)
  cmake -S . -B "$build" $generator $options "$@" >"$build.log" 2>&1 ||
    { cat "$build.log"; echo "C++ tests ($mode): the configuration failed"; exit 1; }
}

mkdir -p build
case $mode in
  native) configure ;;
  sanitize) configure -DBANTAMWEIGHT_SANITIZE=ON ;;
  aarch64)
    if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64-static >/dev/null; then
      echo "skipped: the C++ tests for AArch64; install g++-aarch64-linux-gnu and qemu-user-static to run them"
      if [ "${CI:-}" = true ]; then exit 1; fi
      exit 0
    fi
    configure -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-cpu;max"
    ;;
  *)
    echo "usage: $0 native | sanitize | aarch64"
    exit 2
    ;;
esac

cmake --build "$build" -j "$jobs" >"$build.log" 2>&1 ||
  { cat "$build.log"; echo "C++ tests ($mode): the build failed"; exit 1; }
if grep "csrc/.*:[0-9]*:[0-9]*: warning:" "$build.log"; then  # ours; the linker warns of dlopen in a static libgomp
  echo "C++ tests ($mode): the build has warnings"
  exit 1
fi
# Each test prints which variants ran; -V shows it.
ctest --test-dir "$build" --output-on-failure -j "$jobs" -V >"$build.log" 2>&1 ||
  { cat "$build.log"; echo "C++ tests ($mode): failed"; exit 1; }
sed -n 's/^[0-9]*: \(  .*\|test_.*\)$/\1/p' "$build.log" | grep -v '^  *Test' || true
echo "C++ tests ($mode): passed"
