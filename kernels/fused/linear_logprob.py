"""Log-probability of a target, and entropy, straight from the hidden state: tiles of logits, never stored.

    z = h W^T / T      lse = log sum_j exp z_j      logp = z_target - lse
    p = exp(z - lse)   entropy = -sum_j p_j log p_j

Forward: a program walks a part of the vocabulary with a block of rows, and for each row keeps a running
maximum m, and l and e, the sums of exp(z - m) and exp(z - m) (z - m), adjusted whenever m rises. With m' > m
and f = exp(m - m'):

    l' = f l + ...        e' = f (e + l (m - m')) + ...
    and over the parts:   -entropy = sum exp(m - lse) (e + l (m - lse))

Backward, with an upstream gradient g of each token (so that nothing can be prepared in the forward pass):

    d_j = g / T ([j = target] - p_j)         dh = d W         dW = d^T h

The tile of z is computed again and becomes one of d; d of one part of the *vocabulary* at a time goes through
two plain matrix products. Each part then owns its rows of dW, whole and summed in float32 by the product;
only dh (small) is added up.

Memory for 16k tokens, 152k entries, C = 896 in bfloat16: d 0.5 GB at a time and dW 0.3 GB. Dense: 5 GB of
logits, 10 GB of them in float32, 10 GB of log-probabilities, and their gradients. Work: 2 N V C flops four
times; dense, three times. The entropy is a measurement and has no gradient. After Cut Cross-Entropy (Wijmans
et al. 2024), which adds dh and dW up by atomics in the tiles themselves, and so can skip a tile whose
probabilities are all under the precision of the sums. In a vocabulary's own order next to none is (0.2% of
them, docs/log.md), so nothing is skipped here.
"""
import torch
import triton
import triton.language as tl

D_BYTES = 512 << 20  # of d at a time
GRAIN = 256  # parts of the vocabulary are multiples of this many entries, and every COLS divides it

SQUARE = triton.Config({"ROWS": 128, "COLS": 128, "DEEP": 64}, num_warps=8, num_stages=3)
WIDE = triton.Config({"ROWS": 128, "COLS": 256, "DEEP": 64}, num_warps=8, num_stages=3)
# For float32, and for cards with less shared memory.
SMALL = triton.Config({"ROWS": 64, "COLS": 128, "DEEP": 32}, num_warps=4, num_stages=3)
TINY = triton.Config({"ROWS": 16, "COLS": 32, "DEEP": 16})  # the interpreter, which cannot time
CONFIGS = [TINY] if triton.knobs.runtime.interpret else [SQUARE, WIDE, SMALL]


def suited(configs, given, **_):
    """Float32 runs without tensor cores: large tiles would only spill, and take long to compile."""
    return [SMALL] if SMALL in configs and given["hidden"].dtype == torch.float32 else configs


def size_class(N):
    """A tile that suits 16,000 rows does not suit 16: each power of 4 is timed by itself."""
    return N.bit_length() // 2


# The timings are kept on disk, so that a run that is resumed there chooses the same order of sums.
tune = triton.autotune(
    CONFIGS, key=["V", "C", "size"], prune_configs_by={"early_config_prune": suited}, cache_results=True)


@triton.jit
def _tile(hidden, weight, rows, cols, N, V, C, ROWS: tl.constexpr, COLS: tl.constexpr, DEEP: tl.constexpr):
    """hidden[rows] @ weight[cols].T in float32.

    Offsets are 64-bit: vocabulary times width comes near 2^31.
    """
    acc = tl.zeros((ROWS, COLS), tl.float32)
    c = tl.arange(0, DEEP)
    h = hidden + rows.to(tl.int64)[:, None] * C + c[None, :]
    w = weight + cols.to(tl.int64)[None, :] * C + c[:, None]
    for start in range(0, C, DEEP):
        a = tl.load(h + start, (rows < N)[:, None] & (start + c < C)[None, :], 0.0)  # (ROWS, DEEP)
        b = tl.load(w + start, (cols < V)[None, :] & (start + c < C)[:, None], 0.0)  # (DEEP, COLS)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@tune
