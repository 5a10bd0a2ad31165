"""Compile what a wrapper would launch, for a GPU that is not there, and read the compiler's report.

The wrapper itself is called, on CPU tensors: Triton sees a driver that only knows the target, every launch stops after
compilation, and what was compiled is kept. A process that has TRITON_INTERPRET set cannot do this.

``python -m lqedu_kernels.bench.compiled`` prints what becomes of the kernels of chapter ``18-roofline`` on Hopper, as JSON.
"""

import contextlib
import json
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

    def loop(self) -> list[str]:
        """The machine instructions of the loop that multiplies: the shortest one that holds a tensor-core instruction."""
        lines = self.sass().splitlines()
        labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
        loops = []
        for i, line in enumerate(lines):
            match = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if match and labels.get(match[1], i) < i:
                body = [code[1] for text in lines[labels[match[1]] : i + 1] if (code := _INSTRUCTION.search(text))]
                if any("MMA" in code for code in body):
                    loops.append(body)
        return min(loops, key=len, default=[])


_INSTRUCTION = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)[.\s;]")


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


def _main() -> None:
    """For each kernel of the chapter and each number of rows, one object: registers, shared memory, products, instructions."""
    from lqedu_kernels.bench import steps

    n, k = 11008, 4096
    scale = torch.empty(k // steps.GROUP, n, dtype=torch.float16)
    rows = []
    for name, (_, pack) in steps.STEPS.items():
        packed = torch.empty(n * k // 2, dtype=torch.uint8).view(pack(torch.zeros(8, 128, dtype=torch.uint8)).dtype)
        for m in (16, 1024):
            with compiling_for((9, 0)) as found:
                steps.step_matmul(name, torch.empty(m, k, dtype=torch.float16), packed, scale, scale)
            (kernel,) = found
            columns, block, warps = steps.tile(name, m)[1:]
            body = kernel.loop()
            rows.append(
                {
                    "step": name, "m": m, "registers": kernel.registers, "spills": kernel.spills, "shared": kernel.shared,
                    "products": len(kernel.wgmma), "from_registers": kernel.wgmma_from_registers,
                    "older_products": len(kernel.mma), "instructions": len(body),
                    "per_weight": len(body) * 32 * warps / (columns * block), "warnings": len(kernel.warnings),
                }
            )  # fmt: skip
    print(json.dumps({"triton": triton.__version__, "kernels": rows}))


if __name__ == "__main__":
    _main()
