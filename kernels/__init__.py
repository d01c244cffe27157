"""The operations that decide the speed of the model, behind one door.

model.py, cache.py and sample.py call these functions; only the sampler asks where they run, to know whether a
step can be a CUDA graph. The rule: on a GPU that has triton, every dtype but float64 goes to the Triton
kernel (kernels/fused, one file per operation), everything else to the same operation in plain PyTorch
(kernels/reference.py, where each has its equation). KERNELS=reference or KERNELS=triton in the environment
overrides it; triton on a CPU needs TRITON_INTERPRET=1 and is for tests. The fused modules, which import
triton, are imported on first use, and only here.
"""
import functools
import importlib.util
import os

import torch
from torch import Tensor

from cli import UserError
from kernels import reference
from kernels.reference import linear_float32 as linear_float32  # one product in plain PyTorch on every device


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether an operation on such tensors runs in Triton.

    Raises UserError if KERNELS asks for something unavailable.
    """
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "reference", "triton"):
        raise UserError(f"KERNELS={choice}: give reference or triton, or leave it out")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" and not (has_triton() and (device.type == "cuda" or interpreted)):
        raise UserError("KERNELS=triton needs the package triton, and a GPU or TRITON_INTERPRET=1")
    if dtype == torch.float64 or choice == "reference":
        return False
    return choice == "triton" or (device.type == "cuda" and has_triton())


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if uses_triton(x.device, x.dtype):
        from kernels.fused import add_norm as fused
        return fused.add_norm(x, delta, weight, eps)
    return reference.add_norm(x, delta, weight, eps)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms=None, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    if uses_triton(q.device, q.dtype):
        from kernels.fused import rotate as fused
        return fused.rotate(q, k, cos, sin, norms, eps)
    return reference.rotate(q, k, cos, sin, norms, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if uses_triton(gate.device, gate.dtype):
        from kernels.fused import swiglu as fused
        return fused.swiglu(gate, up)
    return reference.swiglu(gate, up)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, lengths: Tensor,
) -> Tensor:
    if uses_triton(q.device, q.dtype):
        from kernels.fused import decode_attention as fused
        return fused.decode_attention(q, k, v, past_k, past_v, lengths)
    return reference.decode_attention(q, k, v, past_k, past_v, lengths)


def uniform(key: Tensor, position: Tensor) -> Tensor:
    if uses_triton(key.device, key.dtype):
        from kernels.fused import uniform as fused
        return fused.uniform(key, position)
    return reference.uniform(key, position)


def next_tokens(logits: Tensor, u: Tensor, **how) -> tuple[Tensor, Tensor]:
    """`how`: temperature, top_k, top_p, min_p, penalty, seen, as `reference.next_tokens` explains them."""
    if uses_triton(logits.device, logits.dtype):
        from kernels.fused import next_tokens as fused
        return fused.next_tokens(logits, u, **how)
    return reference.next_tokens(logits, u, **how)


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    if uses_triton(hidden.device, hidden.dtype):
        from kernels.fused import linear_logprob as fused
        return fused.linear_logprob(hidden, weight, targets, temperature)
    return reference.linear_logprob(hidden, weight, targets, temperature)
