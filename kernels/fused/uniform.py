"""A uniform number from (key, position) by splitmix64 (Steele et al. 2014), to the bit as reference.py.

There the arithmetic is on signed 64-bit integers, here on unsigned ones: a right shift is a logical one.
"""
import torch
import triton
import triton.language as tl


@triton.jit
def _uniform(key, position, out, B, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(key + i, i < B, 0).to(tl.uint64)
    p = tl.load(position + i, i < B, 0).to(tl.uint64)
    x = k + (p + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    tl.store(out + i, (x >> 40).to(tl.float32) * 5.9604644775390625e-08, i < B)  # 2**-24


def uniform(key, position):
    """As `reference.uniform`."""
    B = len(key)
    out = torch.empty(B, device=key.device)
    _uniform[(triton.cdiv(B, 128),)](key.contiguous(), position.contiguous(), out, B, 128, num_warps=1)
    return out
