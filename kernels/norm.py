"""RMSNorm behind the residual add, in one pass over each row (Zhang & Sennrich 2019).

    s = x + delta        r = 1 / sqrt(mean(s^2) + eps)        n = s r        y = n w

Gradient, from dy and from what reaches s by its other way (ds):

    g = dy w        dx = ddelta = ds + r (g - n mean(g n))        dw = sum over rows of dy n

Bytes for a row of C bfloat16 values: forward reads x, delta and writes s, y: 8 C (the add and the norm apart: 10 C). Backward
reads dy, ds, s and writes dx: 8 C. r is computed again, since s is in registers anyway.
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
    tl.store(y + at, n * tl.load(w + i, i < C, 0.0).to(tl.float32), i < C)


@triton.jit
def _backward(dy, ds, s, w, dx, dw, N, per_program, C, eps, DS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    weight = tl.load(w + i, i < C, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for j in range(per_program):
        at, inside = (first + j) * C + i, (i < C) & (first + j < N)
        v, d = tl.load(s + at, inside, 0.0).to(tl.float32), tl.load(dy + at, inside, 0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v) / C + eps)
        n, g = v * r, d * weight
        total += d * n
        d = r * (g - n * (tl.sum(g * n) / C))
        if DS:
            d += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, d, inside)
    tl.store(dw + tl.program_id(0).to(tl.int64) * C + i, total, i < C)  # one row a program; PyTorch adds them up


def norm_backward(dy, ds, s, weight, eps):
    """(dx, dw) for s (..., C), contiguous; ds may be None."""
    C, N = weight.numel(), s.numel() // weight.numel()
    dy, dx = dy.contiguous(), torch.empty_like(s)
    per_program = triton.cdiv(N, min(N, max(1024, 2**20 // C)))  # the programs' parts of dw stay under 4 MiB for short rows
    dw = torch.empty(triton.cdiv(N, per_program), C, device=s.device)
    BLOCK = triton.next_power_of_2(C)
    _backward[(len(dw),)](dy, dy if ds is None else ds.contiguous(), s, weight, dx, dw, N, per_program, C, eps,
                           ds is not None, BLOCK, num_warps=min(16, max(1, BLOCK // 256)))
    return dx, dw.sum(0).to(weight.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        x = x.contiguous()
        y, s = torch.empty_like(x), x if delta is None else torch.empty_like(x)
        C, BLOCK = x.shape[-1], triton.next_power_of_2(x.shape[-1])
        _forward[(x.numel() // C,)](x, x if delta is None else delta.contiguous(), weight, s, y, C, eps,
                                    delta is not None, BLOCK, num_warps=min(16, max(1, BLOCK // 256)))
        ctx.save_for_backward(s, weight)
        ctx.eps = eps
        return y if delta is None else (s, y)

    @staticmethod
    def backward(ctx, *grads):  # (dy) without a delta, (ds, dy) with one
        dx, dw = norm_backward(grads[-1], grads[0] if len(grads) == 2 else None, *ctx.saved_tensors, ctx.eps)
        return dx, dx if len(grads) == 2 else None, dw, None


def add_norm(x, delta, weight, eps):
    """As `reference.add_norm`."""
    return (x, _AddNorm.apply(x, None, weight, eps)) if delta is None else _AddNorm.apply(x, delta, weight, eps)
