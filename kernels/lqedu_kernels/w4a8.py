"""W4A8: INT8 activations times 4-bit weights, summed in INT32; scales enter after the sum.

The contract, with ``x`` int8 ``[M, K]`` and one scale a token, ``w8`` int8 ``[N, K]`` and one scale a channel:

    y[m, n] = x_scale[m] · (scale[n] · Σ_k x[m, k] w8[n, k])  (+ bias[n]),      fp16 or bf16

How 4 bits ``q`` become ``w8`` while a program loads them depends on ``groups``:

    groups       nibble        w8                                              format
    ``None``     signed q      q, in the registers 16 q                        QQQ per channel; QoQ per channel with zero
    int16        unsigned q    (q - z) s = ((q s + a) ^ 0x80),  a = 128 - z s  QoQ, integer group scales
    float16      q + 8         round_half_even(q r)                            QQQ, float16 ratio of scales

Tensors (K/g groups of g = 64 or 128 inputs):

    codes    uint8   [N, ceil(K/128) * 64]   block of 128 inputs: byte j holds k = j low, k = j + 64 high
    scale    float16 or float32 [N]          of the channel, as stored (the 16 of 16 q is shifted out of the sum)
    groups   int16   [K/g, N]                low byte s (unsigned), high byte a - 1 (signed; a is in [-112, 128])
    groups   float16 [K/g, N]                r = s_group / s_channel
    zero     int32   [N]                     per channel only: of the *signed* codes (z - 8); needs x_sum int32 [M] = Σ_k x

One packed word (four bytes) and what one instruction each makes of it:

    bits    31 .. 28   27 .. 24   ...   7 .. 4    3 .. 0
    k       j+67       j+3        ...   j+64      j
"""
