"""Every kernel compiles for six generations of GPUs, in bfloat16 and float32, on a machine without one.

To Triton the RTX 30 and 40 are the A100 with less shared memory, so that they share one compilation.

Triton compiles when a kernel is launched. Here a stand-in for the driver names the target, every launch stops
after compiling, and the operations run on CPU tensors. The interpreter, which the other tests use, accepts
much that the compiler does not.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {  # bytes that one program may have
    80: 99 << 10,  # A100, RTX 30, RTX 40
    90: 227 << 10,  # H100
    100: 227 << 10,  # B200
    120: 99 << 10,  # RTX 50
}
KERNELS = 11


def stand_in_driver(capability):
    from triton.backends.compiler import GPUTarget

    class Driver:
        @staticmethod
        def get_current_target():
            return GPUTarget("cuda", capability, 32)

        @staticmethod
        def get_current_device():
            return 0

        @staticmethod
        def get_current_stream(device):
            return 0

        @staticmethod
        def get_benchmarker():
            return lambda call, quantiles: call() or [0.0] * 3  # autotuning: compile each configuration
    return Driver()


def launch_every_operation(capability):
    import torch

    from kernels import add_norm, decode_attention, linear_logprob, next_tokens, rotate, swiglu
    from kernels.fused import decode_attention as fused

    for dtype in (torch.bfloat16, torch.float32) if capability in (80, 120) else (torch.bfloat16,):
        def leaf(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, requires_grad=True)

        x, w = leaf(2, 64, 896), leaf(896)
        for y in (add_norm(x, x, w, 1e-6)[1], add_norm(x, None, w, 1e-6)[1], swiglu(x, x)):
            y.sum().backward()
        angle = torch.zeros(1, 64, 1, 32)
        for norms in (None, (leaf(64), leaf(64))):
            q, k = rotate(leaf(2, 64, 14, 64), leaf(2, 64, 2, 64), angle, angle, norms, 1e-6)
            (q.sum() + k.sum()).backward()
        lengths = torch.zeros(4, dtype=torch.long)
        with torch.no_grad():
            for D, parts in ((64, 1), (64, 5), (128, 1)):
                cache = torch.zeros(4, 2, 512, D, dtype=dtype)
                q, k = leaf(4, 14, D), leaf(4, 2, D)
                fused.decode_attention(q, k, k, cache, cache, lengths, parts)
                decode_attention(q, k, k, cache, cache, lengths)
        targets = torch.zeros(48, dtype=torch.long)
        linear_logprob(leaf(48, 896), leaf(9000, 896), targets)[0].sum().backward()
    u = torch.zeros(4)
    seen = torch.zeros(4, 9000, dtype=torch.bool)
    next_tokens(torch.zeros(4, 9000), u)
    next_tokens(torch.zeros(4, 9000), u, temperature=0)
    next_tokens(torch.zeros(4, 151_665), u, temperature=0.7, top_k=20, top_p=0.8)
    next_tokens(torch.zeros(4, 9000), u, top_p=0.9, penalty=1.1, seen=seen)


def compile_all(capability):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(stand_in_driver(capability))
    run, compiled = JITFunction.run, {}

    def compile_only(self, *args, **kwargs):
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.setdefault(f"{self.__module__}.{self.__name__}", []).append(kernel)
        tuned = "ROWS" in kwargs  # an autotuner drops what does not fit
        assert tuned or kernel.metadata.shared <= SHARED_MEMORY[capability], (self, kernel.metadata.shared)
    JITFunction.run = compile_only

    import kernels
    kernels.uses_triton = lambda *args: True
    launch_every_operation(capability)
    for name, variants in sorted(compiled.items()):
        shared = max(kernel.metadata.shared for kernel in variants)
        print(name, len({kernel.hash for kernel in variants}), "variants,", shared, "bytes of shared memory,",
              len(variants[0].asm["cubin"]), "of code")


def test_every_kernel_compiles(tmp_path):
    """Rule 18, as far as a machine without a GPU can tell."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "KERNELS": "triton",
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = []
    for capability in SHARED_MEMORY:
        processes.append(subprocess.Popen([sys.executable, __file__, str(capability)], env=env, **pipes))
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        assert len(out.splitlines()) == KERNELS, out


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
