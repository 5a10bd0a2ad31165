"""What every kind of stored weight can say of itself."""

from typing import Any

from torch import Tensor


class StoredWeight:
    """Base of stored weights ``[out, in]``: codes, one an element, and a grid that counts what is stored.

    A subclass is a dataclass with ``packed``, ``from_packed``, ``empty`` and ``dequantize``, see ``lqedu.runtime.kinds``.
    """

    codes: Tensor
    grid: Any

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: packed codes, scales, zero points."""
        return self.grid.nbytes(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points counted."""
        return self.grid.bits_per_weight(self.shape)
