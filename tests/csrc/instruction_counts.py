"""Instructions in the inner loops of the packed matmul, so that a regression shows without a clock.

python tests/csrc/instruction_counts.py BUILD_DIRECTORY [--record]

Disassembles the kernels of a CMake build and looks at every loop that multiplies: the smallest loop
around each product instruction. Against what `instruction_counts.json` holds for the same compiler, a
loop that has over 5% more instructions, or more products, is a failure. A function that was inlined
elsewhere or has other loops is named but is no failure: look at it and record it. A compiler of
another version makes other code, so nothing is compared then, and the sentence says so.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
KERNELS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_vbmi", "amx", "neon_dotprod", "neon_i8mm")
PRODUCT = re.compile(r"vpdpbusds?|vpmaddubsw|vpmaddwd|tdpb\w+|[su]dot|usdot|[su]mmla|usmmla")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+([a-z][\w.]*)\s*(.*)$")
TARGET = re.compile(r"\b([0-9a-f]+) <")
JUMPS = ("j", "b.", "cb", "tb")

SLACK = 0.05  # what the compiler's allocation of registers may add where nothing was meant to change

Loops = dict[str, list[list[int]]]  # by function: [instructions, products] of each loop


def setting(build: Path, name: str) -> str:
    """A value that CMake wrote down about the compiler."""
    for file in sorted(build.glob("CMakeFiles/*/CMake*.cmake")):
        found = re.search(rf'set\({name} "([^"]*)"\)', file.read_text())
        if found:
            return found[1]
    raise SystemExit(f"{build} is not a configured CMake build: it does not say what {name} is")


def loops_of(listing: str) -> Loops:
    """The multiplying loops of each function in objdump's listing."""
    found: Loops = {}
    name, code = "", []
    for line in [*listing.splitlines(), "0 <end>:"]:
        if head := FUNCTION.match(line):
            for size in loops_of_function(code):
                found.setdefault(name, []).append(size)
            short = re.search(r"(\w+(?:<[^()]*>)?)\(", head[1].replace("(anonymous namespace)::", ""))
            name, code = short[1] if short else head[1], []
        elif part := INSTRUCTION.match(line):
            code.append((int(part[1], 16), part[2], part[3]))
    return {function: sorted(sizes) for function, sizes in sorted(found.items())}


def loops_of_function(code: list[tuple[int, str, str]]) -> list[list[int]]:
    at = {address: index for index, (address, _, _) in enumerate(code)}
    loops = []
    for end, (_, operation, operands) in enumerate(code):
        target = TARGET.search(operands) if operation.startswith(JUMPS) or operation == "b" else None
        begin = at.get(int(target[1], 16)) if target else None
        if begin is not None and begin <= end:
            loops.append((end - begin, begin, end))
    products = [index for index, (_, operation, _) in enumerate(code) if PRODUCT.fullmatch(operation)]
    around = set()
    for product in products:
        enclosing = [loop for loop in loops if loop[1] <= product <= loop[2]]
        around.update([min(enclosing)] if enclosing else [])
    return [[end - begin + 1, sum(begin <= p <= end for p in products)] for _, begin, end in sorted(around)]


def disassembler(build: Path) -> str:
    """objdump, of the same target as the compiler."""
    objdump = setting(build, "CMAKE_CXX_COMPILER").replace("g++", "objdump")
    return objdump if objdump.endswith("objdump") else "objdump"


def count(build: Path) -> dict[str, Loops]:
    counts = {}
    for kernel in KERNELS:
        file = build / f"CMakeFiles/bantamweight_kernels.dir/csrc/lowbit_linear/{kernel}.cc.o"
        command = [disassembler(build), "--disassemble", "--demangle", "--no-show-raw-insn", str(file)]
        loops = loops_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if loops:
            counts[kernel] = loops
    return counts


def compare(recorded: dict[str, Loops], counted: dict[str, Loops]) -> tuple[list[str], list[str]]:
    """A sentence for each function whose loops grew, and for each that is not there to be compared."""
    grown, other = [], []
    for kernel in sorted(recorded.keys() | counted.keys()):
        before, now = recorded.get(kernel, {}), counted.get(kernel, {})
        for function in sorted(before.keys() | now.keys()):
            old, new = before.get(function, []), now.get(function, [])
            sentence = f"{kernel} {function}: [instructions, products] of its loops were {old}, are {new}"
            if len(old) != len(new):
                other.append(sentence)
            elif any(n[0] > o[0] * (1 + SLACK) + 1 or n[1] > o[1] for o, n in zip(old, new, strict=True)):
                grown.append(sentence)
    return grown, other


def record(compiler: str, counted: dict[str, Loops]) -> None:
    everything = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    everything[compiler] = counted
    lines = json.dumps(everything, indent=1, sort_keys=True)
    lines = re.sub(r"(?<=[\[\d\],])\s+(?=[\[\d\]])", " ", lines)  # a function a line
    lines = re.sub(r"\[ | \]", lambda bracket: bracket[0].strip(), lines)
    with tempfile.NamedTemporaryFile("w", dir=RECORD.parent, delete=False) as file:
        file.write(lines + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, RECORD)


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions in the loops that multiply.")
    parser.add_argument("build", type=Path)
    parser.add_argument("--record", action="store_true", help="write the counts down instead of comparing them")
    arguments = parser.parse_args()
    compiler = " ".join(
        setting(arguments.build, f"CMAKE_{name}")
        for name in ("SYSTEM_PROCESSOR", "CXX_COMPILER_ID", "CXX_COMPILER_VERSION")
    )
    everything = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments.record:
        record(compiler, count(arguments.build))
        return
    if compiler not in everything:
        print(f"  instruction counts not compared: none are recorded for {compiler}")
        return
    if shutil.which(disassembler(arguments.build)) is None:
        print("  instruction counts not compared: there is no objdump; it comes with binutils")
        return
    counted = count(arguments.build)
    grown, other = compare(everything[compiler], counted)
    loops = sum(len(sizes) for kernel in counted.values() for sizes in kernel.values())
    print("\n".join(f"  not compared: {sentence}" for sentence in other), end="\n" if other else "")
    print("\n".join(grown) if grown else f"  instruction counts of {loops} loops are those recorded for {compiler}")
    if grown:
        sys.exit(f"if that is meant, record it: python {Path(__file__).name} {arguments.build} --record")


if __name__ == "__main__":
    main()
