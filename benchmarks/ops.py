"""Each kernel against the same operation in plain PyTorch, and against what this card can do.

    python benchmarks/ops.py                                                       # on a GPU, shapes of Qwen2.5-0.5B
    TRITON_INTERPRET=1 KERNELS=triton python benchmarks/ops.py --scale 0.01        # on a CPU: that it runs; its times mean nothing

Times are medians of --repeats turns, the two in turns; the bytes and flops are those of the forward pass in each kernel's file, and
the roof is a large copy or matrix product measured in the same run. The plain version of the linear + log-probability is the dense
one (logits, log-softmax, gather), with its peak memory beside ours. Liger's kernels are not compared.
"""
import statistics

from common import SHAPES, VOCABULARY, machine, roofline, seconds_of, write

import torch
import torch.nn.functional as F

import kernels
from cli import command, number, parser, positive
from kernels import reference
from model import device_and_dtype


def dense_logprob(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def masked_attention(q, k, v, past_k, past_v, lengths):
    """torch's own fused attention, with a mask for the ragged rows."""
    rows = torch.arange(len(q), device=q.device)
    past_k[rows, :, lengths], past_v[rows, :, lengths] = k, v
    mask = torch.arange(past_k.shape[2], device=q.device) <= lengths[:, None]
    return F.scaled_dot_product_attention(q[:, :, None], past_k, past_v, attn_mask=mask[:, None, None], enable_gqa=True)


def cases(scale, device, dtype):
    """[(name, ours, {peer: plain}, differentiable inputs, other inputs, bytes, flops)], the work as the files of the kernels count it."""
    c = SHAPES["qwen2.5-0.5b"]
    C, M, H, K, D, V = c["hidden_size"], c["intermediate_size"], 14, 2, 64, max(64, round(scale * VOCABULARY))
    N, S, size = max(4, round(scale * 16_384)), max(16, round(scale * 4096)), dtype.itemsize
    random = lambda *shape: torch.randn(shape, device=device).to(dtype)
    x, delta, w, gate, up = random(1, N, C), random(1, N, C), random(C), random(N, M), random(N, M)
    norm_plain = lambda x, delta, w: (s := x + delta, F.rms_norm(s, (C,), w, 1e-6))
    yield "norm with the add", lambda x, d, w: kernels.add_norm(x, d, w, 1e-6), {"torch": norm_plain}, (x, delta, w), (), 4 * N * C * size, 0
    angle = torch.rand(1, N, 1, D // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    turn = lambda module: lambda q, k: module.rotate(q, k, cos, sin)
    yield "rotary", turn(kernels), {"torch": turn(reference)}, (random(1, N, H, D), random(1, N, K, D)), (), 2 * N * (H + K) * D * size, 0
    yield "swiglu", lambda g, u: (kernels.swiglu(g, u),), {"torch": lambda g, u: (F.silu(g) * u,)}, (gate, up), (), 3 * N * M * size, 0
    head, targets = (random(V, C) / C**0.5), torch.randint(0, V, (N,), device=device)
    yield "linear + log-probability", lambda h, w: kernels.linear_logprob(h, w, targets)[:1], {"dense": lambda h, w: dense_logprob(h, w, targets)[:1]}, (random(N, C), head), (), 0, 2 * N * V * C
    for B in (1, 8, 128):
        lengths = torch.full((B,), S - 1, device=device)
        inputs = (random(B, H, D), random(B, K, D), random(B, K, D), random(B, K, S, D), random(B, K, S, D), lengths)
        yield f"decode attention, {B} rows over {S}", kernels.decode_attention, {"torch": masked_attention}, (), inputs, 2 * B * K * S * D * size, 0
        logits, u = torch.randn(B, V, device=device) * 3, torch.rand(B, device=device)
        for name, cuts in (("plain", {}), ("top-k 20, top-p 0.8", {"top_k": 20, "top_p": 0.8})):
            # The reference writes over its logits, but at temperature 1 leaves them as they are.
            choose = lambda module, cuts=cuts: lambda z, u: module.next_tokens(z, u, **cuts)
            yield f"next token, {name}, {B} rows", choose(kernels), {"torch": choose(reference)}, (), (logits, u), 2 * B * V * 4, 0


def timed(run, trained, others, device, backward):
    leaves = [x.detach().requires_grad_(backward) for x in trained]

    def call():
        out = run(*leaves, *others)
        if backward:
            torch.autograd.grad([o for o in out if o.requires_grad], leaves, [torch.ones_like(o) for o in out if o.requires_grad])
    call()  # compile, tune
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # larger than the last cache level
        calls = 10
        empty = seconds_of(lambda: [flush.zero_() for _ in range(calls)], device, 3)
        return max(1e-9, seconds_of(lambda: [(flush.zero_(), call()) for _ in range(calls)], device, 3) - empty) / calls, peak
    return seconds_of(call, device), 0


def main():
    p = parser(__doc__, out="")
    p.add_argument("--scale", type=number(float, 0, 1, open_low=True), default=1.0, help="shrink tokens, vocabulary and cache by this")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each")
    args = p.parse_args()
    device, dtype = device_and_dtype(args.device, args.dtype)
    copy, matmul = roofline(device, dtype)
    print(f"{machine()}, {dtype}: a copy moves {copy / 1e9:,.0f} GB/s, a matrix product does {matmul / 1e12:,.1f} TFLOP/s; kernels: {'triton' if kernels.uses_triton(device, dtype) else 'reference'}", flush=True)
    rows = []
    for name, ours, peers, trained, others, read, flops in cases(args.scale, device, dtype):
        for backward in (False, True) if trained else (False,):
            turns = {who: [] for who in ("ours", *peers)}
            for _ in range(args.repeats):
                for who, run in (("ours", ours), *peers.items()):
                    turns[who].append(timed(run, trained, others, device, backward))
            seconds = {who: statistics.median(s for s, _ in t) for who, t in turns.items()}
            work = {}  # the backward pass's bytes are not counted; the head's flops are: it makes the logits twice
            if read and not backward:
                work["of_bandwidth"] = read / seconds["ours"] / copy
            if flops:
                work["of_matmul"] = (4 if backward else 1) * flops / seconds["ours"] / matmul
            row = {"operation": name + (", forward + backward" if backward else ""), **{f"{who}_microseconds": round(1e6 * s, 1) for who, s in seconds.items()},
                   "spread": {who: [round(1e6 * f(s for s, _ in t), 1) for f in (min, max)] for who, t in turns.items()},
                   "times_as_fast": {who: round(seconds[who] / seconds["ours"], 2) for who in peers}, **{k: round(v, 3) for k, v in work.items()},
                   "peak_mib": {who: round(max(m for _, m in t) / 2**20) for who, t in turns.items()}}
            rows.append(row)
            peer, = peers
            print(f"{row['operation']:<48} {row['ours_microseconds']:>12,.1f} us   {row['times_as_fast'][peer]:>6.2f} x {peer:<6} "
                  + "  ".join(f"{k.replace('_', ' ')} {v:.0%}" for k, v in work.items()) + (f"  memory {row['peak_mib']['ours']:,} of {row['peak_mib'][peer]:,} MiB" if device.type == "cuda" else ""), flush=True)
    write(f"ops-{str(dtype)[6:]}", args, copy_gigabytes_per_second=round(copy / 1e9, 1), matmul_teraflops=round(matmul / 1e12, 1), rows=rows)


if __name__ == "__main__":
    command(main)
