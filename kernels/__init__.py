"""The operations that decide the speed of the model, behind one door.

model.py and sample.py call these names and never ask where they run. The rule: on a GPU every dtype but float64 goes to
the Triton kernel (one file each, with its equation), everything else to the same operation in plain PyTorch (`reference.py`).
KERNELS=reference or KERNELS=triton in the environment overrides it; triton on a CPU needs TRITON_INTERPRET=1 and is for tests.
"""
import functools
import importlib
import importlib.util
import os

import torch

from cli import UserError
from kernels import reference
from kernels.reference import linear_float32

has_triton = functools.cache(lambda: importlib.util.find_spec("triton") is not None)


def uses_triton(device, dtype=torch.float32):
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "reference", "triton"):
        raise UserError(f"KERNELS={choice}: give reference or triton, or leave it out")
    runs = has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if choice == "triton" and not runs:
        raise UserError("KERNELS=triton needs the package triton, and a GPU or TRITON_INTERPRET=1")
    return dtype != torch.float64 and (choice == "triton" or not choice and runs and device.type == "cuda")


def _operation(name, file):
    """The operation `name`, from kernels/`file`.py or reference.py, as its first argument decides. Triton is imported when first used."""
    plain = getattr(reference, name)

    @functools.wraps(plain)
    def operation(first, *args, **kwargs):
        fused = uses_triton(first.device, first.dtype)
        return (getattr(importlib.import_module(f"kernels.{file}"), name) if fused else plain)(first, *args, **kwargs)
    return operation


add_norm = _operation("add_norm", "norm")
rotate = _operation("rotate", "rotary")
swiglu = _operation("swiglu", "gate")
decode_attention = _operation("decode_attention", "attention")
uniform = _operation("uniform", "choice")
next_tokens = _operation("next_tokens", "choice")
linear_logprob = _operation("linear_logprob", "logprob")
