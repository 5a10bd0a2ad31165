"""A quantized weight: codes, scales, zero points, and the grid that gives them meaning.

Derived in chapter ``02-grids``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqedu.errors import GridError
from lqedu.formats.integer import IntGrid
from lqedu.formats.packing import pack, packed_width, unpack
from lqedu.formats.stored import StoredWeight


@dataclass(frozen=True)
class QTensor(StoredWeight):
    """Codes ``[out, in]`` with the scales and zero points that decode them: ``w_hat = s * (q - z)``.

    >>> w = torch.tensor([[-1.0, -0.5, 0.25, 0.5]])
    >>> grid = IntGrid(bits=4)
    >>> scale, zero = grid.fit(w)
    >>> q = QTensor(grid.encode(w, scale, zero), scale, zero, grid)
    >>> q.codes, q.zero
    (tensor([[ 0,  5, 13, 15]], dtype=torch.uint8), tensor([[10]], dtype=torch.uint8))
    >>> q.nbytes, q.bits_per_weight        # 2 bytes of codes, 2 of scale, 1 of zero point, for 4 weights
    (5, 10.0)

    Attributes:
        codes: int8 (symmetric) or uint8, ``[out, in]``, one code an element; :meth:`packed` gives the stored bytes.
        scale: ``grid.scale_shape(codes.shape)``, in ``grid.scale_dtype``.
        zero: of the same shape in ``grid.zero_dtype``, ``None`` for a symmetric grid.
        grid: the grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: IntGrid

    def __post_init__(self) -> None:
        want = self.grid.scale_shape(tuple(self.codes.shape))
        if self.codes.dtype != self.grid.code_dtype:
            raise GridError(f"codes of this grid are {self.grid.code_dtype}, got {self.codes.dtype}")
        if tuple(self.scale.shape) != want or self.scale.dtype != self.grid.scale_dtype:
            raise GridError(
                f"scales of this grid have shape {want} and dtype {self.grid.scale_dtype}, "
                f"got {tuple(self.scale.shape)} and {self.scale.dtype}"
            )
        if (self.zero is None) != self.grid.symmetric:
            raise GridError("an asymmetric grid has zero points and a symmetric one has none")
        if self.zero is not None and (tuple(self.zero.shape) != want or self.zero.dtype != self.grid.zero_dtype):
            raise GridError(
                f"zero points of this grid have shape {want} and dtype {self.grid.zero_dtype}, "
                f"got {tuple(self.zero.shape)} and {self.zero.dtype}"
            )

    @classmethod
    def empty(cls, grid: IntGrid, shape: tuple[int, int]) -> "QTensor":
        """A weight of zeros: the frame that a checkpoint's tensors are loaded into."""
        scale = torch.ones(grid.scale_shape(shape), dtype=grid.scale_dtype)
        zero = None if grid.symmetric else torch.zeros(grid.scale_shape(shape), dtype=grid.zero_dtype)
        return cls(torch.zeros(shape, dtype=grid.code_dtype), scale, zero, grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``w_hat = s * (q - z)``, ``[out, in]``."""
        return self.grid.decode(self.codes, self.scale, self.zero, dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors: ``codes`` (uint8 bit stream), ``scale`` and, if asymmetric, ``zero``.

        Integer zero points are a uint8 bit stream too; float ones stay as they are.

        Their sizes add up to ``nbytes``. :meth:`from_packed` is the inverse.
        """
        unsigned = (self.codes.to(torch.int16) - self.grid.code_min).to(torch.uint8)
        tensors = {"codes": pack(unsigned, self.grid.bits), "scale": self.scale.contiguous()}
        if self.zero is None:
            return tensors
        zero = self.zero.contiguous() if self.grid.zero_point == "float" else pack(self.zero, self.grid.bits)
        return tensors | {"zero": zero}

    @classmethod
    def from_packed(cls, tensors: dict[str, Tensor], grid: IntGrid, shape: tuple[int, int]) -> "QTensor":
        """Inverse of :meth:`packed`.

        Raises:
            GridError: tensors whose names, dtypes or shapes do not belong to this grid and shape.
        """
        want = {"codes", "scale"} | (set() if grid.symmetric else {"zero"})
        if set(tensors) != want:
            raise GridError(f"a packed weight of this grid has the tensors {sorted(want)}, got {sorted(tensors)}")
        rows, columns = shape
        if tuple(tensors["codes"].shape) != (rows, packed_width(columns, grid.bits)):
            raise GridError(f"packed codes of shape {tuple(tensors['codes'].shape)} do not fit a weight {list(shape)}")
        unsigned = unpack(tensors["codes"], grid.bits, columns)
        codes = (unsigned.to(torch.int16) + grid.code_min).to(grid.code_dtype)
        zero = tensors.get("zero")
        if zero is not None and grid.zero_point == "integer":
            zero = unpack(zero, grid.bits, grid.scale_shape(shape)[1])
        return cls(codes, tensors["scale"], zero, grid)
