#!/bin/sh
# Builds and runs the C++ tests: run.sh [native] [sanitize] [aarch64]
#   native    this machine's compiler; every kernel this CPU runs
#   sanitize  the same with the address and undefined-behaviour sanitizers
#   aarch64   cross-compiled and run under qemu, so that the NEON kernels are tested on any machine
set -eu
cd "$(dirname "$0")/../.."
jobs=$(nproc 2>/dev/null || echo 2)
mkdir -p build

fail() { # sentence
  cat "build/$mode.log"
  echo "C++ tests ($mode): $1"
  exit 1
}

build() { # CMake options
  set -- -DBANTAMWEIGHT_PYTHON=OFF -DBANTAMWEIGHT_TESTS=ON "$@"
  if command -v ninja >/dev/null; then set -- -G Ninja "$@"; fi
  cmake -S . -B "build/$mode" "$@" >"build/$mode.log" 2>&1 || fail "the configuration failed"
  cmake --build "build/$mode" -j "$jobs" >"build/$mode.log" 2>&1 || fail "the build failed"
  # Ours only: the linker warns of dlopen in a static libgomp.
  if grep "csrc/.*:[0-9]*:[0-9]*: warning:" "build/$mode.log"; then fail "the build has warnings"; fi
}

# Each program says which variants ran; ctest -V passes that on behind "number: ".
run() {
  ctest --test-dir "build/$mode" --output-on-failure -j "$jobs" -V >"build/$mode.log" 2>&1 || fail "a test failed"
  sed -n 's/^[0-9]*: \(.* ran, equal .*\|.* not run: .*\|test_.*\)$/\1/p' "build/$mode.log"
}

# The inner loops of the packed matmul have no more instructions than were recorded.
count_instructions() {
  if ! command -v python3 >/dev/null; then
    echo "  instruction counts not compared: there is no python3"
    return
  fi
  python3 tests/csrc/instruction_counts.py "build/$mode" || { echo "C++ tests ($mode): a loop grew"; exit 1; }
}

# CPUs without the newer instructions: one that strayed into a baseline file is illegal there.
run_on_older_cpus() {
  for cpu in cortex-a53 neoverse-n1; do
    for test in build/"$mode"/test_*; do
      if ! [ -f "$test" ] || ! [ -x "$test" ]; then continue; fi
      qemu-aarch64-static -cpu $cpu "$test" >"build/$mode.log" 2>&1 || fail "$(basename "$test") failed on a $cpu"
    done
    echo "  and on a $cpu"
  done
}

for mode in "${@:-native}"; do
  echo "C++ tests ($mode)"
  case $mode in
    native)
      build
      run
      count_instructions
      ;;
    sanitize)
      build -DBANTAMWEIGHT_SANITIZE=ON
      run
      ;;
    aarch64)
      if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64-static >/dev/null; then
        echo "skipped: the C++ tests for AArch64; install g++-aarch64-linux-gnu and qemu-user-static to run them"
        if [ "${CI:-}" = true ]; then exit 1; fi
        continue
      fi
      build -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-cpu;max"
      run
      count_instructions
      run_on_older_cpus
      ;;
    *)
      echo "usage: $0 [native] [sanitize] [aarch64]"
      exit 2
      ;;
  esac
  echo "C++ tests ($mode): passed"
done
