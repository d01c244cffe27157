"""The choice of the next token, one program per row: no sort, no host sync, a draw that is reproducible.

    z = logits (seen tokens penalised) / temperature      p = exp(z - max z)
    token = the first i in vocabulary order with  p_0 + ... + p_i > u sum p,  over those that survive the cuts

The cuts need a threshold, not an order. Top-k keeps z >= t with t the largest value that k logits reach;
top-p the same with probability mass in place of a count. Both are bisections over the float32 values, at most
32 halvings, exact up to the rounding of the mass. To bisect over few numbers, the first bisection is over the
maxima of the lanes (a lane is one of BLOCK positions that run in parallel and see every BLOCK-th logit). They
are a subset of the row, so their threshold is a lower bound; only the logits above it, some dozens in
practice, are collected and bisected exactly.

Bytes for a row of V float32 logits: two sweeps, 8 V (10 V with a penalty). A sort would move 16 V or more,
several times.
"""
import math

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every logit that counts; -inf would give inf - inf
NO_ID = tl.constexpr(2**31 - 1)  # no id yet


# ---- pieces --------------------------------------------------------------------------------------
@triton.jit
def _read(logits, seen, at, V, temperature, penalty, PENALTY: tl.constexpr):
    """(the logits to draw from, the model's own), both divided by the temperature."""
    own = tl.load(logits + at, at < V, float("-inf")).to(tl.float32)
    z = own
    if PENALTY:
        marked = tl.load(seen + at, at < V, 0) != 0
        z = tl.where(marked, tl.where(z > 0, z / penalty, z * penalty), z)
    return z / temperature, own / temperature


