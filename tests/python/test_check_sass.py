"""tools/check_sass.py: what it reads in reports and machine code, and on small kernels where nvcc is here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from flashomni.jit import toolkit

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("check_sass", ROOT / "tools" / "check_sass.py")
check_sass = sys.modules["check_sass"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_sass)

REPORT = """\
ptxas info    : Compiling entry function 'clean' for 'sm_90a'
ptxas info    : Function properties for clean
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function 'spilling' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers
"""

# A wait out of line jumps back into the loop from the end of the function, as the compiler lays it out.
CODE = """\
\t\tFunction : attention_kernel
        /*0000*/                   STL [R1], R2 ;              /* 0x0 */
                                                               /* 0x0 */
        /*0010*/                   SYNCS.PHASECHK R4 ;         /* 0x0 */
        /*0020*/              @!P0 BRA 0x90 ;                  /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;  /* 0x0 */
        /*0040*/               {inside} ;                      /* 0x0 */
        /*0050*/               @P1 BRA 0x10 ;                  /* 0x0 */
        /*0060*/                   LDL R2, [R1] ;              /* 0x0 */
        /*0070*/               @P2 BRA 0x0 ;                   /* 0x0 */
        /*0080*/                   EXIT ;                      /* 0x0 */
        /*0090*/                   SYNCS.PHASECHK R4 ;         /* 0x0 */
        /*00a0*/              @!P0 BRA 0x90 ;                  /* 0x0 */
        /*00b0*/                   BRA 0x30 ;                  /* 0x0 */
"""


def code(inside: str = "FADD R1, R2, R3", name: str = "attention_kernel") -> list:
    return list(
        check_sass.read_code(CODE.format(inside=inside).replace("attention_kernel", name).splitlines())
    )


def test_spills_are_told_by_kernel():
    (fault,) = check_sass.faults_of_report(REPORT)
    assert fault == "spilling: spills, 8 bytes stored and 12 loaded"
    kernels, _ = check_sass.read_report(REPORT)
    assert [(kernel.name, kernel.registers) for kernel in kernels] == [("clean", 40), ("spilling", 168)]


def test_serialised_wgmma_is_told():
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert any("C7510" in fault for fault in check_sass.faults_of_report(REPORT + line))
    assert "names no kernel" in check_sass.faults_of_report("")[0]


def test_the_main_loop_is_the_innermost_and_holds_its_waits():
    (function,) = code()
    (loop,) = function.loops()
    addresses = {function.instructions[i][0] for i in loop}
    assert addresses == {0x10, 0x20, 0x30, 0x40, 0x50, 0x90, 0xA0, 0xB0}
    assert check_sass.faults_of_code([function]) == []


@pytest.mark.parametrize("access", ["LDL R13, [R1+0x10]", "STL.64 [R1], R4", "@P3 LDL.LU R1, [R1]"])
def test_local_memory_in_the_main_loop_is_a_fault(access):
    (fault,) = check_sass.faults_of_code(code(access))
    assert "1 accesses to local memory" in fault and f"0x40 {access}" in fault


def test_products_off_the_tensor_cores_are_a_fault():
    text = CODE.format(inside="FADD R1, R2, R3").replace("HGMMA.64x64x16.F32.BF16", "FFMA")
    faults = check_sass.faults_of_code(check_sass.read_code(text.splitlines()))
    assert faults == [
        "attention_kernel: no HGMMA, so its products are not on tensor cores",
        "no kernel has HGMMA",
    ]


KERNEL = """\
// wgmma over a descriptor that means nothing: it is compiled, never run.
extern "C" __global__ void __launch_bounds__(128)
    {name}_attention_kernel(float* out, const int* steps, int n) {{
  float a = 0, b = 0, c = 0, d = 0;
  {before}
  for (int i = 0; i < n; ++i) {{
    unsigned long long at = steps[i];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{{%0, %1, %2, %3}}, %4, %4, 1, 1, 1, 0, 0;"
                 : "+f"(a), "+f"(b), "+f"(c), "+f"(d) : "l"(at));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    {inside}
  }}
  out[threadIdx.x] = a + b + c + d {after};
}}
"""
GOOD = KERNEL.format(name="good", before="", inside="", after="")
# An array that is indexed at run time has no registers.
LOCAL = KERNEL.format(
    name="local",
    before="float kept[32]; for (int i = 0; i < 32; ++i) kept[i] = out[i];",
    inside="kept[steps[i] & 31] += a;",
    after="+ kept[n & 31]",
)


@pytest.mark.parametrize(("source", "faulty"), [(GOOD, False), (LOCAL, True)])
def test_small_kernels(tmp_path, source, faulty):
    try:
        tools = toolkit.find()
    except toolkit.ToolkitError as error:
        pytest.skip(str(error))
    if not check_sass.has_disassembler():
        pytest.skip("no cuobjdump and nvdisasm")
    (tmp_path / "kernel.cu").write_text(source)
    options = ["--options-file", str(ROOT / "src/cuda/sm90/nvcc.options")]
    command = [*tools.command, *options, "-cubin", "-o", "kernel.cubin", "kernel.cu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    faults = check_sass.faults_of_code(check_sass.disassemble(tmp_path / "kernel.cubin"))
    if faulty:
        assert any("local memory in its main loops" in fault for fault in faults), faults
    else:
        assert faults + check_sass.faults_of_report(log) == []
