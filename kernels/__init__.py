"""The operations that decide the speed of the model, behind one door.

model.py, cache.py and sample.py call these functions. The rule: on a GPU that has triton, every dtype but
float64 goes to the Triton kernel (kernels/fused, one file per operation), everything else to the same
operation in plain PyTorch (kernels/reference.py, where each has its equation). KERNELS=reference or
KERNELS=triton in the environment overrides it; triton on a CPU needs TRITON_INTERPRET=1 and is for tests.
The fused modules, which import triton, are imported on first use, and only here.
"""
import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import linear_float32, uniform  # noqa: F401 (plain PyTorch on every device)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether an operation on such tensors runs in Triton.

    Raises ValueError if KERNELS asks for something unavailable.
    """
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "reference", "triton"):
        raise ValueError(f"KERNELS={choice}: give reference or triton, or leave it out")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" and not (has_triton() and (device.type == "cuda" or interpreted)):
        raise ValueError("KERNELS=triton needs the package triton, and a GPU or TRITON_INTERPRET=1")
    if dtype == torch.float64 or choice == "reference":
        return False
    return choice == "triton" or (device.type == "cuda" and has_triton())


def _dispatched(name: str):
    """The operation of this name: kernels.reference's, or on a GPU that of kernels.fused."""
    plain = getattr(reference, name)

    @functools.wraps(plain)
    def operation(first: Tensor, *args, **how):
        if uses_triton(first.device, first.dtype):
            fused = importlib.import_module(f"kernels.fused.{name}")
            return getattr(fused, name)(first, *args, **how)
        return plain(first, *args, **how)
    return operation


add_norm = _dispatched("add_norm")
rotate = _dispatched("rotate")
swiglu = _dispatched("swiglu")
decode_attention = _dispatched("decode_attention")
next_tokens = _dispatched("next_tokens")
linear_logprob = _dispatched("linear_logprob")
