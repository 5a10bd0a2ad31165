"""Compile what a wrapper would launch, for a GPU that is not there, and read the compiler's report.

The wrapper itself is called, on CPU tensors: Triton sees a driver that only knows the target, every launch stops after
compilation, and what was compiled is kept. So the tests compile exactly the configurations that ship. A process that has
TRITON_INTERPRET set cannot do this.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

NAMES = {(8, 0): "NVIDIA A100", (8, 9): "NVIDIA L40S", (9, 0): "NVIDIA H100 80GB HBM3"}
PROCESSORS = {(8, 0): 108, (8, 9): 142, (9, 0): 132}
#: Shared memory a block may use, in bytes.
SHARED = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448}


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it."""

    name: str
    ptx: str
    cubin: bytes
    shared: int  #: bytes of shared memory
    report: str  #: what ``ptxas -v`` says

    @property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.report).group(1))

    @property
    def spills(self) -> int:
        """Bytes stored to and loaded from local memory."""
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.report)
        return int(found.group(1)) + int(found.group(2))

    @property
    def warnings(self) -> list[str]:
        """Performance warnings (C7510: wgmma serialized, and its neighbours)."""
        return [line for line in self.report.splitlines() if "wgmma" in line or "C75" in line]

    @property
    def wgmma(self) -> list[str]:
        """The warpgroup products, one a line of PTX, without the common prefix."""
        return re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", self.ptx)

    @property
    def wgmma_from_registers(self) -> int:
        """How many of them read their first operand from registers."""
        return len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", self.ptx))

    @property
    def mma(self) -> list[str]:
        return re.findall(r"(?<!wg)mma\.sync\.aligned\.([\w.]+)", self.ptx)

    def sass(self) -> str:
        """The machine code, disassembled."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            return subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True).stdout


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _report(ptx: str, capability: tuple[int, int]) -> str:
    newer = Path(_tool("ptxas-blackwell"))
    tool = str(newer) if newer.exists() and triton.__version__ >= "3.9" else _tool("ptxas")
    arch = f"sm_{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return done.stderr


class _AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # one cache of compiled kernels a target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> object:
        return torch.cuda


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Compiled]]:
    """Inside, calls of wrappers on CPU tensors compile and return without running; the list fills with the kernels."""
    from lqedu_kernels import _tensors

    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool = False, **kwargs: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        found.append(
            Compiled(self.fn.__name__, ptx, kernel.asm["cubin"], kernel.metadata.shared, _report(ptx, capability))
        )
        return kernel

    JITFunction.run = compile_only
    _tensors.assumed = _tensors.Target(NAMES[capability], capability, PROCESSORS[capability])
    driver.set_active(_AbsentGPU(capability))
    try:
        yield found
    finally:
        JITFunction.run = run
        _tensors.assumed = None
