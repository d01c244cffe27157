"""The gate of the MLP (Shazeer 2020): y = silu(g) u with silu(g) = g sigmoid(g), in one pass.

    t = sigmoid(g)        dg = dy u t (1 + g (1 - t))        du = dy g t

Bytes a bfloat16 value: forward reads g, u and writes y: 6 (silu and product apart: 10). Backward reads dy, g,
u and writes dg, du: 10; nothing but the two inputs is kept for it.
"""
import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit
def _forward(gate, up, y, n):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < n, 0.0).to(tl.float32)
    u = tl.load(up + at, at < n, 0.0).to(tl.float32)
    tl.store(y + at, g * tl.sigmoid(g) * u, at < n)


@triton.jit
def _backward(dy, gate, up, dgate, dup, n):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < n, 0.0).to(tl.float32)
    u = tl.load(up + at, at < n, 0.0).to(tl.float32)
    d = tl.load(dy + at, at < n, 0.0).to(tl.float32)
    t = tl.sigmoid(g)
    tl.store(dgate + at, d * u * t * (1 + g * (1 - t)), at < n)
    tl.store(dup + at, d * g * t, at < n)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        n = y.numel()
        _forward[(triton.cdiv(n, BLOCK.value),)](gate, up, y, n)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        n = dy.numel()
        _backward[(triton.cdiv(n, BLOCK.value),)](dy.contiguous(), gate, up, dgate, dup, n)
        return dgate, dup


def swiglu(gate, up):
    """As `reference.swiglu`."""
    return _SwiGLU.apply(gate, up)
