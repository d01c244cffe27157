"""Rule 18: every operation, in PyTorch and in Triton, equals its equation in float64, with gradients.

On a machine without a GPU the Triton kernels run in Triton's interpreter, in float32 (it rounds bfloat16
products wrongly). On a GPU they run for real, in float32 and bfloat16, and fresh memory is poisoned with NaN
first.
"""
import importlib
import math

import pytest
import torch

from kernels import reference

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

both = pytest.mark.parametrize("kind", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operation(name, kind):
    module = reference if kind == "reference" else importlib.import_module(f"kernels.fused.{name}")
    return getattr(module, name)


def random(*shape, dtype=torch.float32, seed=0, apart=False):
    """Normal numbers on the device; `apart`: a view whose rows are not side by side."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape[:-1], shape[-1] + (3 if apart else 0), generator=generator)
    return x.to(DEVICE, dtype)[..., :shape[-1]]


def poison():
    """What torch.empty hands out next is likely NaN: a kernel that leaves a value unwritten is found out."""
    blocks = [torch.full((n,), float("nan"), device=DEVICE) for n in (64, 4096, 1 << 18, 1 << 18, 1 << 22)]
    del blocks


def close(got, want, dtype, what):
    error = (got.double() - want).abs().max().item()
    scale = max(1.0, want.abs().max().item())
    # NaN fails.
    assert error <= TOLERANCE[dtype] * scale, f"{what} is off by {error:.2e} where values reach {scale:.1f}"


def differentiable(x):
    return torch.is_tensor(x) and x.is_floating_point()


def gradients(outputs, inputs, upstream):
    pairs = [(out, up) for out, up in zip(outputs, upstream, strict=True) if out.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    leaves = [x for x in inputs if differentiable(x)]
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def check(ours, exact, inputs, dtype):
    """Values and gradients of ours(*inputs) against exact(*inputs) in float64.

    Each output has an upstream gradient of its own, which is not contiguous.
    """
    given = [x.detach().requires_grad_() if differentiable(x) else x for x in inputs]
    wide = [x.detach().double().requires_grad_() if differentiable(x) else x for x in inputs]
    poison()
    got = ours(*given)
    want = exact(*wide)
    upstream = []
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, dtype, f"output {i}")
        upstream.append(random(*w.shape[:-1], 2 * w.shape[-1], dtype=g.dtype, seed=9 + i)[..., ::2])
    poison()
    got = gradients(got, given, upstream)
    want = gradients(want, wide, [u.double() for u in upstream])
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if w is not None:
            close(g, w, dtype, f"gradient {i}")


# ---- the layers ----------------------------------------------------------------------------------
def exact_norm(x, w, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


@both
@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 32), (1, 1, 896), (7, 131), (1025, 1024)], ids=str)
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(kind, dtype, shape, add):
    def exact(x, delta, w, eps):
        s = x if delta is None else x + delta
        return s, exact_norm(s, w, eps)

    x = random(*shape, dtype=dtype, apart=True)
    delta = random(*shape, dtype=dtype, seed=1, apart=True) if add else None
    w = random(shape[-1], dtype=dtype, seed=2)
    check(operation("add_norm", kind), exact, (x, delta, w, 1e-6), dtype)


@both
@dtypes
@pytest.mark.parametrize("shape, norm, shared", [
    ((2, 5, 4, 2, 16), True, True), ((1, 3, 14, 2, 64), False, True), ((3, 1, 3, 1, 24), True, False),
    ((2, 5, 4, 2, 16), False, False)], ids=str)
def test_rotate(kind, dtype, shape, norm, shared):
    """`shared`: one row of angles for the whole batch. The exact rotation is a product of complex numbers."""
    B, T, H, K, D = shape
    angle = 5 * random(1 if shared else B, T, 1, D // 2)
    turn = torch.polar(torch.ones_like(angle).double(), angle.double())

    def turned(x, w):
        x = exact_norm(x, w, 1e-6) if norm else x
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((z.real, z.imag), -1)

    def exact(q, k, cos, sin, wq, wk):
        return turned(q, wq), turned(k, wk)

    def ours(q, k, cos, sin, wq, wk):
        cos, sin = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (cos, sin))
        return operation("rotate", kind)(q, k, cos, sin, (wq, wk) if norm else None, 1e-6)

    q = random(B, T, H, D, dtype=dtype, apart=True)
    k = random(B, T, K, D, dtype=dtype, seed=1)
    wq, wk = random(D, dtype=dtype, seed=2), random(D, dtype=dtype, seed=3)
    check(ours, exact, (q, k, angle.cos(), angle.sin(), wq, wk), dtype)


@both
@dtypes
@pytest.mark.parametrize("shape", [(1,), (3, 1024), (5, 7, 131)], ids=str)
def test_swiglu(kind, dtype, shape):
    def exact(gate, up):
        return [gate / (1 + (-gate).exp()) * up]

    def ours(gate, up):
        return [operation("swiglu", kind)(gate, up)]

    gate = 3 * random(*shape, dtype=dtype, apart=True)
    check(ours, exact, (gate, random(*shape, dtype=dtype, seed=1)), dtype)


# ---- decode attention ----------------------------------------------------------------------------
def exact_decode_attention(q, k, v, past_k, past_v, lengths):
    rows = []
    for b, n in enumerate(lengths.tolist()):
        group = q.shape[1] // k.shape[1]
        keys = torch.cat((past_k[b, :, :n], k[b, :, None]), 1).double()  # (K, n + 1, D)
        values = torch.cat((past_v[b, :, :n], v[b, :, None]), 1).double()
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))  # (H, n + 1, D)
        scores = torch.einsum("hd,hsd->hs", q[b].double(), keys) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@both
@dtypes
@pytest.mark.parametrize("H, K, D, parts", [(4, 2, 16, 0), (14, 2, 64, 3), (3, 3, 24, 5), (5, 1, 128, 1)])
def test_decode_attention(kind, dtype, H, K, D, parts):
    """From no past at all to a full slot, in a slice of a larger cache that holds NaN beyond the past."""
    lengths = torch.tensor([0, 1, 63, 64, 65, 199], device=DEVICE)
    B, S = len(lengths), 200
    caches = [random(B + 2, K, S, D, dtype=dtype, seed=i) for i in (1, 2)]
    q = random(B, H, D, dtype=dtype, apart=True)
    k = random(B, K, D, dtype=dtype, seed=3, apart=True)
    v = random(B, K, D, dtype=dtype, seed=4, apart=True)
    want = exact_decode_attention(q, k, v, *caches, lengths)
    before = [cache.clone() for cache in caches]
    if kind == "triton":
        for cache in caches:
            for b, n in enumerate(lengths.tolist()):
                cache[b, :, n:] = float("nan")
    poison()
    more = {"parts": parts} if kind == "triton" else {}
    got = operation("decode_attention", kind)(q, k, v, *(cache[:B] for cache in caches), lengths, **more)
    close(got, want, dtype, "output")
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(cache[b, :, n], new[b])  # the new token has joined
            assert torch.equal(cache[b, :, :n], old[b, :, :n])  # the past is what it was
        assert torch.equal(cache[B:], old[B:])


# ---- the choice of a token -----------------------------------------------------------------------
def splitmix(key, position):
    """The mixer on Python's unbounded integers."""
    mask = 2**64 - 1
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return ((x ^ x >> 31) >> 40) / 2**24


def test_uniform_is_splitmix64():
    """To the bit; and the numbers are spread evenly."""
    keys = [0, 1, -1, 2**62, -(2**63), 987654321] * 30
    positions = [0, 5, 7, 4096, 1, 100_000] * 30
    got = reference.uniform(torch.tensor(keys, device=DEVICE), torch.tensor(positions, device=DEVICE))
    assert got.tolist() == [splitmix(k, p) for k, p in zip(keys, positions, strict=True)]
    n = 100_000
    u = reference.uniform(torch.full((n,), 42, device=DEVICE), torch.arange(n, device=DEVICE)).cpu()
    assert abs(u.mean() - 0.5) < 0.005 and (u.histc(10, 0, 1) / 10_000 - 1).abs().max() < 0.05


def survivors(z, temperature, top_k, top_p):
    """The distribution after the cuts, in float64 by sorting and loops, as vLLM orders them.

    Equal logits stay or go together.
    """
    p = (z.double() / temperature).softmax(-1)
    if top_k:
        p = torch.where(p >= p.sort(descending=True).values[min(top_k, len(p)) - 1], p, 0)
    p = p / p.sum()
    out = torch.zeros_like(p)
    above = 0.0
    for value in p.unique().flip(0).tolist():
        if above < top_p:
            out[p == value] = value
        above += value * int((p == value).sum())
    return out / out.sum()


CUTS = [  # temperature, top-k, top-p
    (1.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.8), (0.7, 20, 0.8), (1.0, 3, 0.5), (1.5, 0, 0.9),
    (3.0, 0, 0.999), (1.0, 99999, 0.9),
]


@both
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("V, ties", [(40, False), (9001, False), (9001, True)])
def test_next_tokens_invert_the_distribution(kind, cuts, V, ties):
    """u near both ends and in the middle of a token's part of the distribution must draw it.

    Tried for the first and the last token that survive, the likeliest and one in between. `ties`: logits as a
    bfloat16 product leaves them, many of them equal.
    """
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(V))
    if ties:
        logits = (logits * 4).round() / 4
    want = survivors(logits, *cuts)
    alive = (want > 2e-5).nonzero()[:, 0]
    tried = torch.stack((alive[0], alive[len(alive) // 2], alive[-1], want.argmax())).repeat_interleave(3)
    inside = torch.tensor([0.95, 0.5, 0.05]).repeat(4)
    u = (want.cumsum(0)[tried] - want[tried] * inside).float()
    padding = torch.full((3,), 99.0)  # of the vocabulary, which must not be seen
    wide = torch.cat((logits, padding)).repeat(12, 1).to(DEVICE)
    poison()
    tokens, logp = operation("next_tokens", kind)(wide[:, :V], u.to(DEVICE), *cuts)
    assert tokens.tolist() == tried.tolist()
    exact = (logits.double() / cuts[0]).log_softmax(-1)[tried]
    close(logp.cpu(), exact, torch.float32, "log-probability")


@both
@pytest.mark.parametrize("cuts", [{}, {"top_k": 7, "top_p": 0.9}])
def test_extreme_u_and_logits(kind, cuts):
    """u just below 1 must not fall off the end, nor onto a token of probability 0."""
    next_tokens = operation("next_tokens", kind)
    ends = torch.tensor([0.0, 1 - 2**-24], device=DEVICE)
    for low in (-1e4, float("-inf")):
        logits = torch.full((2, 30), low, device=DEVICE)
        logits[:, [3, 17]] = 0.0
        assert next_tokens(logits, ends, **cuts)[0].tolist() == [3, 17]
    logits = random(40, 300)
    logits[:, 200:] = float("-inf")  # a sum that rounding leaves short of its aim must not end here
    tokens, logp = next_tokens(logits, torch.full((40,), 1 - 2**-24, device=DEVICE), **cuts)
    assert tokens.max() < 200 and logp.isfinite().all()


@both
@pytest.mark.parametrize("cuts", [{}, {"temperature": 0.01}, {"penalty": 1.0}])
def test_logprobs_of_far_logits(kind, cuts):
    """Logits of -30,000 once cost the log-probability a thousandth, at a low temperature four hundredths."""
    logits = (0.01 * random(6, 500).cpu().double() - 3e4).float()
    seen = {"seen": torch.zeros(6, 500, dtype=torch.bool, device=DEVICE)} if "penalty" in cuts else {}
    u = torch.rand(6, device=DEVICE)
    tokens, logp = operation("next_tokens", kind)(logits.clone().to(DEVICE), u, **cuts, **seen)
    exact = (logits.double() / cuts.get("temperature", 1)).log_softmax(-1)
    want = exact.gather(1, tokens.cpu()[:, None])[:, 0]
    close(logp.cpu(), want, torch.float32, "log-probability")


@both
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_repetition_penalty(kind, temperature):
    """vLLM's: positive logits of seen tokens are divided, negative ones multiplied.

    The choice is marked, in its own row only, and the log-probability is the model's own.
    """
    V, B = 5001, 4
    lower = torch.tensor([[0.0], [0.0], [15.0], [15.0]], device=DEVICE)  # two rows of negative logits
    logits = 3 * random(B, V) - lower
    seen = random(B, V, seed=1) > 0
    marks = seen.clone()
    want = torch.where(seen, torch.where(logits > 0, logits / 1.5, logits * 1.5), logits)
    u = torch.tensor([0.1, 0.4, 0.7, 0.99], device=DEVICE)
    padded = torch.cat((logits, torch.full((B, 5), 99.0, device=DEVICE)), 1)[:, :V]
    tokens, logp = operation("next_tokens", kind)(padded, u, temperature, top_k=50, penalty=1.5, seen=marks)
    if temperature == 0:
        assert torch.equal(tokens, want.argmax(-1))
    else:
        for b, token in enumerate(tokens.tolist()):
            cdf = survivors(want[b].cpu(), temperature, 50, 1.0).cumsum(0)
            assert cdf[token] - 1e-5 >= u[b].cpu() - 2e-5
            assert token == 0 or cdf[token - 1] <= u[b].cpu() + 1e-5
    seen[torch.arange(B, device=DEVICE), tokens] = True
    assert torch.equal(marks, seen)
    exact = (logits.double() / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    close(logp, exact, torch.float32, "log-probability")


def test_greedy_takes_the_first_of_equals():
    """Across blocks too, and from logits whose rows are columns in memory."""
    logits = random(9001, 3).T
    for row, equals in enumerate([[7, 8], [10, 8000], [4095, 4096, 9000]]):
        logits[row, equals] = 50.0
    tokens, _ = operation("next_tokens", "triton")(logits, torch.zeros(3, device=DEVICE), 0)
    assert tokens.tolist() == [7, 10, 4095]


@both
def test_broken_logits_are_reported(kind):
    """A NaN or an infinity in a row gives a log-probability that is not finite: the sampler stops there."""
    for bad in (float("nan"), float("inf")):
        logits = random(2, 700)
        logits[1, 300] = bad
        tokens, logp = operation("next_tokens", kind)(logits, torch.tensor([0.3, 0.6], device=DEVICE))
        assert logp[0].isfinite() and not logp[1].isfinite()
        assert tokens.min() >= 0 and tokens.max() < 700


# ---- the head ------------------------------------------------------------------------------------
@both
@dtypes
@pytest.mark.parametrize("N, V, C, parts", [
    (1, 40, 16, 0), (37, 301, 33, 3), (50, 700, 24, 1), (37, 301, 33, 0)])
def test_linear_logprob(kind, dtype, N, V, C, parts, monkeypatch):
    """Odd shapes, several parts of the vocabulary, and weights that are the first rows of a larger matrix."""
    if kind == "triton":
        monkeypatch.setattr(importlib.import_module("kernels.fused.linear_logprob"), "D_BYTES", 256 * N * 4)
    else:
        monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * V * 7)

    def exact(hidden, weight, targets, temperature):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(1, targets[:, None])[:, 0], entropy.detach()

    def ours(*inputs):
        more = {"parts": parts} if kind == "triton" else {}
        return operation("linear_logprob", kind)(*inputs, **more)

    hidden = random(N, C, dtype=dtype, apart=True)
    weight = random(V + 3, C, dtype=dtype, seed=1, apart=True)[:V]
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(N)).to(DEVICE)
    targets[0] = V - 1
    check(ours, exact, (hidden, weight, targets, 0.7), dtype)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_logits_are_never_held():
    """Rule 14 at a real vocabulary: 8k tokens would have 5 GB of float32 logits, and 5 of their gradient."""
    N, V = 8192, 151_665
    hidden = random(N, 256, dtype=torch.bfloat16).requires_grad_()
    weight = random(V, 256, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(N, dtype=torch.long, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    operation("linear_logprob", "triton")(hidden, weight, targets)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < N * V * 4 / 4


def test_no_rows_no_gradient():
    hidden = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    weight = random(40, 16).requires_grad_()
    targets = torch.zeros(0, dtype=torch.long, device=DEVICE)
    for kind in ("reference", "triton"):
        logp, entropy = operation("linear_logprob", kind)(hidden, weight, targets)
        _, y = operation("add_norm", kind)(hidden, None, weight[0], 1e-6)
        (logp.sum() + y.sum()).backward()
        assert logp.shape == entropy.shape == (0,)
        assert hidden.grad.shape == (0, 16) and not weight.grad.any()
