"""Bounds used by several tests, each derived once; tests hold no such literals of their own."""

#: float64 algebra on well-conditioned problems of a few hundred columns: condition number ~1e4 times 1e-16, with room.
FP64_IDENTITY = 1e-10
#: Fraction of codes that may differ between two orders of the same float32 sums: only weights within rounding error
#: of a tie flip (and feed their flip forward).
FP32_TIES = 1e-3
#: Largest difference of a dequantized weight between two float32 computations of the same scale and code: weights are
#: below 1, scales agree to a few units in the last place, codes are at most 15.
PEER_WEIGHT = 1e-6
#: Relative error of a layer's output when FP8 tensor cores form the sums: 2^-13 measured on an H200, for random numbers.
FP8_TENSOR_CORES = 2.0**-11
#: Largest difference of logits below 10 of a model of one or two blocks: sums of up to 100 products in float32, in two orders.
PEER_LOGITS = 1e-4
#: Largest error of a linear layer's outputs relative to the largest, for the same: 2^-24 times a few hundred products.
PEER_LAYER = 1e-5
