"""Reads what the compilers made of the CUDA kernels, and says where it is not what was meant. Needs no GPU.

    python tools/check_sass.py                       # builds the plugin, or takes it from the cache
    python tools/check_sass.py LIBRARY BUILD_LOG     # looks at these
    python tools/check_sass.py --ready               # exit code 0 if cuobjdump and nvdisasm are here

From the report of `-Xptxas -v`: registers spilled to memory; wgmma serialised (warnings C75xx). From machine
code, by cuobjdump: kernels that should multiply on tensor cores and do not; local memory in their main loops.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Kernels whose names say that they multiply matrices.
MULTIPLIES = re.compile(r"attention_kernel|gemm_kernel")


@dataclass
class Kernel:
    """One entry of the compiler's report."""

    name: str
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


@dataclass
class Code:
    """One function's machine code: (address, instruction) in order."""

    name: str
    instructions: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[set[int]]:
        """The innermost loops that multiply: the indices of their instructions."""
        blocks, after = self._blocks()
        loops: dict[int, set[int]] = {}  # header: blocks; a loop may have several edges back
        dominators = _dominators(after)
        before = [[] for _ in after]
        for block, targets in enumerate(after):
            for target in targets:
                before[target].append(block)
        for block, targets in enumerate(after):
            for header in targets:
                if header in dominators[block]:
                    body, todo = loops.setdefault(header, {header}), [block]
                    while todo:
                        inside = todo.pop()
                        if inside not in body:
                            body.add(inside)
                            todo += before[inside]
        multiplies = [any(has_hgmma(self.instructions[i][1]) for i in block) for block in blocks]
        found = [body for body in loops.values() if any(multiplies[block] for block in body)]
        inner = [body for body in found if not any(other < body for other in found)]
        return [{i for block in body for i in blocks[block]} for body in inner]

    def _blocks(self) -> tuple[list[range], list[list[int]]]:
        """Basic blocks, as ranges of instructions, and the blocks that may follow each."""
        index = {address: i for i, (address, _) in enumerate(self.instructions)}
        jumps = {}  # instruction: its target (or None), and whether the next one may follow
        for i, (_, text) in enumerate(self.instructions):
            if found := re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text):
                jumps[i] = (index.get(int(found[1], 16)), re.match(r"BRA\s+0x", text) is None)
            elif re.search(r"\b(EXIT|RET\S*|BRX\S*|JMX\S*)(\s|$)", text):
                jumps[i] = (None, text.startswith("@"))
        first = {0, *(target for target, _ in jumps.values() if target is not None)}
        first |= {i + 1 for i in jumps if i + 1 < len(self.instructions)}
        starts = sorted(first)
        blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(self.instructions)], strict=True)]
        number = {start: n for n, start in enumerate(starts)}
        after = []
        for block in blocks:
            target, falls = jumps.get(block[-1], (None, True))
            targets = [] if target is None else [number[target]]
            if falls and block[-1] + 1 in number:
                targets.append(number[block[-1] + 1])
            after.append(targets)
        return blocks, after


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """For each block that block 0 reaches, the blocks on every way to it; for others, none."""
    order, seen, stack = [], {0}, [(0, iter(after[0]))]
    while stack:
        block, targets = stack[-1]
        for target in targets:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(after[target])))
                break
        else:
            order.append(block)
            stack.pop()
    order.reverse()
    before = [[] for _ in after]
    for block in order:
        for target in after[block]:
            before[target].append(block)
    everything = set(order)
    dominators = [set(everything) if block in everything else set() for block in range(len(after))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(dominators[b] for b in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def has_hgmma(text: str) -> bool:
    return bool(re.search(r"\b[HIQ]GMMA\b", text))


def read_report(log: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of a compiler's report, and its lines that warn of serialised wgmma."""
    kernels, warnings = [], []
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append(Kernel(found[1]))
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels:
                kernels[-1].spill_stores += int(found[1])
                kernels[-1].spill_loads += int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            if kernels:
                kernels[-1].registers = int(found[1])
        if re.search(r"\bC75\d\d\b", line):
            warnings.append(line.strip())
    return kernels, warnings


def read_code(lines: Iterable[str]) -> Iterator[Code]:
    """The functions in the output of `cuobjdump --dump-sass`."""
    code = None
    for line in lines:
        if found := re.search(r"Function : (\S+)", line):
            if code is not None:
                yield code
            code = Code(found[1])
        elif code is not None and (found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)):
            code.instructions.append((int(found[1], 16), found[2]))
    if code is not None:
        yield code


def faults_of_report(log: str) -> list[str]:
    kernels, warnings = read_report(log)
    faults = [f"serialised wgmma: {pretty(line)}" for line in dict.fromkeys(warnings)]
    if not kernels:
        faults.append("the compiler's report names no kernel: was it made with -Xptxas -v?")
    for kernel in kernels:
        if kernel.spill_stores or kernel.spill_loads:
            spilled = f"{kernel.spill_stores} bytes stored and {kernel.spill_loads} loaded"
            faults.append(f"{pretty(kernel.name)}: spills, {spilled}")
    return faults


def faults_of_code(functions: Iterable[Code]) -> list[str]:
    faults, multiplying = [], 0
    for code in functions:
        multiplies = any(has_hgmma(text) for _, text in code.instructions)
        multiplying += multiplies
        if MULTIPLIES.search(code.name) and not multiplies:
            faults.append(f"{pretty(code.name)}: no HGMMA, so its products are not on tensor cores")
        if not multiplies:
            continue
        loops = code.loops()
        if not loops:
            faults.append(f"{pretty(code.name)}: no loop around its HGMMA was found")
        local = [
            f"{address:#x} {text}"
            for loop in loops
            for address, text in (code.instructions[i] for i in sorted(loop))
            if re.search(r"\b(LDL|STL)\b", text)
        ]
        if local:
            faults.append(
                f"{pretty(code.name)}: {len(local)} accesses to local memory in its main loops: "
                f"{'; '.join(local[:4])}"
            )
    if not multiplying:
        faults.append("no kernel has HGMMA")
    return faults


def pretty(name: str) -> str:
    """Names in `name` as C++ writes them, where c++filt is there to tell."""
    if not shutil.which("c++filt"):
        return name
    return subprocess.run(["c++filt"], input=name, capture_output=True, text=True, check=True).stdout.strip()


def tool_folders() -> list[str]:
    """Where cuobjdump and nvdisasm may be: PATH, CUDA's toolkit, PyPI's packages."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    folders += [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    spec = importlib.util.find_spec("nvidia")
    folders += [f"{folder}/cu13/bin" for folder in (spec.submodule_search_locations or [])] if spec else []
    return folders


def has_disassembler() -> bool:
    path = os.pathsep.join(tool_folders())
    return all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm"))


def disassemble(library: Path) -> list[Code]:
    """The library's machine code. RuntimeError where there is no cuobjdump."""
    if not has_disassembler():
        raise RuntimeError(
            "no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    environment = {**os.environ, "PATH": os.pathsep.join(tool_folders())}
    command = [shutil.which("cuobjdump", path=environment["PATH"]), "--dump-sass", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        functions = list(read_code(process.stdout))
    if process.returncode != 0:
        raise RuntimeError(f"cuobjdump failed with exit code {process.returncode}")
    return functions


def check(library: Path, log: str) -> int:
    """Prints a line a kernel and a line a fault; the number of faults."""
    functions = {code.name: code for code in disassemble(library)}
    faults = faults_of_report(log) + faults_of_code(functions.values())
    for kernel in read_report(log)[0]:
        code = functions.get(kernel.name)
        hgmma = sum(has_hgmma(text) for _, text in code.instructions) if code else 0
        loops = len(code.loops()) if hgmma else 0
        counts = f"{kernel.registers:4} registers {hgmma:4} HGMMA {loops:2} main loops"
        print(f"{counts}  {pretty(kernel.name)}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(functions)} functions, {len(faults)} faults")
    return len(faults)


def main(arguments: list[str]) -> int:
    if arguments == ["--ready"]:
        return not has_disassembler()
    if len(arguments) == 2:
        return check(Path(arguments[0]), Path(arguments[1]).read_text(encoding="utf-8")) > 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    from flashomni.jit import build, sources, toolkit

    library = build.build(sources.find(), toolkit.find())
    return check(library, (library.parent / build.LOG).read_text(encoding="utf-8")) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
