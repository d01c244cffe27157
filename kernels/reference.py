"""Each operation in plain PyTorch, with its equation. The letters of shapes are at the top of model.py."""
import torch
import torch.nn.functional as F
from torch import Tensor


# ---- the layers ----------------------------------------------------------------------------------
def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual add, and RMSNorm of the sum over the last dimension (Zhang & Sennrich 2019).

    s = x + delta (x itself if delta is None)      y = s / sqrt(mean(s^2) + eps) * weight

    Both are like x. The norm is computed in float32 and rounded before the weight, as transformers does.
    """
    s = x if delta is None else x + delta
    return s, _norm(s, weight, eps)


def _norm(x, weight, eps):
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms=None, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021) of queries and keys, in the half-split order of Hugging Face weights.

    q (B, T, H, D), k (B, T, K, D); cos, sin (B or 1, T, 1, D/2) in float32. With x = [a, b] split in the
    middle of D: [a cos - b sin, b cos + a sin]. `norms`, Qwen3's two weights (D,), are for an RMSNorm of each
    head before it.
    """
    if norms:
        q = _norm(q, norms[0], eps)
        k = _norm(k, norms[1], eps)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(g) = g * sigmoid(g) (Shazeer 2020)."""
    return F.silu(gate) * up


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, lengths: Tensor,
) -> Tensor:
    """The new token of each row joins the cache and attends to it: softmax(q k^T / sqrt(D)) v.

    q (B, H, D), k, v (B, K, D) of the new tokens, K dividing H; past_k, past_v (B, K, S, D), where row b has
    positions 0..lengths[b]-1 and gets the new one at lengths[b] < S. Returns (B, H, D).
    """
    B, H, D = q.shape
    K, S = past_k.shape[1:3]
    rows = torch.arange(B, device=q.device)
    past_k[rows, :, lengths] = k
    past_v[rows, :, lengths] = v
    # The H/K query heads that share a key head become the rows of one small matrix: no key is repeated.
    q = q.reshape(B, K, H // K, D)
    seen = torch.arange(S, device=q.device) <= lengths[:, None]  # (B, S)
    o = F.scaled_dot_product_attention(q, past_k, past_v, attn_mask=seen[:, None, None])  # (B, K, H/K, D)
    return o.reshape(B, H, D)


# ---- the choice of a token -----------------------------------------------------------------------
def uniform(key: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) that depends on (key, position) only: the splitmix64 mixer (Steele et al. 2014).

    key, position: int64 (B,), any values. Returns float32 (B,) on a grid of 2**-24. Integer arithmetic wraps
    modulo 2**64, the same on every device.
    """
    x = key + (position + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # the masks make >> a logical shift
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return (x >> 40 & 0xFFFFFF).float() * 2.0**-24


def next_tokens(
    logits: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a token per row by inverting the cumulative distribution at `u`, one uniform number each.

    logits (B, V) float32, may be overwritten; u (B,) in [0, 1). The cuts come in the order of vLLM:
    repetition penalty on the tokens marked in `seen` (B, V) bool (the choice is then marked too),
    temperature, top-k, top-p, each on what the one before has left; tokens of equal probability stay
    or go together. Temperature 0 takes the largest logit. Returns tokens (B,) int64 and their
    log-probabilities (B,) under softmax(logits / temperature) *before* penalty and cuts: the number a trainer
    recomputes (for temperature 0, at temperature 1).
    """
    if seen is not None:
        own = _cooled(logits.clone(), temperature)
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    p = _cooled(logits, temperature).softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
    else:
        tokens = _invert(_cut(p, top_k, top_p), u)
    if seen is None:
        return tokens[:, 0], p.gather(1, tokens).log()[:, 0]
    seen.scatter_(1, tokens, True)
    return tokens[:, 0], own.log_softmax(-1).gather(1, tokens)[:, 0]


def _cooled(logits, temperature):
    """logits / temperature up to a constant, in place: minus the maximum first, or large ones lose digits."""
    if temperature in (0, 1):
        return logits
    return logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)


def _cut(p, top_k, top_p):
    """The probabilities p (B, V), those that do not survive the cuts set to 0."""
    V = p.shape[1]
    if 0 < top_k < V:
        p = torch.where(p >= p.topk(top_k).values[:, -1:], p, 0)
    if top_p < 1:
        goal = top_p * p.sum(-1, keepdim=True)
        # The shortest head whose mass reaches the goal. Sorting a vocabulary is slow: the largest 1,024
        # nearly always do.
        for size in (min(top_k or 1024, V), V):
            head = p.topk(size).values
            mass = head.cumsum(-1)
            if size == V or bool((mass[:, -1:] >= goal).all()):
                break
        last_kept = (mass < goal).sum(-1, keepdim=True).clamp_(max=size - 1)
        p = torch.where(p >= head.gather(1, last_kept), p, 0)
    return p


def _invert(p, u):
    """The first index whose cumulative weight exceeds u * total. p (B, V) unnormalised; returns (B, 1)."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    just_below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach the total
    aim = torch.minimum(u[:, None] * total, just_below)
    last = p.shape[1] - 1
    # The clamp is for NaN, which the caller reports.
    return torch.searchsorted(cdf, aim, right=True).clamp_(max=last)


# ---- the head ------------------------------------------------------------------------------------
def linear_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (..., C) @ weight (V, C).T in float32, (..., V).

    On a GPU the product of bfloat16 is not rounded on its way out, as it is not in the trainer's kernel:
    rounded logits would part sampler and trainer by some hundredths of a nat.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
    return (hidden @ weight.T).float()


CHUNK_BYTES = 128 << 20  # of float32 logits at a time: 220 rows of a 152k vocabulary, 680 of SmolLM2's 49k


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy of softmax(hidden @ weight.T / temperature); no logits kept.

    hidden (N, C), weight (V, C), targets (N,) in 0..V-1. Returns (logp, entropy), each (N,) float32; the
    entropy is a measurement and has no gradient. At most CHUNK_BYTES of logits live at once; the backward
    pass computes them again (one third more work on the head alone).

    With z = logits / temperature and p = softmax(z):   d logp_t / d logit_j = ([j = t] - p_j) / temperature
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logp = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(logp)
        lse = torch.empty_like(logp)
        for rows in _chunks(hidden, weight):
            z = linear_float32(hidden[rows], weight).div_(temperature)  # (n, V)
            lse[rows] = z.logsumexp(-1)
            z -= lse[rows, None]  # now log p
            logp[rows] = z.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -(z.exp() * z.clamp_(min=-1e4)).sum(-1)  # the clamp: 0 * -inf is 0 here
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, device=weight.device)  # float32: a sum over chunks
        for rows in _chunks(hidden, weight):
            z = linear_float32(hidden[rows], weight).div_(ctx.temperature)  # (n, V)
            p = z.sub_(lse[rows, None]).exp_()
            g = grad_logp[rows, None]
            dz = p.mul_(-g).scatter_add_(1, targets[rows, None], g).div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = dz @ weight
            if grad_weight is None:
                continue
            if weight.dtype == torch.float32:  # in one pass; addmm_ takes no mixture of dtypes
                grad_weight.addmm_(dz.T, hidden[rows])
            else:
                grad_weight += dz.T @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _chunks(hidden, weight):
    """Slices of rows whose float32 logits fit CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * len(weight)))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]