@triton.jit(do_not_specialize=["size"])
def _forward(
    hidden, weight, targets, top, sums, dots, hits, N, V, C, entries, temperature, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEEP: tl.constexpr,
):
    """m, l, e and the target's z (if it lies here) of each row, over `entries` of the vocabulary."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    target = tl.load(targets + rows, rows < N, -1)
    m = tl.full((ROWS,), -1e30, tl.float32)  # not -inf: 0 times it must be 0
    l = tl.zeros((ROWS,), tl.float32)
    e = tl.zeros((ROWS,), tl.float32)
    hit = tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(part * entries + entries, V)
    for start in range(part * entries, end, COLS):
        cols = start + tl.arange(0, COLS)
        z = _tile(hidden, weight, rows, cols, N, V, C, ROWS, COLS, DEEP) / temperature
        hit += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        z = tl.where((cols < V)[None, :], z, -1e30)
        higher = tl.maximum(m, tl.max(z, 1))
        z -= higher[:, None]
        p = tl.exp(z)
        fade = tl.exp(m - higher)
        e = fade * (e + l * (m - higher)) + tl.sum(p * z, 1)
        l = fade * l + tl.sum(p, 1)
        m = higher
    at = part.to(tl.int64) * N + rows
    tl.store(top + at, m, rows < N)
    tl.store(sums + at, l, rows < N)
    tl.store(dots + at, e, rows < N)
    tl.store(hits + at, hit, rows < N)


@tune
@triton.jit(do_not_specialize=["size"])
def _backward(
    hidden, weight, targets, lse, grad, d, first, N, V, C, width, pitch, temperature, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEEP: tl.constexpr,
):
    """d for the `width` entries of the vocabulary from `first` on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    local = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cols = tl.where(local < width, first + local, V)
    z = _tile(hidden, weight, rows, cols, N, V, C, ROWS, COLS, DEEP) / temperature
    p = tl.exp(z - tl.load(lse + rows, rows < N, 0.0)[:, None])
    target = tl.load(targets + rows, rows < N, -1)
    hit = tl.where(cols[None, :] == target[:, None], 1.0, 0.0)
    g = tl.load(grad + rows, rows < N, 0.0)[:, None]
    mask = (rows < N)[:, None] & (local < width)[None, :]
    tl.store(d + rows.to(tl.int64)[:, None] * pitch + local[None, :], g / temperature * (hit - p), mask)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, parts):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        N, C = hidden.shape
        V = len(weight)
        if not parts:  # few rows: cut the vocabulary, to fill the card
            parts = max(1, min(64, 512 // triton.cdiv(max(N, 1), 128)))
        entries = triton.cdiv(V, parts * GRAIN) * GRAIN
        parts = triton.cdiv(V, entries)
        m, l, e, hit = torch.empty(4, parts, N, device=hidden.device)
        if N:
            _forward[lambda meta: (triton.cdiv(N, meta["ROWS"]), parts)](
                hidden, weight, targets, m, l, e, hit, N, V, C, entries, temperature, size_class(N))
        lse = torch.logsumexp(m + l.log(), 0)  # (N,)
        entropy = -((m - lse).exp() * (e + l * (m - lse))).sum(0)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return hit.sum(0) - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad = grad.contiguous()
        N, C = hidden.shape
        V = len(weight)
        dh = torch.zeros(N, C, device=hidden.device)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bytes_an_entry = max(N, 1) * hidden.element_size()
        entries = max(GRAIN, D_BYTES // bytes_an_entry // GRAIN * GRAIN)
        for first in range(0, V if N else 0, entries):
            part = weight[first:first + entries]
            width = len(part)
            # A pitch that is a round number: with an odd one, as the last part's often is, the products below
            # are slow.
            pitch = triton.cdiv(width, 64) * 64
            d = torch.empty(N, pitch, device=hidden.device, dtype=hidden.dtype)[:, :width]

            def grid(meta, width=width):
                return triton.cdiv(N, meta["ROWS"]), triton.cdiv(width, meta["COLS"])

            _backward[grid](
                hidden, weight, targets, lse, grad, d, first, N, V, C, width, pitch, ctx.temperature,
                size_class(N))
            dh += d @ part
            if dw is not None:
                torch.mm(d.T, hidden, out=dw[first:first + entries])
        return dh.to(hidden.dtype), dw, None, None, None


def linear_logprob(hidden, weight, targets, temperature=1.0, parts=0):
    """As `reference.linear_logprob`.

    `parts`: how many to cut the vocabulary into in the forward pass; 0 fills the card.
    """
    return _LinearLogprob.apply(hidden, weight, targets, float(temperature), parts)