@triton.jit
def _sweep(logits, seen, V, temperature, penalty, PENALTY: tl.constexpr, BLOCK: tl.constexpr):
    """(each lane's largest logit, the row's, sum of exp(z - largest); the same two of the own logits)."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    own_best = best
    own_sums = sums
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
        higher = tl.maximum(best, z)
        sums = sums * tl.exp(best - higher) + tl.exp(z - higher)
        best = higher
        if PENALTY:
            higher = tl.maximum(own_best, own)
            own_sums = own_sums * tl.exp(own_best - higher) + tl.exp(own - higher)
            own_best = higher
    top = tl.max(best)
    total = tl.sum(sums * tl.exp(best - top))
    if PENALTY:
        own_top = tl.max(own_best)
        own_total = tl.sum(own_sums * tl.exp(own_best - own_top))
    else:
        own_top = top
        own_total = total
    return best, top, total, own_top, own_total


@triton.jit
def _mass(values, n, t, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the first n values reach t, or the sum of their exp(value - top)."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(values + at, at < n, float("-inf"))
        found += tl.where((at < n) & (z >= t), tl.exp(z - top) if MASS else 1.0, 0.0)
    return tl.sum(found)


@triton.jit
def _sortable(x):
    """A float32 as an integer that sorts alike."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unsortable(i):
    bits = i.to(tl.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(values, n, goal, lowest, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t in lowest..top that enough of the first n values reach; `lowest` if none does."""
    low = _sortable(lowest)
    high = _sortable(top) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = _mass(values, n, _unsortable(middle), top, MASS, BLOCK) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _unsortable(low)


@triton.jit
def _draw(p, ids, before, aim, first, last):
    """One block of the inversion: (mass so far, first id that passes the aim, last id with any mass)."""
    passed = (before + tl.cumsum(p) > aim) & (p > 0)
    first = tl.minimum(first, tl.min(tl.where(passed, ids, NO_ID)))
    last = tl.maximum(last, tl.max(tl.where(p > 0, ids, 0)))
    return before + tl.sum(p), first, last


@triton.jit
def _write(
    row, logits, seen, tokens, logprobs, first, last, V, temperature, own_top, own_total,
    PENALTY: tl.constexpr,
):
    # Rounding may leave the aim just out of reach.
    token = tl.minimum(tl.where(first == NO_ID, last, first), V - 1)
    z, own = _read(logits, seen, token, V, temperature, 1.0, PENALTY=False)
    tl.store(tokens + row, token.to(tl.int64))
    # The difference first: logits of -30,000 leave no digits for a sum with the small logarithm.
    tl.store(logprobs + row, (own - own_top) - tl.log(own_total))
    if PENALTY:
        tl.store(seen + token, 1)


# ---- the two kernels -----------------------------------------------------------------------------
@triton.jit
def _choose(
    logits, u, seen, tokens, logprobs, V, row_stride, temperature, penalty,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):
    """Without cuts: the largest logit, or a draw from the whole distribution."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits += row * row_stride
    seen += row * V
    best, top, total, own_top, own_total = _sweep(logits, seen, V, temperature, penalty, PENALTY, BLOCK)

    aim = tl.load(u + row) * total
    before, first, last = 0.0, NO_ID, 0
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
        if GREEDY:
            first = tl.minimum(first, tl.min(tl.where(z == top, start + lane, NO_ID)))
        else:
            before, first, last = _draw(tl.exp(z - top), start + lane, before, aim, first, last)
    _write(row, logits, seen, tokens, logprobs, first, last, V, temperature, own_top, own_total, PENALTY)


@triton.jit
def _choose_cut(
    logits, u, seen, tokens, logprobs, maxima, kept, kept_ids, V, row_stride,
    temperature, penalty, top_k, top_p, log_min_p,
    PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):
    """With cuts. `maxima` (B, BLOCK) has room for lanes' bests, `kept`, `kept_ids` (B, V) for candidates."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits += row * row_stride
    seen += row * V
    maxima += row * BLOCK
    kept += row * V
    kept_ids += row * V
    best, top, total, own_top, own_total = _sweep(logits, seen, V, temperature, penalty, PENALTY, BLOCK)

    # A lower bound of every survivor: what min-p leaves, raised by the lanes' maxima.
    lowest = tl.maximum(top + log_min_p, LOWEST)
    bound = lowest
    tl.store(maxima + lane, best)
    tl.debug_barrier()  # Triton's block barrier: a lane reads what the others wrote
    if top_k > 0:
        bound = _threshold(maxima, BLOCK, top_k, lowest, top, False, BLOCK)
    elif top_p < 1:
        bound = _threshold(maxima, BLOCK, top_p * total, lowest, top, True, BLOCK)

    # The second sweep collects, in vocabulary order, what reaches the bound, and sums what min-p leaves.
    n = 0
    left = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, temperature, penalty, PENALTY)
        left += tl.where(z >= lowest, tl.exp(z - top), 0.0)
        candidate = ((start + lane < V) & (z >= bound)).to(tl.int32)
        to = n + tl.cumsum(candidate) - 1
        tl.store(kept + to, z, candidate > 0)
        tl.store(kept_ids + to, start + lane, candidate > 0)
        n += tl.sum(candidate)
    tl.debug_barrier()

    # The cuts, each on what the one before has left.
    mass = tl.sum(left)
    cut = bound
    if top_k > 0:
        cut = _threshold(kept, n, top_k, bound, top, False, BLOCK)
        mass = _mass(kept, n, cut, top, True, BLOCK)
    if top_p < 1:
        cut = _threshold(kept, n, top_p * mass, cut, top, True, BLOCK)
        mass = _mass(kept, n, cut, top, True, BLOCK)

    aim = tl.load(u + row) * mass
    before, first, last = 0.0, NO_ID, 0
    for start in range(0, n, BLOCK):
        at = start + lane
        z = tl.load(kept + at, at < n, float("-inf"))
        ids = tl.load(kept_ids + at, at < n, 0)
        p = tl.where(z >= cut, tl.exp(z - top), 0.0)
        before, first, last = _draw(p, ids, before, aim, first, last)
    _write(row, logits, seen, tokens, logprobs, first, last, V, temperature, own_top, own_total, PENALTY)


def next_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=None):
    """As `reference.next_tokens`. With cuts it takes 8 more bytes per logit for what it collects."""
    B, V = logits.shape
    device = logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    penalised = seen is not None
    marks = seen.view(torch.uint8) if penalised else logits  # without a penalty never read
    tokens = torch.empty(B, device=device, dtype=torch.long)
    logprobs = torch.empty(B, device=device)
    greedy = temperature == 0
    temperature = float(temperature or 1)
    BLOCK = min(4096, triton.next_power_of_2(V))
    warps = max(1, BLOCK // 256)
    top_k = top_k if top_k < V else 0
    if greedy or not (top_k or top_p < 1 or min_p):
        _choose[(B,)](
            logits, u, marks, tokens, logprobs, V, logits.stride(0), temperature, float(penalty),
            greedy, penalised, BLOCK, num_warps=warps)
        return tokens, logprobs
    maxima = torch.empty(B, BLOCK, device=device)
    kept = torch.empty(B, V, device=device)
    kept_ids = torch.empty(B, V, device=device, dtype=torch.int32)
    log_min_p = math.log(min_p) if min_p else float("-inf")
    _choose_cut[(B,)](
        logits, u, marks, tokens, logprobs, maxima, kept, kept_ids, V, logits.stride(0),
        temperature, float(penalty), top_k, float(top_p), log_min_p, penalised, BLOCK, num_warps=warps)
    return tokens, logprobs
