"""A Qwen transformer: blocks, head, config. Nothing about files or text (`checkpoint/` has those).

    hidden = model(tokens)                                     # (B, T) ids -> (B, T, C)
    model.logits(hidden[:, -1]).argmax(-1)                     # the likeliest next token of each row
    model.logprobs(hidden[0], targets)                         # what training needs: no logits are kept

One class serves Qwen2/2.5, Qwen3 and Llama 3 / SmolLM2. They differ in a few switches of the config (biases
on q, k, v and on o; a norm on q and k; a head tied to the embedding) and in the rotary frequencies.
Parameters have Hugging Face's names, so loading needs no mapping: hence `self.model` inside the model.

Letters in shape comments:

    B rows               T tokens of a row                   N tokens of several rows, flattened
    C width              V vocabulary
    H query heads        K key/value heads, dividing H       D head width
    S cached positions

Left out: sliding windows, mixture of experts, YaRN and other rotary scalings than Llama 3's, tensor
parallelism.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import add_norm, linear_float32, linear_logprob, rotate, swiglu

# torch on a GPU: cuDNN's attention plans for each new shape, which takes longer than the attention itself.
# A bfloat16 product that is split along its depth adds its parts in float32.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

# Attention is an argument of `forward`: (layer, q (B, T, H, D), k and v (B, T, K, D)) -> (B, T, H, D).
# Training passes `causal`; the sampler passes what its cache returns, which first writes k and v there.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, config: "Config", layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend):
        """(x, delta) -> (x, delta), each (B, T, C): the residual stream, and what is still to be added to it.

        The sum is left to the next norm, which reads x anyway.
        """
        x, h = self.input_layernorm(x, delta)
        x, h = self.post_attention_layernorm(x, self.self_attn(h, cos, sin, attend))
        return x, self.mlp(h)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm): the residual stream and what the next layer reads."""
        return add_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: "Config", layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = D
        self.eps = config.rms_norm_eps
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        # Only for their weights, with Hugging Face's names: `rotate` applies them.
        self.q_norm = RMSNorm(D, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, self.eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm else None
        q, k = rotate(q, k, cos, sin, norms, self.eps)
        o = attend(self.layer, q, k, v)  # (B, T, H, D)
        return self.o_proj(o.flatten(-2))  # (B, T, C)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token sees itself and what came before. The Attend of training.

    Rows padded on the right need no mask: no real token sees the padding.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2)  # (B, T, H, D)


def join_rows(attends: list[Attend], sizes: list[int]) -> Attend:
    """An Attend for one row that holds several, of `sizes` tokens, which see nothing of each other.

    So training needs no padding: all that is not attention runs on one flat row.
    """
    def attend(layer, q, k, v):  # each (1, sum of sizes, heads, D)
        parts = zip(attends, q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        return torch.cat([attend_part(layer, *qkv) for attend_part, *qkv in parts], 1)
    return attend


class MLP(nn.Module):
    def __init__(self, config: "Config"):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Transformer(nn.Module):
    def __init__(self, config: "Config"):
        super().__init__()
        self.config = config
        # Zeros, since weights come from a folder: to draw numbers on the meta device torch would import its
        # compiler, which takes two seconds.
        embedding = torch.zeros(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(embedding, freeze=False),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer but a plain tensor: it is not saved and stays float32; `checkpoint.load` moves it.
        self.frequencies = rope_frequencies(config)
        self.vocab = config.vocab_size  # `checkpoint.load` lowers it to the tokenizer's size
        self.recompute = False  # True: keep no activations inside the layers, a third more work

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """Hidden states (B, T, C) of tokens (B, T). `positions` (B or 1, T) defaults to 0..T-1."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        angle = positions[..., None, None] * self.frequencies  # (B or 1, T, 1, D/2)
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        delta = None
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, delta = block(x, delta, cos, sin, attend)
        return self.model.norm(x, delta)[1]

    @property
    def head(self) -> Tensor:
        """The output matrix (vocabulary with its padding, C).

        The rows beyond `vocab` are padding: no sample, probability or gradient ever sees them.
        """
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32: hidden (..., C) -> (..., vocab).

        A view of the product with the padded vocabulary, whose size is a round number and so the faster one.
        """
        return linear_float32(hidden, self.head)[..., :self.vocab]

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of `targets` (N,) after `hidden` (N, C), and the entropy there: two float32 (N,).

        It is the loss of SFT, the ratio of GRPO and the check of the sampler. The logits are never held
        whole: a few chunks of 128 MiB in plain PyTorch, in Triton tiles and at most 512 MiB of their
        gradient.
        """
        return linear_logprob(hidden, self.head[:self.vocab], targets, temperature)

    @property
    def is_miniature(self) -> bool:
        """Whether it is as small as the model in mini/, which needs other settings than the paper's."""
        return sum(w.numel() for w in self.parameters()) < 10e6

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype


# ---- what training runs: one prompt, many responses, in a flat row -----------------------------------
def shared_prompt(P: int, lengths: list[int], device: torch.device) -> Attend:
    """An Attend for one flat row [prompt | response 0 | response 1 | ...].

    The prompt has P tokens, response i has lengths[i]. The prompt sees itself; a response sees the prompt and
    its own past. Same values and gradients as running prompt + response once per response, for the price of
    one prompt and without padding (attention apart: there each response has a copy of the prompt's keys and
    values, and is padded to the longest). A single response needs none of that.
    """
    n, L = len(lengths), max(lengths)
    if n == 1:
        return causal
    total_length = sum(lengths)
    mask = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)  # token i sees P + i + 1 positions
    # Where among the tokens of all responses each padded place (n, L) is taken from. Beyond a response's end
    # it is some other token, which no real one sees.
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)  # (n,)
    places = starts[:, None] + torch.arange(L)  # (n, L)
    is_real = torch.arange(L) < torch.tensor(lengths)[:, None]  # (n, L)
    real = is_real.flatten().nonzero()[:, 0].to(device)  # (sum of lengths,)
    places = places.clamp(max=max(0, total_length - 1)).flatten().to(device)  # (n * L,)

    def split(x, H):
        """(1, T, H or K, D) -> the prompt's part (1, H, P, D) and the responses' (n, H, L, D)."""
        x = x[0].repeat_interleave(H // x.shape[2], 1)  # (T, H, D): masked kernels need equal heads
        of_prompt = x[None, :P].transpose(1, 2)
        if not total_length:
            return of_prompt, None
        padded = x[P:].index_select(0, places).unflatten(0, (n, L))  # (n, L, H, D)
        return of_prompt, padded.transpose(1, 2)

    def attend(layer, q, k, v):  # q (1, T, H, D), k and v (1, T, K, D) -> (1, T, H, D)
        H = q.shape[2]
        prompt_q, response_q = split(q, H)
        prompt_k, response_k = split(k, H)
        prompt_v, response_v = split(v, H)
        o = F.scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True)  # (1, H, P, D)
        of_prompt = o[0].transpose(0, 1)  # (P, H, D)
        if not total_length:  # responses of one token: predicted, never fed
            return of_prompt[None]
        seen_k = torch.cat((prompt_k.expand(n, -1, -1, -1), response_k), 2)  # (n, H, P + L, D)
        seen_v = torch.cat((prompt_v.expand(n, -1, -1, -1), response_v), 2)
        o = F.scaled_dot_product_attention(response_q, seen_k, seen_v, attn_mask=mask)  # (n, H, L, D)
        of_responses = o.transpose(1, 2).flatten(0, 1).index_select(0, real)  # (sum of lengths, H, D)
        return torch.cat((of_prompt, of_responses))[None]

    return attend


