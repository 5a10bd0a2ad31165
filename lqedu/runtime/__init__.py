"""Running quantized models: layers that keep packed codes (``02-grids``) and a cache that does (``15-kv-cache``)."""

from typing import TYPE_CHECKING, Any

from lqedu.runtime.linear import QuantLinear, quantized_linears
from lqedu.runtime.packed import PackedLinear, to_kernels

if TYPE_CHECKING:
    from lqedu.runtime.kv_cache import PackedCache, quantize_kv

__all__ = ["PackedCache", "PackedLinear", "QuantLinear", "quantize_kv", "quantized_linears", "to_kernels"]


def __getattr__(name: str) -> Any:
    if name in ("PackedCache", "quantize_kv"):  # only they need transformers, which takes seconds to import
        from lqedu.runtime import kv_cache

        return getattr(kv_cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
