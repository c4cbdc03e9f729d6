"""Instructions of the AArch64 inner loops, read from their disassembly: no ARM machine is needed.

    sh tests/csrc/run.sh aarch64        # cross-compiles the kernels into build/aarch64
    python bench/arm_instructions.py [--build build/aarch64] [--peers OBJECT ...] [--json]

For each width, instruction set and number of rows: instructions per 256 multiply-adds of a weight with an activation in
the loop over k, by class (products, loads, masks and shifts, others); then the same with everything that is done once a
group of 32 or 128 k counted in (conversion, scale, zero, bookkeeping), along the shortest way from the end of that loop
through a conversion to float and back to its begin. A tile of several rows divides its loads and masks among them, so
the same weight costs less a row. Ternary weights run the loop of 2 bits.

--peers takes object files of other kernels whose names say their form as Arm's KleidiAI names its own,
`.._qai8dxp<mr>x<kr>_qs<i or u><bits>c<xp or 32p>.._<rows>x<channels>.._neon_<dotprod or i8mm>..`, and prints each of
them and, beside ours, the one with the fewest instructions of the same width and instruction set. Packing the
activations, which KleidiAI does in a kernel of its own and ours does not need, is not counted.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "csrc"))

from instruction_counts import FUNCTION, INSTRUCTION, TARGET  # noqa: E402  # pyright: ignore[reportMissingImports]

OBJDUMP = "aarch64-linux-gnu-objdump"
MACS = {"dot": 16, "mmla": 32}  # of one instruction: 4 sums of 4 products; 4 sums of 8
PRODUCT = re.compile(r"[su]s?(dot|mmla)")
LOAD = re.compile(r"ld(r|p|ur|1|1r|2|nf1)")
MASK = re.compile(r"and|bic|orr|eor|shl|ushr|sshr|sri|sli|tbl|ushl")
OURS = re.compile(r"tile<.*?(\w+), (\d), (\d)>")
PEER = re.compile(r"qai8dxp\d+x\d_qs[iu](\d)c(xp|32p)\w*?_(\d+)x(\d+)(?:x\d+)?_neon_(dotprod|i8mm)")

Code = list[tuple[str, str]]  # operation and operands of each instruction


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A kernel's loop over k; counts are per 256 multiply-adds."""

    name: str
    bits: int
    isa: str
    rows: int
    product: float
    load: float
    mask: float
    other: float
    group_32: float | None
    group_128: float | None

    @property
    def total(self) -> float:
        return self.product + self.load + self.mask + self.other


