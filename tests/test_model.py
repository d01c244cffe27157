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


def test_the_block_opens_the_file():
    """A reader meets the block within a screen of model.py's first line."""
    lines = Path(kernels.__file__).parent.parent.joinpath("model.py").read_text().splitlines()
    assert any(line.startswith("class Block") for line in lines[:60])


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
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_equal_float64(temperature, monkeypatch):
    """Values and both gradients, with unequal upstream gradients, against dense autograd; several chunks."""
    monkeypatch.setattr(kernels.reference, "CHUNK_BYTES", 4 * 50 * 7)  # 7 rows at a time
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=g, requires_grad=True)
    weight = torch.randn(50, 8, generator=g, requires_grad=True)
    targets = torch.randint(0, 50, (23,), generator=g)
    upstream = torch.randn(23, generator=g)
    logp, entropy = kernels.linear_logprob(hidden, weight, targets, temperature)
    (logp * upstream).sum().backward()

    wide_hidden = hidden.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    dense = (wide_hidden @ wide_weight.T / temperature).log_softmax(-1)
    want = dense.gather(1, targets[:, None])[:, 0]
    (want * upstream).sum().backward()
    assert torch.allclose(logp.double(), want, atol=1e-5)
    assert torch.allclose(entropy.double(), -(dense.exp() * dense).sum(-1), atol=1e-5)
    assert torch.allclose(hidden.grad.double(), wide_hidden.grad, atol=1e-4)
    assert torch.allclose(weight.grad.double(), wide_weight.grad, atol=1e-4)


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


def test_settings_for_gpus():
    """cuDNN's attention took 23 to 37 ms for each new shape of a prompt, by reports."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
