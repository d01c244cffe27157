"""Every kernel compiles to machine code for an A100 and an H100, in bfloat16 and float32, on a machine without a GPU.

Triton compiles when a kernel is launched. Here a stand-in for the driver names the target, every launch stops after compiling,
and the operations run on CPU tensors. The interpreter, which the other tests use, accepts much that the compiler does not.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def compile_all(capability):
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_benchmarker = staticmethod(lambda: lambda call, quantiles: call() or [0.0] * 3)  # autotuning: compile each configuration
    driver.set_active(Driver())
    run, compiled = JITFunction.run, {}

    def compile_only(self, *args, **kwargs):
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.setdefault(f"{self.__module__}.{self.__name__}", []).append(kernel)
        limit = {80: 163, 90: 227}[capability] << 10
        assert kernel.metadata.shared <= limit or kwargs.get("ROWS"), (self, kernel.metadata.shared)  # an autotuner drops what does not fit
    JITFunction.run = compile_only

    import kernels
    kernels.uses_triton = lambda *a: True
    from kernels import add_norm, decode_attention, linear_logprob, next_tokens, rotate, swiglu, uniform
    for dtype in (torch.bfloat16, torch.float32):
        leaf = lambda *shape: torch.zeros(shape, dtype=dtype, requires_grad=True)
        x, w = leaf(2, 64, 896), leaf(896)
        (add_norm(x, x, w, 1e-6)[1].sum() + add_norm(x, None, w, 1e-6)[1].sum() + swiglu(x, x).sum()).backward()
        angle = torch.zeros(1, 64, 1, 32)
        for norms in (None, (leaf(64), leaf(64))):
            q, k = rotate(leaf(2, 64, 14, 64), leaf(2, 64, 2, 64), angle, angle, norms, 1e-6)
            (q.sum() + k.sum()).backward()
        with torch.no_grad():
            for D, parts in ((64, 1), (64, 5), (128, 1)):
                cache = torch.zeros(4, 2, 512, D, dtype=dtype)
                decode_attention(leaf(4, 14, D), leaf(4, 2, D), leaf(4, 2, D), cache, cache, torch.zeros(4, dtype=torch.long), parts)
        linear_logprob(leaf(48, 896), leaf(9000, 896), torch.zeros(48, dtype=torch.long))[0].sum().backward()
    u = uniform(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    for cuts in ({}, {"temperature": 0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"top_p": 0.9, "penalty": 1.1, "seen": torch.zeros(4, 9000, dtype=torch.bool)}):
        next_tokens(torch.zeros(4, 9000), u, **cuts)
    for name, kernels in sorted(compiled.items()):
        print(name, len({k.hash for k in kernels}), "variants,", max(k.metadata.shared for k in kernels), "bytes of shared memory,", len(kernels[0].asm["cubin"]), "of code")


def test_every_kernel_compiles(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "KERNELS": "triton", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    both = [subprocess.Popen([sys.executable, __file__, capability], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for capability in ("80", "90")]
    for done in both:
        out, errors = done.communicate()
        assert done.returncode == 0, errors[-3000:]
        assert len(out.splitlines()) == 11, out


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
