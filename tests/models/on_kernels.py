"""Every method that has a kernel, on models that every kernel reads, for tests of what runs packed."""

from lqedu.methods import AWQ, FP8, GPTQ, HQQ, QQQ, RTN, Method, QoQ, QuaRot, SmoothQuant, SpinQuant

#: Sizes that every kernel reads: groups of 64, heads of 32.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
METHODS: dict[str, tuple[Method, str]] = {
    "rtn": (RTN(group_size=32), "w4a16"),
    "rtn symmetric": (RTN(group_size=64, symmetric=True), "w4a16"),
    "rtn channel": (RTN(group_size=None), "w4a16"),
    "rtn w8a8": (RTN(bits=8, group_size=None, symmetric=True, activation_bits=8), "w8a8"),
    "gptq": (GPTQ(group_size=64), "w4a16"),
    "awq": (AWQ(group_size=64), "w4a16"),
    "hqq": (HQQ(group_size=64), "w4a16"),
    "smoothquant": (SmoothQuant(), "w8a8"),
    "smoothquant static": (SmoothQuant(granularity="tensor", activation="static"), "w8a8"),
    "smoothquant tensor": (SmoothQuant(granularity="tensor", activation="tensor"), "w8a8"),
    "quarot": (QuaRot(), "w4a8"),
    "quarot w8a8": (QuaRot(bits=8, activation_bits=8, kv_bits=8), "w8a8"),
    "spinquant": (SpinQuant(steps=2, windows_per_step=2), "w4a8"),
    "spinquant w8a8": (SpinQuant(steps=1, windows_per_step=2, bits=8, activation_bits=8), "w8a8"),
    "qqq": (QQQ(group_size=64), "w4a8"),
    "qqq channel": (QQQ(group_size=None), "w4a8"),
    "qoq": (QoQ(group_size=64), "w4a8"),
    "qoq channel": (QoQ(group_size=None), "w4a8"),
    "fp8": (FP8(), "fp8"),
    "fp8 tensor": (FP8(granularity="tensor", activation="static"), "fp8"),
    "fp8 block": (FP8(granularity="block", activation="group"), "fp8"),
}  # fmt: skip
#: A code of one of 128 features of one of 32 tokens that moves by a step, relative to the norm of all, and as much again for what
#: it moves in later layers. A step is 2^-3 of an E4M3 number, 2^-7 of the largest INT8, 2^-3 of the largest INT4 at most.
#: W4A16 has no codes of activations: its sums alone differ, by their order.
FLIP = {
    name: 2 * step / (128 * 32) ** 0.5
    for name, step in {"w4a16": 2**-10, "w8a8": 2**-7, "w4a8": 2**-3, "fp8": 2**-3}.items()
}