def response_logprobs(
    model: Transformer, groups: list[tuple[list[int], list[list[int]]]], temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of every token of the responses in `groups`: [(prompt, responses to it)].

    Flat, (N,), response by response. Lengths say what is trained, never a comparison with a pad id, which
    would drop the end token wherever the two are the same: a finished response ends with its stop token, a
    target like any other.
    """
    device = model.device
    attends, sizes = [], []
    tokens, positions = [], []
    predicting = []  # where in the flat row the next token is predicted, for each token of the responses
    targets = []
    for prompt, responses in groups:
        P = len(prompt)
        fed_lengths = [len(response) - 1 for response in responses]  # the last token is only predicted
        attends.append(shared_prompt(P, fed_lengths, device))
        sizes.append(P + sum(fed_lengths))
        tokens += prompt
        positions += range(P)
        end_of_prompt = len(tokens) - 1
        for response in responses:
            fed = response[:-1]
            predicting.append(end_of_prompt)  # it predicts every response's first token
            predicting += range(len(tokens), len(tokens) + len(fed))  # then each fed token predicts the next
            targets += response
            tokens += fed
            positions += range(P, P + len(fed))
    tokens = torch.tensor([tokens], device=device)  # (1, T)
    positions = torch.tensor([positions], device=device)  # (1, T)
    predicting = torch.tensor(predicting, device=device)  # (N,)
    targets = torch.tensor(targets, device=device)  # (N,)
    hidden = model(tokens, positions, join_rows(attends, sizes))[0]  # (T, C)
    # Not hidden[predicting]: indices repeat, and its backward would add them in a random order.
    return model.logprobs(hidden.index_select(0, predicting), targets, temperature)


# ---- the configuration ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """The facts of config.json that change the computation. `checkpoint.config_of` makes one."""
    vocab_size: int  # rows of the embedding, often padded beyond the tokenizer's ids
    hidden_size: int  # C
    intermediate_size: int  # width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K: H/K query heads share a key head (Ainslie et al. 2023)
    head_dim: int  # D; H * D need not be C
    qkv_bias: bool  # Qwen2, and Llama with attention_bias
    o_bias: bool  # Llama with attention_bias
    qk_norm: bool  # Qwen3: an RMSNorm of each query and key head before the rotation
    tie_word_embeddings: bool  # the head is the embedding
    rms_norm_eps: float
    max_position_embeddings: int  # the context, in tokens
    rope_theta: float  # base of the rotary frequencies
    rope_llama3: dict | None  # Llama 3.1's four numbers, if its scaling is asked for
    source: dict  # config.json as it was read; `checkpoint.save` writes it back


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each rotated pair, float32 (D/2,): theta ** (-2i / D), or slower for Llama 3.1.

    Llama 3.1: wavelengths over original/low_freq_factor are stretched by `factor`, those under
    original/high_freq_factor stay, and the ones between are interpolated (transformers'
    `_compute_llama3_parameters` has the same formula).
    """
    D = config.head_dim
    # device="cpu": the model is built on the meta device, and these numbers are needed for real.
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device="cpu").float() / D)  # (D/2,)
    scaling = config.rope_llama3
    if scaling is None:
        return frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    turns = original * frequency / (2 * math.pi)  # over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling["factor"])
