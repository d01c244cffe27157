"""The choice of the next token, one program per row: no sort, no host sync, a draw that is reproducible.

    z = logits, those of seen tokens penalised      p = exp((z - max z) / temperature)
    token = the first i in vocabulary order with  p_0 + ... + p_i > u sum p,  over those that survive the cuts

Without cuts, one sweep stores the largest logit and the mass of each block of BLOCK logits. The sums of the
masses tell in which block the draw ends, and only that block is read again.

The cuts need a threshold, not an order. Top-k keeps z >= t with t the largest value that k logits reach;
top-p the same with probability mass in place of a count. Both are bisections over the float32 values, at most
32 halvings, exact up to the rounding of the mass. To bisect few numbers, a lower bound comes first: the
threshold of the lanes' maxima, a subset of the row (a lane is one of BLOCK positions that run in parallel and
see every BLOCK-th logit). A second sweep collects the logits that reach this bound, and only they are
bisected. In practice they are some dozens; where the maxima hold less than the
mass that top-p asks for, as in a flat distribution, the whole row is collected.

Bytes for a row of V float32 logits: 4 V and a block without cuts, 8 V with them (and V for each sweep with a
penalty). A sort would move 16 V or more, several times.
"""
import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every logit that counts; -inf would give inf - inf
NO_ID = tl.constexpr(2**31 - 1)  # no id yet


# ---- pieces --------------------------------------------------------------------------------------
@triton.jit
def _read(logits, seen, at, V, penalty, PENALTY: tl.constexpr):
    """(the logits to draw from, the model's own)."""
    own = tl.load(logits + at, at < V, float("-inf")).to(tl.float32)
    z = own
    if PENALTY:
        marked = tl.load(seen + at, at < V, 0) != 0
        z = tl.where(marked, tl.where(z > 0, z / penalty, z * penalty), z)
    return z, own


@triton.jit
def _block_mass(z, cold):
    """(the largest of a block of logits, the mass in relation to it)."""
    best = tl.maximum(tl.max(z), LOWEST)
    return best, tl.sum(tl.exp((z - best) * cold))


