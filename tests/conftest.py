"""Tiny models of every family, and a way to run a command inside the test's own process."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which nothing here does before a test asks for it

import cli
from model import Config, Tokenizer, Transformer, save

MINI = str(ROOT / "mini")
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_act="silu",
            rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=256, tie_word_embeddings=True, attention_dropout=0.0, initializer_range=0.02)
FAMILIES = {
    "qwen2": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
    "qwen2-untied": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False, head_dim=8),
    "qwen3": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=24),  # heads x head_dim is not the width
    "llama": dict(model_type="llama", architectures=["LlamaForCausalLM"], num_key_value_heads=4),
    "llama-bias": dict(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True),
    "llama3-rope": dict(model_type="llama", architectures=["LlamaForCausalLM"], rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    "llama3-rope-new": dict(model_type="llama", architectures=["LlamaForCausalLM"], rope_theta=None, rope_parameters=dict(
        rope_theta=500.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
}


def tiny(family="qwen2", seed=0, padding=5, dtype=torch.float32):
    """(Transformer with random weights, the miniature's Tokenizer). `padding`: ids of the vocabulary beyond the tokenizer."""
    tokenizer = Tokenizer(MINI)
    config = {k: v for k, v in {**TINY, **FAMILIES[family], "vocab_size": tokenizer.size + padding, "eos_token_id": tokenizer.end_id}.items() if v is not None}
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(Config(config))
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) * (0.3 if w.ndim > 1 else 0.1) + (w.ndim == 1))
    model.vocab = tokenizer.size
    return model.to(dtype), tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model: folder(family) -> its path."""
    def make(family="qwen2", **kw):
        path = tmp_path / family
        save(path, *tiny(family, **kw))
        return path
    return make


def run(module, *argv, monkeypatch, capsys):
    """Run a command's main as its script would. Returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    status = 0
    try:
        cli.command(module.main)
    except SystemExit as e:
        status = e.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.fixture
def cmd(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda module, *argv: run(module, *argv, monkeypatch=monkeypatch, capsys=capsys)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


CHAT = [{"messages": [{"role": "user", "content": f"What is {a} * {b}?"}, {"role": "assistant", "content": f"{a} * {b} = {a * b}\n<answer>{a * b}</answer>"}]}
        for a in range(2, 9) for b in range(2, 6)]


def environment(**kw):
    """For a subprocess: one thread, so that two runs add up in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **kw}
