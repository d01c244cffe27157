"""RMSNorm behind the residual add, in one pass over each row (Zhang & Sennrich 2019).

    s = x + delta        r = 1 / sqrt(mean(s^2) + eps)        n = s r        y = n w

Gradient, from dy and from ds, that of the residual stream:

    g = dy w        dx = ddelta = ds + r (g - n mean(g n))        dw = sum over rows of dy n

Bytes for a row of C bfloat16 values: forward reads x, delta and writes s, y: 8 C (the add and the norm apart:
10 C). Backward reads dy, ds, s and writes dx: 8 C. r is computed again, since s is in registers anyway.
"""
import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, delta, w, s, y, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * C + i
    v = tl.load(x + at, i < C, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(delta + at, i < C, 0.0).to(tl.float32)
        v = v.to(s.dtype.element_ty)  # the norm is of the sum as it is stored
        tl.store(s + at, v, i < C)
        v = v.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v) / C + eps)
    n = (v * r).to(y.dtype.element_ty).to(tl.float32)  # rounded before the weight, as transformers does
    weight = tl.load(w + i, i < C, 0.0).to(tl.float32)
    tl.store(y + at, n * weight, i < C)


@triton.jit
def _backward(dy, ds, s, w, dx, dw, N, rows_each, C, eps, DS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    weight = tl.load(w + i, i < C, 0.0).to(tl.float32)
    dw_part = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_each
    for j in range(rows_each):
        row = first + j
        at = row * C + i
        inside = (i < C) & (row < N)
        v = tl.load(s + at, inside, 0.0).to(tl.float32)
        d = tl.load(dy + at, inside, 0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v) / C + eps)
        n = v * r
        g = d * weight
        dw_part += d * n
        d = r * (g - n * (tl.sum(g * n) / C))
        if DS:
            d += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, d, inside)
    # One row a program; PyTorch adds them up.
    tl.store(dw + tl.program_id(0).to(tl.int64) * C + i, dw_part, i < C)


def _warps(BLOCK):
    return min(16, max(1, BLOCK // 256))


def norm_backward(dy, ds, s, weight, eps):
    """(dx, dw) for s (..., C), contiguous; ds may be None."""
    C = weight.numel()
    N = s.numel() // C
    dy = dy.contiguous()
    dx = torch.empty_like(s)
    if N == 0:
        return dx, torch.zeros_like(weight)
    programs = min(N, max(1024, 2**20 // C))  # their parts of dw stay under 4 MiB for short rows
    rows_each = triton.cdiv(N, programs)
    dw = torch.empty(triton.cdiv(N, rows_each), C, device=s.device)
    ds_given = dy if ds is None else ds.contiguous()
    BLOCK = triton.next_power_of_2(C)
    _backward[(len(dw),)](
        dy, ds_given, s, weight, dx, dw, N, rows_each, C, eps, ds is not None, BLOCK, num_warps=_warps(BLOCK))
    return dx, dw.sum(0).to(weight.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        x = x.contiguous()
        y = torch.empty_like(x)
        s = x if delta is None else torch.empty_like(x)
        delta_given = x if delta is None else delta.contiguous()
        C = x.shape[-1]
        BLOCK = triton.next_power_of_2(C)
        _forward[(x.numel() // C,)](
            x, delta_given, weight, s, y, C, eps, delta is not None, BLOCK, num_warps=_warps(BLOCK))
        ctx.save_for_backward(s, weight)
        ctx.eps = eps
        return y if delta is None else (s, y)

    @staticmethod
    def backward(ctx, *grads):  # (dy) without a delta, (ds, dy) with one
        s, weight = ctx.saved_tensors
        if len(grads) == 1:
            dx, dw = norm_backward(grads[0], None, s, weight, ctx.eps)
            return dx, None, dw, None
        ds, dy = grads
        dx, dw = norm_backward(dy, ds, s, weight, ctx.eps)
        return dx, dx, dw, None


def add_norm(x, delta, weight, eps):
    """As `reference.add_norm`."""
    if delta is None:
        return x, _AddNorm.apply(x, None, weight, eps)
    return _AddNorm.apply(x, delta, weight, eps)
