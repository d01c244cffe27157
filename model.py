"""A Qwen transformer, its tokenizer, and the checkpoint folder that holds both.

    model, tokenizer = load("mini")                            # or Qwen/Qwen2.5-1.5B-Instruct, or any such folder
    tokens = tokenizer.chat([{"role": "user", "content": "Hi"}])
    hidden = model(torch.tensor([tokens]))                     # (1, T, C)
    model.logits(hidden[:, -1]).argmax()                       # the likeliest next token

One class serves Qwen2/2.5, Qwen3 and Llama 3 / SmolLM2: they differ in three facts of the config (a bias on q, k, v; a norm
on q and k; a head tied to the embedding) and in the rotary frequencies. Parameters have Hugging Face's names, so loading
needs no mapping. Attention is an argument of `forward`: training passes `causal`, the sampler passes a method of its cache.

Left out: sliding windows, mixture of experts, YaRN and other rotary scalings than Llama 3's, tensor parallelism.
"""
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cli import UserError, write_whole
from kernels import add_norm, linear_float32, linear_logprob, rotate, swiglu, uses_triton

# (layer, q (B, T, H, D), k (B, T, K, D), v (B, T, K, D)) -> o (B, T, H, D): H query heads share K key/value heads.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(layer, q, k, v):
    """Each token sees itself and what came before. Rows padded on the right need no mask: no real token sees the padding."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Config:
    """The facts of config.json that change the computation; `source` is the file itself, written back unchanged on save."""

    def __init__(self, source, name="config.json"):
        try:
            self._read(source, name)
        except KeyError as e:
            raise UserError(f"{name}: the key {e.args[0]!r} is missing")
        except (TypeError, AttributeError, ZeroDivisionError):
            raise UserError(f"{name}: not the configuration of a model (a value has the wrong type)")

    def _read(self, d, name):
        family = d.get("model_type")
        if family not in ("qwen2", "qwen3", "llama"):
            raise UserError(f"{name}: model_type {family!r} is not supported; this program knows qwen2 (and 2.5), qwen3 and llama (and SmolLM2)")
        if d.get("use_sliding_window") or d.get("mlp_bias") or d.get("hidden_act", "silu") != "silu":
            raise UserError(f"{name}: use_sliding_window, mlp_bias and activations other than silu are not supported")
        self.source = d
        self.vocab_size, self.hidden_size, self.intermediate_size = d["vocab_size"], d["hidden_size"], d["intermediate_size"]
        self.num_hidden_layers, self.num_attention_heads = d["num_hidden_layers"], d["num_attention_heads"]
        self.num_key_value_heads = d.get("num_key_value_heads") or self.num_attention_heads
        self.head_dim = d.get("head_dim") or self.hidden_size // self.num_attention_heads
        self.rms_norm_eps = d.get("rms_norm_eps", 1e-6)
        self.max_position_embeddings = d.get("max_position_embeddings", 2048)
        # Where the families differ: a bias on q, k, v (and o), a norm on q and k, a head tied to the embedding.
        bias = d.get("attention_bias", False)
        self.qkv_bias, self.o_bias = family == "qwen2" or bias, family != "qwen2" and bias
        self.qk_norm, self.tie_word_embeddings = family == "qwen3", d.get("tie_word_embeddings", False)
        # Settings of the rotary embedding: one dict in transformers 5, two keys before.
        rope = self.rope = {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}
        rope.setdefault("rope_theta", d.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        if rope["rope_type"] not in ("default", "llama3"):
            raise UserError(f"{name}: rotary scaling {rope['rope_type']!r} is not supported (only default and llama3)")
        if rope["rope_type"] == "llama3":
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                rope[key]  # a KeyError names the one that is missing


def rope_frequencies(config):
    """Angle per position of each rotated pair, float32 (D/2,): theta ** (-2i / D), slowed down as Llama 3.1 does if asked.

    Llama 3.1: wavelengths over original/low_freq_factor are stretched by `factor`, those under original/high_freq_factor
    stay, and the ones between are interpolated (transformers' `_compute_llama3_parameters` has the same formula).
    """
    r = config.rope
    # device="cpu": `load` builds the model on the meta device, and these numbers are needed for real.
    frequency = 1.0 / r["rope_theta"] ** (torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    if r["rope_type"] == "llama3":
        turns = r["original_max_position_embeddings"] * frequency / (2 * math.pi)  # full turns over the original context
        smooth = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        frequency = frequency * (smooth + (1 - smooth) / r["factor"])
    return frequency


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x, delta=None):
        """(x + delta, its norm): the residual stream and what the next layer reads."""
        return add_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, H * D, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, K * D, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, K * D, bias=c.qkv_bias)
        self.o_proj = nn.Linear(H * D, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(D, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(D, c.rms_norm_eps) if c.qk_norm else None
        self.eps = c.rms_norm_eps

    def forward(self, x, cos, sin, attend: Attend):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H or K, D)
        q, k = rotate(q, k, cos, sin, (self.q_norm.weight, self.k_norm.weight) if self.q_norm else None, self.eps)
        return self.o_proj(attend(self.layer, q, k, v).flatten(-2))  # (B, T, H, D) -> (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, delta, cos, sin, attend):
        """`delta` is what the layer before adds to x: the sum is left to the norm, which reads x anyway."""
        x, h = self.input_layernorm(x, delta)
        x, h = self.post_attention_layernorm(x, self.self_attn(h, cos, sin, attend))
        return x, self.mlp(h)


class Transformer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size), "layers": layers, "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.frequencies = rope_frequencies(c)  # a plain tensor: not saved, and float32 whatever the weights are
        self.vocab = c.vocab_size  # `load` lowers it to the tokenizer's size
        self.recompute = False  # True trades a third more work for the memory of the layers' activations

    def forward(self, tokens, positions=None, attend: Attend = causal):
        """Hidden states (B, T, C) of tokens (B, T). `positions` (B or 1, T) defaults to 0..T-1."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        angle = positions[..., None, None] * self.frequencies  # (B or 1, T, 1, D/2)
        cos, sin = angle.cos(), angle.sin()
        x, delta = self.model.embed_tokens(tokens), None  # (B, T, C)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x, delta = block(x, delta, cos, sin, attend)
        return self.model.norm(x, delta)[1]

    @property
    def head(self):
        """The output matrix (vocabulary with its padding, C). The rows beyond the tokenizer's `vocab` are padding, and no sample,
        probability or gradient ever sees them."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden):
        """Next-token logits, float32 (..., vocab): a view, since a product of the padded width, a round number, is the faster one."""
        return linear_float32(hidden, self.head)[..., :self.vocab]

    def logprobs(self, hidden, targets, temperature=1.0):
        """Log-probability of `targets` (N,) after `hidden` (N, C), and the entropy there: two float32 tensors (N,).

        This one number is the loss of SFT, the ratio of GRPO and the check of the sampler. The logits are never held at once.
        """
        return linear_logprob(hidden, self.head[:self.vocab], targets, temperature)

    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.embed_tokens.weight.dtype)


# ---- text and ids ----------------------------------------------------------------------------------------------------
# The system turn that a family's template adds when the user gives none. Recognised by its text; the template is never run.
DEFAULT_SYSTEMS = ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
                   "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "You are a helpful assistant.")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "vocab.json", "merges.txt", "added_tokens.json")


class Tokenizer:
    """Text to ids and back, and the chat format of the model's family (ChatML, or Llama 3's headers).

    `stop_ids` end a response; `end_id` is the one of them that closes an assistant turn, the one that training teaches.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: tokenizer.json is missing; --model must be a folder in Hugging Face format with a fast tokenizer")
        self.files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        try:
            self.bpe = BPE.from_str(self.files["tokenizer.json"].decode())
            config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
            generation = json.loads(self.files.get("generation_config.json", b"{}"))
            if not isinstance(config, dict) or not isinstance(generation, dict):
                raise ValueError("tokenizer_config.json and generation_config.json must hold objects")
        except Exception as e:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: the tokenizer cannot be read ({str(e).splitlines()[0]})")
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.encode_special_tokens = True  # <|im_end|> in a question is ten characters of text, not the end of a turn
        self.size = max(self.bpe.get_vocab(with_added_tokens=True).values()) + 1
        template = str(config.get("chat_template") or "") + self.files.get("chat_template.jinja", b"").decode()
        self.llama = self.bpe.token_to_id("<|im_start|>") is None and self.bpe.token_to_id("<|start_header_id|>") is not None
        if not self.llama and self.bpe.token_to_id("<|im_start|>") is None:
            raise UserError(f"{folder}: the tokenizer has neither <|im_start|> (ChatML) nor <|start_header_id|> (Llama 3), so no chat format fits it")
        self.llama_dated = "Cutting Knowledge Date" in template  # Llama 3.1 and later
        self.default_system = next((s for s in DEFAULT_SYSTEMS if s in template), None)
        self.end_id = self.bpe.token_to_id("<|eot_id|>" if self.llama else "<|im_end|>")
        eos = generation.get("eos_token_id") or []
        named = config.get("eos_token")
        named = self.bpe.token_to_id(named["content"] if isinstance(named, dict) else named) if named else None
        self.stop_ids = sorted({self.end_id, *(eos if isinstance(eos, list) else [eos]), *([named] if named is not None else [])})

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def text(self, ids):
        """The text of a completion: what `decode` gives, less the stop token at its end."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def chat(self, messages, prefill=""):
        """Ids of a conversation, up to and with the opening of the assistant's turn and `prefill`.

        chat([{"role": "user", "content": "Hi"}]) for ChatML without a default system turn:
        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
        """
        return (self._llama3(messages) if self.llama else self._chatml(messages)) + self.encode(prefill)

    # Text between two special tokens is encoded as one string, as the templates do.

    def _chatml(self, messages):
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        start, end, newline = self.bpe.token_to_id("<|im_start|>"), self.end_id, self.encode("\n")
        ids = []
        for m in messages:
            ids += [start, *self.encode(f"{m['role']}\n{m['content']}"), end, *newline]
        return ids + [start, *self.encode("assistant\n")]

    def _llama3(self, messages):
        turns = [(m["role"], m["content"].strip()) for m in messages]
        if self.llama_dated:  # the template always opens with two dates; the second is its fixed fallback
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            turns.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}"))
        bos, start, middle = (self.bpe.token_to_id(t) for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"))
        ids = [bos]
        for role, text in turns:
            ids += [start, *self.encode(role), middle, *self.encode("\n\n" + text), self.end_id]
        return ids + [start, *self.encode("assistant"), middle, *self.encode("\n\n")]


# ---- the checkpoint folder -------------------------------------------------------------------------------------------
def find(model):
    """The local folder of a model: itself, or the hub's, fetched with huggingface_hub. The only code that uses the network."""
    if str(model) == "mini":  # the one that ships with the project, from whatever folder a command is started
        return Path(__file__).parent / "mini"
    if Path(model).is_dir():
        return Path(model)
    model = str(model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"--model {model}: no such folder (a hub id looks like Qwen/Qwen2.5-1.5B-Instruct)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(model, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:  # ValueError: not a name that a hub id may have
        raise UserError(f"--model {model}: no such folder here, and the hub did not give it ({(str(e).strip() or type(e).__name__).splitlines()[0]})")


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --model must be a folder in Hugging Face format")
    except ValueError:
        raise UserError(f"{path}: not valid JSON")


def read_weights(folder, device="cpu"):
    """All tensors of a folder by name, from model.safetensors or from the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there (weights in other formats are not read)")
    weights = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index}: the shard {shard!r} lies outside the folder; it is not read")
        try:
            with safe_open(folder / shard, "pt", device=str(device)) as f:
                weights.update((name, f.get_tensor(name)) for name in f.keys())
        except FileNotFoundError:
            raise UserError(f"{folder / shard}: no such file, but the index lists it; fetch the folder again")
        except SafetensorError as e:
            raise UserError(f"{folder / shard}: truncated or damaged ({e}); fetch the file again")
    return weights


def load(model, device="auto", dtype="auto"):
    """(Transformer, Tokenizer) of a Hugging Face folder or hub id. Raises UserError for anything wrong in the folder."""
    device, dtype = device_and_dtype(device, dtype)
    folder = find(model)
    config = Config(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} ids but the model only {config.vocab_size}; the two do not belong together")
    with torch.device("meta"):
        transformer = Transformer(config)
    expected, weights = transformer.state_dict(), read_weights(folder, device)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some folders store the tied head twice
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unexpected" for name in weights if name not in expected]
    wrong += [f"{name} has shape {tuple(weights[name].shape)}, the config says {tuple(w.shape)}"
              for name, w in expected.items() if name in weights and weights[name].shape != w.shape]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(wrong[:3])}{more}")
    transformer.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, strict=True, assign=True)
    transformer.frequencies = transformer.frequencies.to(device)
    transformer.vocab = tokenizer.size
    return transformer, tokenizer


def device_and_dtype(device="auto", dtype="auto"):
    """The torch device and dtype that the flags --device and --dtype mean."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # under torchrun each process of a host has its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {device}: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no GPU here; use --device cpu")
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are only {torch.cuda.device_count()} GPUs here, counted from 0")
        torch.cuda.set_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    uses_triton(device, dtype)  # now, for it refuses a wrong KERNELS: before anything is written
    return device, dtype


def save(path, model, tokenizer):
    """Write a Hugging Face folder that transformers and vLLM load unchanged. Each file appears whole or not at all."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "model.safetensors", {name: w.detach().to("cpu").contiguous() for name, w in model.state_dict().items()})
    for name, content in tokenizer.files.items():
        if name != "generation_config.json":
            write_whole(path / name, content.decode("utf-8"))
    # Engines stop where generation_config.json says. A base model's ends a document, not a turn, so our stop ids go in.
    generation = {**json.loads(tokenizer.files.get("generation_config.json", b"{}")), "eos_token_id": tokenizer.stop_ids}
    write_whole(path / "generation_config.json", json.dumps(generation, indent=2))
    config = {**model.config.source, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("dtype", None)  # transformers 5 writes this key; one of the two must go, or they could disagree
    write_whole(path / "config.json", json.dumps(config, indent=2))


def save_tensors(path, tensors, metadata=None):
    """A safetensors file that is there whole or not at all. The metadata tells transformers that the tensors are PyTorch's."""
    tmp = f"{path}.tmp"
    try:
        save_file(tensors, tmp, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as e:  # a full disk comes out as this
        Path(tmp).unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({e})")
    os.chmod(tmp, 0o644)  # the library makes it readable by its owner only
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)
