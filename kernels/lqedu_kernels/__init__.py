"""Triton kernels for the formats of *LLM Quantization, Step by Step*; usable without the ``lqedu`` package.

A family is a file, and reads in this order: the reference in plain PyTorch (the only definition of right), the layout with
its packing, launch configurations, the kernel, the function to call, which refuses what it cannot serve.

    w4a16          FP16 or BF16 activations, 4-bit weights, groups of 32, 64, 128 or per channel     18-roofline
    w8a8, w4a8     INT8 activations, 8- or 4-bit weights, sums in int32                              19-integer-gemm
    fp8            E4M3, scales of tensors, tokens and channels, or blocks of 128                    16-fp8
    hadamard       transforms of m 2^k elements, alone or with quantization behind                   20-hadamard-kv
    quantize       tokens to INT8, INT4 or E4M3, alone, behind RMSNorm, behind SiLU                  20-hadamard-kv
    kv_pages       a paged cache of KV4, KV8 or FP8: layout, append                                  20-hadamard-kv
    kv_attention   decode attention over it                                                          20-hadamard-kv
    steps16        RMSNorm, SiLU and RoPE between products that are not quantized                   21-serving
    kv16           a paged cache of 16-bit keys and values, append, decode attention                 21-serving
    tuning         launch configurations measured on an H100, shipped as data
    bench          python -m lqedu_kernels.bench: times beside peers; its notes say what bounds each kernel

``hopper_few``, ``hopper_w4`` and ``hopper_dense`` are twins in Gluon for Hopper and Triton 3.6, chosen by the functions above.

In kernels ``p_`` is a pointer (``d_`` a TMA descriptor), ``b_`` a block of values, ``o_`` offsets, ``m_`` a mask; a comment
gives a block's shape where it is loaded.

On a machine without an NVIDIA GPU, set ``TRITON_INTERPRET=1`` before Triton is imported: the same functions then take CPU
tensors and run in Triton's interpreter, slowly. Nothing is compiled, tuned or put on a device at import; a
kernel is compiled at its first call, in a configuration that is looked up, never searched.
"""

try:
    import triton
except ImportError as error:
    raise ImportError(
        "lqedu_kernels needs Triton 3.6 to 3.9, which is not installed here: pip install 'lqedu[gpu]' under Linux; without an NVIDIA GPU it "
        "interprets."
    ) from error
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(
        f"lqedu_kernels needs Triton 3.6 to 3.9, and this is {triton.__version__}: pip install -U torch 'lqedu[gpu]'."
    )

__version__ = "0.1.0"
