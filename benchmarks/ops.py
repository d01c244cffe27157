"""Each kernel against the same operation in plain PyTorch, and against what this card can do.

    python benchmarks/ops.py                                                 # on a GPU, as Qwen2.5-0.5B
    TRITON_INTERPRET=1 KERNELS=triton python benchmarks/ops.py --scale 0.01  # on a CPU: only that it runs

Times are medians of --repeats turns, the two in turns; the bytes and flops are those of the forward pass in
each kernel's file, and the roof is a large copy or matrix product measured in the same run. The plain version
of the linear + log-probability is the dense one (logits, log-softmax, gather).
"""
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common import (  # first of ours: it sets the path
    SHAPE, VOCABULARY, machine, name_of, roofline, seconds_of, write,
)

import torch
import torch.nn.functional as F

import kernels
from checkpoint import device_and_dtype
from kernels import reference
from run.command import command, number, parser, positive


@dataclass
class Case:
    """One operation at one shape, with the work of its forward pass as its kernel's file counts it."""
    name: str
    ours: Callable
    plain: Callable
    trained: tuple = ()  # inputs with a gradient
    others: tuple = ()
    bytes: int = 0
    flops: int = 0


# ---- what is compared ----------------------------------------------------------------------------
def dense_logprob(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def dense_attention(q, k, v, past_k, past_v, lengths):
    """torch's own fused attention: all rows are full here, so it needs no mask."""
    rows = torch.arange(len(q), device=q.device)
    past_k[rows, :, lengths] = k
    past_v[rows, :, lengths] = v
    return F.scaled_dot_product_attention(q[:, :, None], past_k, past_v, enable_gqa=True)


def cases(scale, device, dtype):
    """The Cases, with tokens, vocabulary and cache shrunk by `scale`."""
    C, M, H, K, D = SHAPE["hidden_size"], SHAPE["intermediate_size"], 14, 2, 64
    V = max(64, round(scale * VOCABULARY))
    N = max(4, round(scale * 16_384))
    S = max(16, round(scale * 4096))
    size = dtype.itemsize

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype)

    def plain_norm(x, delta, w):
        s = x + delta
        return s, F.rms_norm(s, (C,), w, 1e-6)

    yield Case("norm with the add", lambda x, d, w: kernels.add_norm(x, d, w, 1e-6), plain_norm,
               trained=(random(1, N, C), random(1, N, C), random(C)), bytes=4 * N * C * size)

    angle = torch.rand(1, N, 1, D // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    yield Case("rotary", lambda q, k: kernels.rotate(q, k, cos, sin),
               lambda q, k: reference.rotate(q, k, cos, sin),
               trained=(random(1, N, H, D), random(1, N, K, D)), bytes=2 * N * (H + K) * D * size)

    yield Case("swiglu", lambda g, u: (kernels.swiglu(g, u),), lambda g, u: (F.silu(g) * u,),
               trained=(random(N, M), random(N, M)), bytes=3 * N * M * size)

    N = max(4, N // 4)  # 4,096 rows: more dense logits do not fit into 24 GB
    targets = torch.randint(0, V, (N,), device=device)
    yield Case("linear + log-probability", lambda h, w: kernels.linear_logprob(h, w, targets)[:1],
               lambda h, w: dense_logprob(h, w, targets)[:1],
               trained=(random(N, C), random(V, C) / C**0.5), flops=2 * N * V * C)

    for B in sorted({1, 8, max(1, round(scale * 128))}):
        lengths = torch.full((B,), S - 1, device=device)
        new = (random(B, H, D), random(B, K, D), random(B, K, D))
        inputs = (*new, random(B, K, S, D), random(B, K, S, D), lengths)
        name = f"decode attention, {B} rows over {S}"
        yield Case(name, kernels.decode_attention, dense_attention,
                   others=inputs, bytes=2 * B * K * S * D * size)
        logits = 3 * torch.randn(B, V, device=device)
        u = torch.rand(B, device=device)
        kinds = {"plain": {}, "top-k 20, top-p 0.8": {"top_k": 20, "top_p": 0.8},
                 "top-p 0.95": {"top_p": 0.95}}
        for name, cuts in kinds.items():
            # The reference writes over its logits, but at temperature 1 leaves them as they are.
            ours = partial(kernels.next_tokens, **cuts)
            plain = partial(reference.next_tokens, **cuts)
            yield Case(f"next token, {name}, {B} rows", ours, plain,
                       others=(logits, u), bytes=(2 if cuts else 1) * B * V * 4)


# ---- how -----------------------------------------------------------------------------------------
def seconds_of_call(run, case, device, backward):
    """Of one call, with its backward pass if asked. On a GPU nothing of it is left in the last cache."""
    leaves = [x.detach().requires_grad_(backward) for x in case.trained]

    def call():
        out = run(*leaves, *case.others)
        if backward:
            out = [o for o in out if o.requires_grad]
            torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])

    call()  # compile, tune
    if device.type != "cuda":
        return seconds_of(call, device)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # larger than the last cache level
    calls = 10
    empty = seconds_of(lambda: [flush.zero_() for _ in range(calls)], device, 3)
    full = seconds_of(lambda: [(flush.zero_(), call()) for _ in range(calls)], device, 3)
    return max(1e-9, full - empty) / calls


def measure(case, device, backward, repeats, copy, matmul):
    """A row of figures. `copy` and `matmul` are the machine's limits."""
    turns = {"ours": [], "plain": []}
    for _ in range(repeats):
        turns["ours"].append(seconds_of_call(case.ours, case, device, backward))
        turns["plain"].append(seconds_of_call(case.plain, case, device, backward))
    ours, plain = (statistics.median(made) for made in turns.values())
    row = {"operation": case.name + (", forward + backward" if backward else ""),
           "microseconds": {who: [round(1e6 * s, 1) for s in sorted(made)] for who, made in turns.items()},
           "times_as_fast": round(plain / ours, 2)}
    # The backward pass's bytes are not counted; the head's flops are: it makes the logits twice.
    if case.bytes and not backward:
        row["of_bandwidth"] = round(case.bytes / ours / copy, 3)
    if case.flops:
        row["of_matmul"] = round((4 if backward else 1) * case.flops / ours / matmul, 3)
    return row


def main():
    p = parser(__doc__, out=None)
    p.add_argument("--scale", type=number(float, 0, 1, open_low=True), default=1.0,
                   help="shrink tokens, vocabulary and cache by this")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each")
    args = p.parse_args()
    device, dtype = device_and_dtype(args.device, args.dtype)
    copy, matmul = roofline(device, dtype)
    print(f"{machine()}, {dtype}: a copy moves {copy / 1e9:,.0f} GB/s, a matrix product does "
          f"{matmul / 1e12:,.1f} TFLOP/s; Triton: {kernels.uses_triton(device, dtype)}", flush=True)
    rows = []
    for case in cases(args.scale, device, dtype):
        for backward in (False, True) if case.trained else (False,):
            rows.append(measure(case, device, backward, args.repeats, copy, matmul))
            print(rows[-1], flush=True)
    write(f"ops-{name_of(dtype)}", args, copy_gigabytes_per_second=round(copy / 1e9, 1),
          matmul_teraflops=round(matmul / 1e12, 1), rows=rows)


if __name__ == "__main__":
    command(main)
