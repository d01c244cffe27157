"""The transformer computes what transformers computes, and its log-probabilities what dense float64 does."""
import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MINI, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.reference
from checkpoint import load

GOLDEN = Path(__file__).parent / "golden"


# ---- the transformer -----------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, folder):
    """Rules 1 and 8: a folder of ours opened in transformers gives our logits."""
    transformers = pytest.importorskip("transformers")
    path = folder(family)
    ours, _ = load(path, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, ours.vocab, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = ours.logits(ours(tokens)) - theirs(tokens).logits[..., :ours.vocab]
    assert difference.abs().max() < 1e-4


def test_logits_equal_golden_file():
    """Rule 1 without transformers: the miniature's logits as it computed them once."""
    golden = json.loads((GOLDEN / "mini_logits.json").read_text())
    model, tokenizer = load(MINI, "cpu")
    assert tokenizer.chat(golden["messages"]) == golden["tokens"]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([golden["tokens"]])))[0, -1]
    assert torch.allclose(logits, torch.tensor(golden["logits"]), atol=1e-3)


def test_recompute_changes_nothing():
    tokens = torch.arange(40).view(2, 20)
    grads = []
    for recompute in (False, True):
        model, _ = tiny("qwen3")
        model.recompute = recompute
        model(tokens).square().sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*grads)


# ---- log-probabilities ---------------------------------------------------------------------------
class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operation returns."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_logits_of_a_batch_are_never_held(monkeypatch):
    """Rule 14: no tensor of the forward or backward pass comes near tokens x vocabulary."""
    N, V, C = 512, 4000, 16
    monkeypatch.setattr(kernels.reference, "CHUNK_BYTES", 4 * V * 32)
    hidden = torch.randn(N, C, requires_grad=True)
    weight = torch.randn(V, C, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.long)
    with LargestTensor() as watch:
        kernels.linear_logprob(hidden, weight, targets)[0].sum().backward()
    assert watch.largest == 32 * V == N * V / 16  # one chunk


def test_padded_ids_are_in_no_softmax():
    """Rule 5: rows of the head beyond the tokenizer get no probability and no gradient."""
    model, tokenizer = tiny(padding=7)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.size:] = 100.0
    hidden = model(torch.tensor([[5, 6, 7]]))[0]
    logits = model.logits(hidden)
    logp, _ = model.logprobs(hidden, torch.tensor([1, 2, 3]))
    assert logits.shape[-1] == tokenizer.size
    assert torch.allclose(logp, logits.log_softmax(-1)[range(3), [1, 2, 3]], atol=1e-5)
    logp.sum().backward()
    assert model.model.embed_tokens.weight.grad[tokenizer.size:].abs().sum() == 0
