"""Each operation in plain PyTorch, with its equation. Letters in shapes:

    B rows (sequences)   T tokens of a row     N tokens, flattened    C width       V vocabulary
    H query heads        K key/value heads     D head width           S cached positions
"""
import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (Zhang & Sennrich 2019)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), in the half-split order of Hugging Face weights.

    x (B, T, H, D); cos, sin (B or 1, T, 1, D/2) in float32.  With x = [a, b] split in the middle of D:
    [a cos - b sin, b cos + a sin].
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def swiglu(gate, up):
    """silu(gate) * up, with silu(g) = g * sigmoid(g) (Shazeer 2020)."""
    return F.silu(gate) * up


def decode_attention(q, k, v, lengths):
    """One new token a row over its cached past: softmax(q k^T / sqrt(D)) v, row b over positions 0..lengths[b]-1.

    q (B, H, D); k, v (B, K, S, D) with K dividing H; lengths (B,) in 1..S. Returns (B, H, D).
    """
    B, H, D = q.shape
    K, S = k.shape[1], k.shape[2]
    # The H/K query heads that share a key head become the rows of one small matrix: the cache is read once for all.
    q = q.view(B, K, H // K, D)
    past = torch.arange(S, device=q.device) < lengths[:, None]  # (B, S)
    if q.is_cuda:  # fused: a bfloat16 product would round the scores, and the trainer's attention does not
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past[:, None, None]).view(B, H, D)
    scores = (q.float() * D**-0.5) @ k.float().transpose(-1, -2)  # (B, K, H/K, S)
    scores = scores.masked_fill_(~past[:, None, None], float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).view(B, H, D)


def uniform(key, position):
    """A number in [0, 1) that depends on (key, position) only: the splitmix64 mixer (Steele et al. 2014).

    key, position: int64 (B,), any values. Returns float32 (B,) on a grid of 2**-24. Integer arithmetic wraps modulo 2**64,
    the same on every device.
    """
    x = key + (position + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # the masks make >> a logical shift
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return (x >> 40 & 0xFFFFFF).float() * 2.0**-24


def next_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Choose a token a row by inverting the cumulative distribution at `u`, one uniform number a row.

    logits (B, V) float32, overwritten; u (B,) in [0, 1). The cuts come in the order of vLLM: temperature, min-p, top-k,
    top-p. Temperature 0 takes the largest logit. Returns tokens (B,) int64 and their log-probabilities (B,) under
    softmax(logits / temperature) *before* the cuts: the number a trainer recomputes (for temperature 0, at temperature 1).
    """
    if temperature not in (0, 1):
        logits.div_(temperature)
    p = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif not top_k and top_p == 1 and not min_p:
        tokens = _invert(p, u)
    else:
        V = p.shape[1]
        # Sorting a whole vocabulary is slow. The largest 1,024 nearly always hold all that the cuts keep; if not, sort.
        for k in (min(top_k or 1024, V), V):
            head, order = p.topk(k, dim=-1)  # descending
            if top_k:
                head = head / head.sum(-1, keepdim=True)
            mass = head.cumsum(-1)
            if top_k or k == V or bool(((mass[:, -1] >= top_p) & (top_p < 1) | (head[:, -1] < min_p * head[:, 0])).all()):
                break
        # min-p compares with the likeliest token; top-p keeps the shortest head whose mass reaches top_p.
        head = head * ((mass - head < top_p) & (head >= min_p * head[:, :1]))
        tokens = order.gather(1, _invert(head, u))
    return tokens[:, 0], p.gather(1, tokens).log()[:, 0]


def _invert(p, u):
    """The first index whose cumulative weight exceeds u * total. p (B, V) unnormalised; returns (B, 1)."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    aim = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach total
    return torch.searchsorted(cdf, aim, right=True).clamp_(max=p.shape[1] - 1)  # the clamp is for NaN, which the caller reports


CHUNK_BYTES = 128 << 20  # of float32 logits at a time: 220 rows of a 152k vocabulary, 680 of SmolLM2's 49k


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """Log-probability of `targets` and entropy of softmax(hidden @ weight.T / temperature), without holding the logits.

    hidden (N, C), weight (V, C), targets (N,) in 0..V-1. Returns (logp, entropy), each (N,) float32; the entropy is a
    measurement and has no gradient.
    A batch of 16k tokens over 152k entries would be 10 GB of float32 logits, twice with its gradient; here at most
    CHUNK_BYTES live at once, and the backward pass computes them again (one third more work on the head alone).

    With z = logits / T and p = softmax(z):   d logp_t / d z_j = [j = t] - p_j
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logp, entropy, total = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in _chunks(hidden, weight):
            z = (hidden[rows] @ weight.T).float().div_(temperature)  # (n, V)
            total[rows] = z.logsumexp(-1)
            z -= total[rows, None]  # log p
            logp[rows] = z.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -(z.exp() * z.clamp_(min=-1e4)).sum(-1)  # the clamp: 0 * -inf is 0 here
        ctx.save_for_backward(hidden, weight, targets, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, total = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None  # float32: a sum over chunks
        for rows in _chunks(hidden, weight):
            p = (hidden[rows] @ weight.T).float().div_(ctx.temperature).sub_(total[rows, None]).exp_()  # (n, V)
            g = grad_logp[rows, None]
            dz = p.mul_(-g).scatter_add_(1, targets[rows, None], g).div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = dz @ weight
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(dz.T, hidden[rows])
                else:
                    grad_weight += dz.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(hidden, weight):
    """Slices of rows whose float32 logits fit CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * len(weight)))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]
