"""The operations that decide the speed of the model, behind one door.

model.py and sample.py call these names and never ask which device they are on. `reference.py` is each operation in plain
PyTorch with its equation; it is what runs everywhere today.
"""
from kernels.reference import decode_attention, linear_logprob, next_tokens, rms_norm, rotate, swiglu, uniform

__all__ = ["decode_attention", "linear_logprob", "next_tokens", "rms_norm", "rotate", "swiglu", "uniform"]
