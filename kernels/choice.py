"""The choice of the next token, one program a row: no sort, no host sync, a draw that is reproducible.

    z = logits (seen tokens penalised) / temperature      p = exp(z - max z)
    token = the first i in vocabulary order with  p_0 + ... + p_i > u sum p      over the tokens that survive the cuts

The cuts need a threshold, not an order. Top-k keeps z >= t with t the largest value that k logits reach; top-p the same with
probability mass in place of a count. Both are bisections over the float32 values, at most 32 halvings, exact up to the rounding of
the mass. To halve over few numbers: each lane kept the largest logit it met. These are BLOCK of the row's logits, so the threshold
among them alone can only be too low; what reaches it, some dozens in practice, is collected and bisected.

Bytes for a row of V float32 logits: two sweeps, 8 V (10 V with a penalty). A sort would move 16 V or more, several times.
"""
import math

import torch
import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # below every logit that counts; -inf would give inf - inf
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _read(logits, seen, at, V, temperature, penalty, PENALTY: tl.constexpr):
    """(the logits to draw from, the model's own), both divided by the temperature."""
    plain = tl.load(logits + at, at < V, float("-inf")).to(tl.float32)
    z = plain
    if PENALTY:
        z = tl.where(tl.load(seen + at, at < V, 0) != 0, tl.where(z > 0, z / penalty, z * penalty), z)
    return z / temperature, plain / temperature


