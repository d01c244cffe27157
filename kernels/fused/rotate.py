"""Rotary embedding of queries and keys (Su et al. 2021), with Qwen3's RMSNorm of each head before it.

    n = x / sqrt(mean(x^2) + eps) * w        (Qwen3 only, over the D values of a head)
    [a, b] = n, split in the middle          out = [a cos - b sin, b cos + a sin]

Gradient: a rotation's transpose is the rotation back, so the same kernel runs with the angle's sign turned,
and the norm's gradient is add_norm.py's over rows of D.

Bytes for a token of H query and K key heads in bfloat16: reads and writes each value once, 4 (H + K) D; norm
and rotation apart, with a float32 value between: 12 (H + K) D. The angles are 4 D, shared by all heads.
Nothing is rounded before the rotation is done.
"""
import torch
import triton
import triton.language as tl

from kernels.fused.add_norm import norm_backward


@triton.jit
def _heads(
    x,
    w,
    out,
    token,
    c,
    s,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All heads of one token at once: two tiles (heads, D/2)."""
    h = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    at = (token * HEADS + h) * (2 * HALF) + i
    inside = (h < HEADS) & (i < HALF)
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + at + HALF, inside, 0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a *= r * tl.load(w + i, i < HALF, 0.0).to(tl.float32)
        b *= r * tl.load(w + HALF + i, i < HALF, 0.0).to(tl.float32)
    tl.store(out + at, a * c - b * s, inside)
    tl.store(out + at + HALF, b * c + a * s, inside)


@triton.jit
def _rotate(
    q, k, wq, wk, cos, sin, q_out, k_out, angle_rows, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = token % angle_rows * HALF + i  # every row of a batch may share one row of angles
    c = tl.load(cos + at, i < HALF, 0.0)[None, :]
    s = tl.load(sin + at, i < HALF, 0.0)[None, :]
    if BACK:
        s = -s
    _heads(q, wq, q_out, token, c, s, eps, H, HALF, NORM, BLOCK)
    _heads(k, wk, k_out, token, c, s, eps, K, HALF, NORM, BLOCK)


def _launch(q, k, cos, sin, norms=None, eps=0.0, back=False):
    q, k = q.contiguous(), k.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    H, D = q.shape[-2:]
    K = k.shape[-2]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    wq, wk = norms or (q, k)
    tokens = q.numel() // (H * D)
    angle_rows = cos.numel() // (D // 2)
    BLOCK = triton.next_power_of_2(D // 2)
    _rotate[(tokens,)](
        q, k, wq, wk, cos, sin, q_out, k_out, angle_rows, eps,
        H, K, D // 2, norms is not None, back, BLOCK, num_warps=2)
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, wq, wk, eps):
        norms = None if wq is None else (wq, wk)
        before_norm = () if norms is None else (q, k, wq, wk)
        ctx.eps = eps
        ctx.save_for_backward(cos, sin, *before_norm)
        return _launch(q, k, cos, sin, norms, eps)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin, *before_norm = ctx.saved_tensors
        dq, dk = _launch(dq, dk, cos, sin, back=True)
        if not before_norm:
            return dq, dk, None, None, None, None, None
        q, k, wq, wk = before_norm
        dq, dwq = norm_backward(dq, None, q.contiguous(), wq, ctx.eps)
        dk, dwk = norm_backward(dk, None, k.contiguous(), wk, ctx.eps)
        return dq, dk, None, None, dwq, dwk, None


def rotate(q, k, cos, sin, norms=None, eps=0.0):
    """As `reference.rotate`."""
    wq, wk = norms or (None, None)
    return _Rotate.apply(q, k, cos, sin, wq, wk, eps)
