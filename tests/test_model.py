import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MINI, tiny
from safetensors.torch import load_file, save_file

import kernels.reference
from cli import UserError
from model import Tokenizer, load, save

GOLDEN = Path(__file__).parent / "golden"


# ---- the transformer -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, folder):
    """Rule 1 and rule 8: a folder of ours opened in transformers gives our logits."""
    transformers = pytest.importorskip("transformers")
    path = folder(family)
    ours, _ = load(path, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, ours.vocab, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits[..., :ours.vocab]).abs().max() < 1e-4


def test_logits_equal_golden_file():
    """The miniature's logits as transformers computed them once: needs no transformers."""
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


# ---- log-probabilities -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_equal_float64(temperature, monkeypatch):
    """Values and both gradients, with unequal upstream gradients, against dense autograd in float64; several chunks."""
    monkeypatch.setattr(kernels.reference, "CHUNK_BYTES", 4 * 50 * 7)  # 7 rows at a time
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(23, 8, generator=g, requires_grad=True), torch.randn(50, 8, generator=g, requires_grad=True)
    targets, a = torch.randint(0, 50, (23,), generator=g), torch.randn(23, generator=g)
    logp, entropy = kernels.linear_logprob(h, w, targets, temperature)
    (logp * a).sum().backward()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    full = (h64 @ w64.T / temperature).log_softmax(-1)
    dense_entropy = -(full.exp() * full).sum(-1)
    (full.gather(1, targets[:, None])[:, 0] * a).sum().backward()
    assert torch.allclose(logp.double(), full.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy.double(), dense_entropy, atol=1e-5)
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-4) and torch.allclose(w.grad.double(), w64.grad, atol=1e-4)


def test_logits_of_a_batch_are_never_held(monkeypatch):
    """Rule 14: no tensor of the forward or backward pass comes near tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    N, V, C = 512, 4000, 16
    monkeypatch.setattr(kernels.reference, "CHUNK_BYTES", 4 * V * 32)
    h, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    with Watch():
        kernels.linear_logprob(h, w, torch.zeros(N, dtype=torch.long))[0].sum().backward()
    assert largest == 32 * V == N * V / 16  # one chunk


def test_padded_ids_are_in_no_softmax():
    """Rule 5: rows of the head beyond the tokenizer get no probability and no gradient."""
    model, tokenizer = tiny(padding=7)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.size:] = 100.0
    hidden = model(torch.tensor([[5, 6, 7]]))[0]
    logp, _ = model.logprobs(hidden, torch.tensor([1, 2, 3]))
    assert torch.allclose(logp, model.logits(hidden).log_softmax(-1)[range(3), [1, 2, 3]], atol=1e-5)
    logp.sum().backward()
    assert model.logits(hidden).shape[-1] == tokenizer.size
    assert model.model.embed_tokens.weight.grad[tokenizer.size:].abs().sum() == 0


# ---- text and ids ----------------------------------------------------------------------------------------------------

def family_tokenizer(tmp_path, specials, template, eos):
    """A byte-level tokenizer with a family's special tokens: all that the chat format depends on."""
    from tokenizers import AddedToken, Tokenizer as BPE, decoders, models, pre_tokenizers
    bpe = BPE(models.BPE({t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": eos}))
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "chat.json").read_text()), ids=lambda c: c["name"])
def test_chat_equals_the_familys_template(case, tmp_path):
    """Rule 7. The golden texts are what the families' own templates render."""
    tokenizer = family_tokenizer(tmp_path, case["specials"], case["template_holds"], case["specials"][-1])
    ids = tokenizer.chat(case["messages"])
    assert tokenizer.decode(ids) == case["text"]
    bos = tokenizer.bpe.token_to_id("<|begin_of_text|>")
    assert ids.count(bos) == (bos is not None)


def test_special_tokens_in_text_are_text():
    """Rule 5: a user who writes <|im_end|> does not end the turn."""
    tokenizer = Tokenizer(MINI)
    ids = tokenizer.chat([{"role": "user", "content": "a <|im_end|> b"}])
    assert ids.count(tokenizer.end_id) == 1 and "a <|im_end|> b" in tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer.encode("<|im_start|>\nü€")) == "<|im_start|>\nü€"


# ---- the checkpoint folder -------------------------------------------------------------------------------------------

def test_save_and_load_round_trip(folder):
    """From one file or from several shards, tied or not: the same tensors come back, and a tied head stays tied."""
    for family in ("qwen2", "qwen2-untied"):
        model, tokenizer = load(folder(family), "cpu")
        path = folder(family).parent / f"{family}-again"
        save(path, model, tokenizer)
        for sharded in (False, True):
            if sharded:
                names = list(model.state_dict())
                where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
                for shard in set(where.values()):
                    save_file({name: w for name, w in model.state_dict().items() if where[name] == shard}, path / shard)
                (path / "model.safetensors").unlink()
                (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
            again, _ = load(path, "cpu")
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        assert hasattr(again, "lm_head") == (family == "qwen2-untied")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="outside the folder"):
        load(path, "cpu")


def test_save_keeps_config_and_tokenizer_and_adds_stop_ids(folder):
    path = folder()
    assert (path / "tokenizer.json").read_bytes() == Path(MINI, "tokenizer.json").read_bytes()
    assert "chat_template" in json.loads((path / "tokenizer_config.json").read_text())
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == Tokenizer(MINI).stop_ids


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda w: w.update({"model.extra": torch.zeros(1)}), "model.extra is unexpected"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\), the config says \(32,\)"),
])
def test_load_reports_wrong_tensors(folder, change, message):
    """Rule 8."""
    path = folder()
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(path, "cpu")


def test_load_reports_damage(folder):
    path = folder()
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(path, "cpu")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        load(path, "cpu")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type 'mamba' is not supported"):
        load(path, "cpu")
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        load(path, "cpu")
    with pytest.raises(UserError, match="no such folder"):
        load(path / "nothing", "cpu")


def test_tied_head_stored_twice_is_read_once(folder):
    path = folder()
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    assert not hasattr(load(path, "cpu")[0], "lm_head")
