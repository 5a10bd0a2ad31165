"""The matrices of Llama-2-7B and Llama-3-8B, ``[out, in]``, and the numbers of rows at which they are measured."""

SHAPES: dict[str, tuple[int, int]] = {
    "Llama-2-7B o": (4096, 4096),
    "Llama-2-7B qkv": (12288, 4096),
    "Llama-2-7B gate": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B gate": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
}
ROWS = (1, 16, 64, 256, 1024, 4096)