@triton.jit
def _flip(bits):
    """The bits of a float32 as an int32 that sorts alike, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


@triton.jit
def _mass(values, n, t, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the first n values reach t, or the sum of their exp(value - top)."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(values + at, at < n, float("-inf"))
        total += tl.where((at < n) & (z >= t), tl.exp(z - top) if MASS else 1.0, 0.0)
    return tl.sum(total)


@triton.jit
def _threshold(values, n, goal, floor, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t in floor..top whose mass among the first n values reaches the goal; the floor if none does."""
    low, high = _flip(floor.to(tl.int32, bitcast=True)).to(tl.int64), _flip(top.to(tl.int32, bitcast=True)).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = _mass(values, n, _flip(middle.to(tl.int32)).to(tl.float32, bitcast=True), top, MASS, BLOCK) >= goal
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return _flip(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _draw(p, ids, before, aim, first, last):
    """One block of the inversion: (mass so far, first id that passes the aim, last id with any mass)."""
    passed = (before + tl.cumsum(p) > aim) & (p > 0)
    return before + tl.sum(p), tl.minimum(first, tl.min(tl.where(passed, ids, NONE))), tl.maximum(last, tl.max(tl.where(p > 0, ids, 0)))


@triton.jit
def _choose(logits, u, seen, tokens, logprobs, values, ids, V, stride, width, temperature, top_k, top_p, min_p, penalty,
            GREEDY: tl.constexpr, CUT: tl.constexpr, PENALTY: tl.constexpr, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits, seen, values, ids = logits + row * stride, seen + row * V, values + row * width, ids + row * width
    # The first sweep. Every lane keeps a maximum and a sum of exponentials, of the logits to draw from and of the model's own.
    best, sums = tl.full((BLOCK,), NOTHING, tl.float32), tl.zeros((BLOCK,), tl.float32)
    own_best, own_sums = best, sums
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
        higher = tl.maximum(best, z)
        best, sums = higher, sums * tl.exp(best - higher) + tl.exp(z - higher)
        if PENALTY:
            higher = tl.maximum(own_best, own)
            own_best, own_sums = higher, own_sums * tl.exp(own_best - higher) + tl.exp(own - higher)
    top = tl.max(best)
    total = tl.sum(sums * tl.exp(best - top))
    if PENALTY:
        own_top = tl.max(own_best)
        log_total = own_top + tl.log(tl.sum(own_sums * tl.exp(own_best - own_top)))
    else:
        log_total = top + tl.log(total)

    aim, before, first, last = tl.load(u + row) * total, 0.0, NONE, 0
    if CUT:
        floor = tl.maximum(top + min_p, NOTHING)  # min_p comes as its logarithm
        bound = floor
        tl.store(values + lane, best)
        tl.debug_barrier()  # a lane reads what the others wrote
        if top_k > 0:
            bound = _threshold(values, BLOCK, top_k, floor, top, False, BLOCK)
        elif top_p < 1:
            bound = _threshold(values, BLOCK, top_p * total, floor, top, True, BLOCK)
        tl.debug_barrier()  # all have read before it is overwritten
        # The second sweep collects, in vocabulary order, what reaches the bound, and sums what min-p leaves.
        n, sums = 0, tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
            sums += tl.where(z >= floor, tl.exp(z - top), 0.0)
            kept = ((start + lane < V) & (z >= bound)).to(tl.int32)
            to = n + tl.cumsum(kept) - 1
            tl.store(values + to, z, kept > 0)
            tl.store(ids + to, start + lane, kept > 0)
            n += tl.sum(kept)
        tl.debug_barrier()
        total, floor = tl.sum(sums), bound
        if top_k > 0:
            floor = _threshold(values, n, top_k, bound, top, False, BLOCK)
            total = _mass(values, n, floor, top, True, BLOCK)
        if top_p < 1:
            floor = _threshold(values, n, top_p * total, floor, top, True, BLOCK)
            total = _mass(values, n, floor, top, True, BLOCK)
        aim = tl.load(u + row) * total
        for start in range(0, n, BLOCK):
            at = start + lane
            z = tl.load(values + at, at < n, float("-inf"))
            p = tl.where(z >= floor, tl.exp(z - top), 0.0)
            before, first, last = _draw(p, tl.load(ids + at, at < n, 0), before, aim, first, last)
    else:
        for start in tl.range(0, V, BLOCK, num_stages=3):
            z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
            if GREEDY:
                first = tl.minimum(first, tl.min(tl.where(z == top, start + lane, NONE)))
            else:
                before, first, last = _draw(tl.exp(z - top), start + lane, before, aim, first, last)

    token = tl.minimum(tl.where(first == NONE, last, first), V - 1)  # rounding may leave the aim just out of reach
    z, own = _read(logits, seen, token, V, temperature, 1.0, False)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, own - log_total)
    if PENALTY:
        tl.store(seen + token, 1)


def next_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=None):
    """As `reference.next_tokens`. With cuts it takes 8 bytes more a logit for what it collects."""
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    BLOCK = min(4096, triton.next_power_of_2(V))
    cut = temperature > 0 and (0 < top_k < V or top_p < 1 or min_p > 0)
    width = max(V, BLOCK) if cut else 0
    values, ids = torch.empty(B, width, device=logits.device), torch.empty(B, width, device=logits.device, dtype=torch.int32)
    tokens, logprobs = torch.empty(B, device=logits.device, dtype=torch.long), torch.empty(B, device=logits.device)
    _choose[(B,)](logits, u, logits if seen is None else seen.view(torch.uint8), tokens, logprobs, values, ids, V, logits.stride(0), width,
                  float(temperature or 1), top_k if top_k < V else 0, float(top_p), math.log(min_p) if min_p else float("-inf"),
                  float(penalty), temperature == 0, cut, seen is not None, BLOCK, num_warps=max(1, BLOCK // 256))
    return tokens, logprobs


@triton.jit
def _uniform(key, position, out, B, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(key + i, i < B, 0).to(tl.uint64) + (tl.load(position + i, i < B, 0).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    tl.store(out + i, (x >> 40).to(tl.float32) * 5.9604644775390625e-08, i < B)  # 2**-24


def uniform(key, position):
    """As `reference.uniform`, to the bit."""
    out = torch.empty(len(key), device=key.device)
    _uniform[(triton.cdiv(len(key), 128),)](key.contiguous(), position.contiguous(), out, len(key), 128, num_warps=1)
    return out