@triton.jit
def _sweep(logits, seen, bests, masses, V, cold, penalty, PENALTY: tl.constexpr, BLOCK: tl.constexpr):
    """Write each block's largest logit and mass. Returns (each lane's largest, own largest, own mass)."""
    lane = tl.arange(0, BLOCK)
    lanes = tl.full((BLOCK,), LOWEST, tl.float32)
    own_top = tl.max(lanes)
    own_total = 0.0
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, penalty, PENALTY)
        lanes = tl.maximum(lanes, z)
        best, mass = _block_mass(z, cold)
        tl.store(bests + start // BLOCK, best)
        tl.store(masses + start // BLOCK, mass)
        if PENALTY:
            best, mass = _block_mass(own, cold)
        higher = tl.maximum(own_top, best)
        own_total = own_total * tl.exp((own_top - higher) * cold) + mass * tl.exp((best - higher) * cold)
        own_top = higher
    tl.debug_barrier()  # Triton's block barrier: a lane reads what the others wrote
    return lanes, own_top, own_total


@triton.jit
def _blocks(bests, masses, V, cold, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """What `_sweep` wrote: (each block's largest logit, the row's, each block's mass in relation to it)."""
    j = tl.arange(0, BLOCKS)
    best = tl.load(bests + j, j * BLOCK < V, LOWEST)
    top = tl.max(best)
    mass = tl.load(masses + j, j * BLOCK < V, 0.0)
    return best, top, mass * tl.exp((best - top) * cold)


@triton.jit
def _mass(values, n, t, top, cold, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the first n values reach t, or their mass."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(values + at, at < n, float("-inf"))
        found += tl.where((at < n) & (z >= t), tl.exp((z - top) * cold) if MASS else 1.0, 0.0)
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
def _threshold(values, n, goal, lowest, top, cold, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t in lowest..top that enough of the first n values reach; `lowest` if none does."""
    low = _sortable(lowest)
    high = _sortable(top) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = _mass(values, n, _unsortable(middle), top, cold, MASS, BLOCK) >= goal
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
    row, logits, seen, tokens, logprobs, first, last, V, cold, own_top, own_total, PENALTY: tl.constexpr,
):
    # Rounding may leave the aim just out of reach.
    token = tl.minimum(tl.where(first == NO_ID, last, first), V - 1)
    own = tl.load(logits + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    # The difference first: logits of -30,000 leave no digits for a sum with the small logarithm.
    tl.store(logprobs + row, (own - own_top) * cold - tl.log(own_total))
    if PENALTY:
        tl.store(seen + token, 1)


# ---- the two kernels -----------------------------------------------------------------------------
# `cold` is 1 / temperature. `bests` and `masses` (B, BLOCKS) have room for what a sweep finds in each block.
@triton.jit
def _choose(
    logits, u, seen, tokens, logprobs, bests, masses, V, row_stride, cold, penalty,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    """Without cuts: the largest logit, or a draw from the whole distribution."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    seen += row * V
    bests += row * BLOCKS
    masses += row * BLOCKS
    _, own_top, own_total = _sweep(logits, seen, bests, masses, V, cold, penalty, PENALTY, BLOCK)

    # In which block it ends: as in `_draw`, by the blocks' masses.
    j = tl.arange(0, BLOCKS)
    best, top, mass = _blocks(bests, masses, V, cold, BLOCK, BLOCKS)
    aim = tl.load(u + row) * tl.sum(mass)
    if GREEDY:
        block = tl.min(tl.where(best == top, j, BLOCKS - 1))
    else:
        _, block, last = _draw(mass, j, 0.0, aim, NO_ID, 0)
        block = tl.where(block == NO_ID, last, block)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    z, own = _read(logits, seen, ids, V, penalty, PENALTY)
    if GREEDY:
        first = tl.min(tl.where(z == top, ids, NO_ID))
        last = 0
    else:
        before = tl.sum(tl.where(j < block, mass, 0.0))
        _, first, last = _draw(tl.exp((z - top) * cold), ids, before, aim, NO_ID, 0)
    _write(row, logits, seen, tokens, logprobs, first, last, V, cold, own_top, own_total, PENALTY)


@triton.jit
def _choose_cut(
    logits, u, seen, tokens, logprobs, bests, masses, maxima, kept, kept_ids, V, row_stride,
    cold, penalty, top_k, top_p,
    PENALTY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    """With cuts. `maxima` (B, BLOCK) has room for lanes' bests, `kept`, `kept_ids` (B, V) for candidates."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits += row * row_stride
    seen += row * V
    bests += row * BLOCKS
    masses += row * BLOCKS
    maxima += row * BLOCK
    kept += row * V
    kept_ids += row * V
    lanes, own_top, own_total = _sweep(logits, seen, bests, masses, V, cold, penalty, PENALTY, BLOCK)
    _, top, mass = _blocks(bests, masses, V, cold, BLOCK, BLOCKS)

    # A lower bound of every survivor, by the lanes' maxima.
    bound = tl.full((), LOWEST, tl.float32)
    tl.store(maxima + lane, lanes)
    tl.debug_barrier()
    if top_k > 0:
        bound = _threshold(maxima, BLOCK, top_k, bound, top, cold, False, BLOCK)
    elif top_p < 1:
        bound = _threshold(maxima, BLOCK, top_p * tl.sum(mass), bound, top, cold, True, BLOCK)

    # The second sweep collects, in vocabulary order, what reaches the bound.
    n = 0
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z, own = _read(logits, seen, start + lane, V, penalty, PENALTY)
        candidate = ((start + lane < V) & (z >= bound)).to(tl.int32)
        to = n + tl.cumsum(candidate) - 1
        tl.store(kept + to, z, candidate > 0)
        tl.store(kept_ids + to, start + lane, candidate > 0)
        n += tl.sum(candidate)
    tl.debug_barrier()

    # The cuts, each on what the one before has left.
    left_mass = tl.sum(mass)
    cut = bound
    if top_k > 0:
        cut = _threshold(kept, n, top_k, bound, top, cold, False, BLOCK)
        left_mass = _mass(kept, n, cut, top, cold, True, BLOCK)
    if top_p < 1:
        cut = _threshold(kept, n, top_p * left_mass, cut, top, cold, True, BLOCK)
        left_mass = _mass(kept, n, cut, top, cold, True, BLOCK)

    aim = tl.load(u + row) * left_mass
    before, first, last = 0.0, NO_ID, 0
    for start in range(0, n, BLOCK):
        at = start + lane
        z = tl.load(kept + at, at < n, float("-inf"))
        ids = tl.load(kept_ids + at, at < n, 0)
        p = tl.where(z >= cut, tl.exp((z - top) * cold), 0.0)
        before, first, last = _draw(p, ids, before, aim, first, last)
    _write(row, logits, seen, tokens, logprobs, first, last, V, cold, own_top, own_total, PENALTY)


def next_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, seen=None):
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
    BLOCKS = triton.next_power_of_2(triton.cdiv(V, BLOCK))
    warps = max(1, BLOCK // 256)
    bests, masses = torch.empty(2, B, BLOCKS, device=device)
    top_k = top_k if top_k < V else 0
    if greedy or not (top_k or top_p < 1):
        _choose[(B,)](
            logits, u, marks, tokens, logprobs, bests, masses, V, logits.stride(0), 1 / temperature,
            float(penalty), greedy, penalised, BLOCK, BLOCKS, num_warps=warps)
        return tokens, logprobs
    maxima = torch.empty(B, BLOCK, device=device)
    kept = torch.empty(B, V, device=device)
    kept_ids = torch.empty(B, V, device=device, dtype=torch.int32)
    _choose_cut[(B,)](
        logits, u, marks, tokens, logprobs, bests, masses, maxima, kept, kept_ids, V, logits.stride(0),
        1 / temperature, float(penalty), top_k, float(top_p), penalised, BLOCK, BLOCKS, num_warps=warps)
    return tokens, logprobs
