"""The operations that decide the speed of the model, behind one door.

model.py and sample.py call these names and never ask where they run. The rule: floats of up to 32 bits on a GPU go to the
Triton kernel (one file each, with its equation), everything else to the same operation in plain PyTorch (`reference.py`).
KERNELS=reference or KERNELS=triton in the environment overrides it; triton on a CPU needs TRITON_INTERPRET=1 and is for tests.
"""
import functools
import importlib
import importlib.util
import os

import torch

from kernels import reference
from kernels.reference import linear_float32

__all__ = ["add_norm", "decode_attention", "linear_float32", "linear_logprob", "next_tokens", "rotate", "swiglu", "uniform", "uses_triton"]


@functools.cache
def _has_triton():
    return importlib.util.find_spec("triton") is not None


def uses_triton(device, dtype=torch.float32):
    choice = os.environ.get("KERNELS")
    if choice:
        if choice not in ("reference", "triton"):
            raise ValueError(f"KERNELS={choice}: give reference or triton")
        return choice == "triton"
    return device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64) and _has_triton()


def _operation(name, file):
    """The operation `name`, from kernels/`file`.py or reference.py, decided by its first argument. Triton is imported when first used."""
    plain = getattr(reference, name)

    @functools.wraps(plain)
    def operation(first, *args, **kwargs):
        fused = uses_triton(first.device, first.dtype)
        return (getattr(importlib.import_module(f"kernels.{file}"), name) if fused else plain)(first, *args, **kwargs)
    return operation


add_norm = _operation("add_norm", "norm")
rotate = _operation("rotate", "rotary")
swiglu = _operation("swiglu", "swiglu_mlp")
decode_attention = _operation("decode_attention", "attention")
uniform = _operation("uniform", "choice")
next_tokens = _operation("next_tokens", "choice")
linear_logprob = _operation("linear_logprob", "logprob")