def functions(objects: list[Path]) -> dict[str, tuple[Code, dict[int, int]]]:
    """Each function's instructions, and for each jump among them where it goes."""
    found = {}
    for file in objects:
        command = [OBJDUMP, "--disassemble", "--demangle", "--no-show-raw-insn", str(file)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        name, lines = "", []
        for line in [*listing.splitlines(), "0 <end>:"]:
            # Labels of assembly sources are no functions of their own.
            if (head := FUNCTION.match(line)) and not re.match(r"label|\w*[A-Z]\w*$", head[1]):
                at = {address: i for i, (address, _, _) in enumerate(lines)}
                jumps = {
                    i: at[int(target[1], 16)]
                    for i, (_, operation, operands) in enumerate(lines)
                    if operation.startswith(("b", "cb", "tb")) and operation not in ("bl", "bic", "bfi")
                    if (target := TARGET.search(operands)) and int(target[1], 16) in at
                }
                found[f"{file.name}: {name}"] = ([line[1:] for line in lines], jumps)
                name, lines = head[1], []
            elif part := INSTRUCTION.match(line):
                lines.append((int(part[1], 16), part[2], part[3]))
    return found


def class_of(operation: str, operands: str) -> str:
    if product := PRODUCT.fullmatch(operation):
        return product[1]
    if LOAD.fullmatch(operation):
        return "load"
    return "mask" if operands.startswith("v") and MASK.fullmatch(operation) else "other"


def steps(code: Code, jumps: dict[int, int], start: int, goals: set[int], closed: range) -> dict[int, int]:
    """The fewest instructions from `start` to each goal that can be reached outside `closed`, goal excluded."""
    found, edge, length, seen = {}, {start}, 0, {start}
    while edge:
        found.update({i: length for i in edge & goals if i not in found})
        onward = set()
        for i in edge - set(closed):
            if code[i][0] not in ("b", "ret", "br") and i + 1 < len(code):
                onward.add(i + 1)
            if i in jumps:
                onward.add(jumps[i])
        edge, length = onward - seen, length + 1
        seen |= edge
    return found


def once_a_group(code: Code, jumps: dict[int, int], begin: int, end: int) -> int | None:
    """Instructions from the end of a loop through a conversion to float and back to the begin, or None."""
    loop = range(begin, end + 1)
    conversions = {i for i, (operation, _) in enumerate(code) if operation == "scvtf"}
    ways = []
    for middle, there in steps(code, jumps, end + 1, conversions, loop).items():
        back = steps(code, jumps, middle, {begin}, loop)
        ways += [there + back[begin]] if begin in back else []
    return min(ways, default=None)


def best_loop(
    name: str, code: Code, jumps: dict[int, int], bits: int, isa: str, rows: int, channels: int, *, groups: bool = True
) -> Loop:
    """The loop with the fewest instructions a multiply-add."""
    loops = []
    for end, begin in jumps.items():
        kinds = [class_of(*line) for line in code[begin : end + 1]]
        macs = sum(MACS.get(kind, 0) for kind in kinds)
        if begin <= end and macs:
            loops.append((len(kinds) / macs, begin, end, kinds, macs))
    if not loops:
        raise SystemExit(f"{name} has no loop of products")
    _, begin, end, kinds, macs = min(loops)
    part = {kind: 256 / macs * kinds.count(kind) for kind in (*MACS, "load", "mask", "other")}
    between = once_a_group(code, jumps, begin, end) if groups else None

    def with_groups(size: int) -> float | None:
        once = None if between is None else between / (rows * channels * size)
        return None if once is None else 256 * (len(kinds) / macs + once)

    return Loop(
        name=name,
        bits=bits,
        isa=isa,
        rows=rows,
        product=part["dot"] + part["mmla"],
        load=part["load"],
        mask=part["mask"],
        other=part["other"],
        group_32=with_groups(32),
        group_128=with_groups(128),
    )


def our_loops(build: Path) -> list[Loop]:
    folder = build / "CMakeFiles" / "bantamweight_kernels.dir" / "csrc" / "lowbit_linear"
    loops = []
    for isa in ("dotprod", "i8mm"):
        file = folder / f"neon_{isa}.cc.o"
        if not file.exists():
            raise SystemExit(f"there is no {file}; make it with sh tests/csrc/run.sh aarch64, or pass --build")
        for name, (code, jumps) in functions([file]).items():
            form = OURS.search(name.replace("(anonymous namespace)::", ""))
            if form and form[3] in "14":
                loops.append(best_loop("ours", code, jumps, int(form[2]), isa, int(form[3]), 16))
    return sorted(loops, key=lambda loop: (loop.isa, loop.rows, loop.bits))


def peer_loops(objects: list[Path]) -> list[Loop]:
    loops = []
    for name, (code, jumps) in functions(objects).items():
        form = PEER.search(name)
        if form and any("dot" in line[0] or "mmla" in line[0] for line in code):
            bits, groups, rows, channels, isa = form.groups()
            short = f"qs{bits}c{groups} {rows}x{channels} {name[form.end(4) : form.start(5) - 6].strip('_')}".strip()
            in_groups = groups == "32p"
            loops.append(best_loop(short, code, jumps, int(bits), isa, int(rows), int(channels), groups=in_groups))
    return sorted(loops, key=lambda loop: (loop.isa, loop.rows > 1, loop.bits, loop.total))


def rival(loop: Loop, peers: list[Loop], group: bool) -> Loop | None:
    """The peer of that width and instruction set (one row: of any) with the fewest instructions."""
    of_kind = [p for p in peers if p.bits == loop.bits and ("32p" in p.name) == group]
    same = [p for p in of_kind if (p.rows == 1 if loop.rows == 1 else p.rows > 1 and p.isa == loop.isa)]
    return min(same, key=lambda p: (p.group_32 or p.total) if group else p.total, default=None)


def row_of(loop: Loop) -> str:
    group = "".join(f"{'' if value is None else f'{value:.1f}':>7}" for value in (loop.group_32, loop.group_128))
    parts = "".join(f"{value:7.1f}" for value in (loop.product, loop.load, loop.mask, loop.other, loop.total))
    return f"{loop.isa:<8}{loop.bits:>4}{loop.rows:>5}{parts}{group}"


def show(ours: list[Loop], peers: list[Loop]) -> None:
    head = "isa     bits rows   dots  loads  masks  other  total    g32   g128"
    print(
        "instructions per 256 multiply-adds\n\n"
        + head
        + ("   peer / ours: a scale a channel; groups of 32" * bool(peers))
    )
    for loop in ours:
        beside = ""
        for group in (False, True):
            if peer := rival(loop, peers, group):
                own, other = (loop.group_32, peer.group_32) if group else (loop.total, peer.total)
                if own is not None and other is not None:
                    beside += f"   {other / own:.2f} ({peer.name})"
        print(row_of(loop) + beside)
    if peers:
        print("\n" + head + "   peer")
        print("\n".join(f"{row_of(loop)}   {loop.name}" for loop in peers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "aarch64", help="a CMake build for AArch64")
    parser.add_argument("--peers", type=Path, nargs="+", default=[], help="object files of other kernels")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if shutil.which(OBJDUMP) is None:
        raise SystemExit(f"{OBJDUMP} is not installed; it comes with binutils-aarch64-linux-gnu")
    ours, peers = our_loops(args.build), peer_loops(args.peers)
    if args.json:
        records = {"ours": ours, "peers": peers}
        print(json.dumps({key: [asdict(loop) for loop in loops] for key, loops in records.items()}, indent=2))
    else:
        show(ours, peers)


if __name__ == "__main__":
    main()
