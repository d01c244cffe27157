"""A model folder means what it says, and a wrong one is named as such."""
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MINI, TINY, tiny
from safetensors.torch import load_file, save_file

from checkpoint import config_of, find_folder, load, save
from checkpoint.tokenizer import CHATML, Tokenizer
from run.command import UserError

# ---- the folder ----------------------------------------------------------------------------------
def test_shards_are_read(folder):
    """As large models come: three files and an index."""
    path = folder("qwen2-untied")
    model, _ = load(path, "cpu")
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(model.state_dict())}
    for file in set(where.values()):
        part = {name: w for name, w in model.state_dict().items() if where[name] == file}
        save_file(part, path / file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again, _ = load(path, "cpu")
    for name, w in model.state_dict().items():
        assert torch.equal(w, again.state_dict()[name])


def test_a_kill_within_a_save_leaves_whole_weights(tmp_path, monkeypatch):
    """At any rename: the old ones or the new ones."""
    (old, tokenizer), (new, _) = tiny("qwen2", seed=0), tiny("qwen2", seed=1)
    found = []
    real = os.replace
    for moment in itertools.count():
        path = tmp_path / str(moment)
        save(path, old, tokenizer)
        left = [moment]

        def replace(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(*args)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            try:
                save(path, new, tokenizer)
                break
            except KeyboardInterrupt:
                pass
        weights = load(path, "cpu")[0].state_dict()
        for name, model in (("old", old), ("new", new)):
            if all(torch.equal(w, weights[key]) for key, w in model.state_dict().items()):
                found.append(name)
    assert len(found) == moment > 3 and {"old", "new"} <= set(found)


@pytest.mark.parametrize("weight_map", [
    None, 5, ["x"], {"a": 5}, {"a": None}, {"a": ""}, {"a": ".."}, {"a": "b.bin"},
    {"a": "../outside.safetensors"},
])
def test_a_wrong_index_is_one_line(folder, weight_map):
    """Rule 8: nor can it point elsewhere."""
    path = folder()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="model.safetensors.index.json: "):
        load(path, "cpu")


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    save_file(change(weights) or weights, path / "model.safetensors")


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EMBEDDING = "model.embed_tokens.weight"
OWN_HEAD = 'lm_head.weight of its own; to use it, say "tie_word_embeddings": false'


@pytest.mark.parametrize("change, message", [
    (lambda w: w.__delitem__("model.norm.weight"), 'Missing key(s) in state_dict: "model.norm.weight"'),
    (lambda w: w.update({"model.extra": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "model.extra"'),
    (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), "size mismatch for model.norm.weight"),
    (lambda w: {f"module.{name}": tensor for name, tensor in w.items()}, '"module.model.embed_tokens'),
    # A LoRA merged into the head of a tied model is not thrown away.
    (lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}), OWN_HEAD),
    (lambda w: w.update({"lm_head.weight": w[EMBEDDING][:-1].clone()}), OWN_HEAD),
    (lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}), None),
    (lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}), None),
], ids=["missing", "unexpected", "misshaped", "prefix", "head", "short head", "tied twice", "constants"])
def test_what_the_weights_hold(folder, change, message):
    """Rule 8."""
    path = folder()
    change_weights(path, change)
    if message is None:
        assert not hasattr(load(path, "cpu")[0], "lm_head")
        return
    with pytest.raises(UserError, match=re.escape(message)) as e:
        load(path, "cpu")
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_load_reports_damage(folder):
    path = folder()
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(path, "cpu")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        load(path, "cpu")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, not a whole model; merge it"):
        load(path, "cpu")
    (path / "adapter_config.json").unlink()
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        load(path, "cpu")


def test_other_weights_may_lie_beside_safetensors(folder):
    path = folder()
    (path / "pytorch_model.bin").write_text("")
    load(path, "cpu")
    change_json(path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantization_config means quantised weights"):
        load(path, "cpu")


@pytest.mark.parametrize("key, value, message", [
    ("rope_theta", "1e6", "rope_theta must be a number above 0, not '1e6'"),
    ("rope_theta", None, "rope_theta must be a number above 0, not None"),
    ("rope_theta", float("nan"), "rope_theta must be a number above 0, not nan"),
    ("rms_norm_eps", -1e-6, "rms_norm_eps must be a number above 0, not -1e-06"),
    ("hidden_size", 32.0, "hidden_size must be a whole number above 0, not 32.0"),
    ("num_hidden_layers", 0, "num_hidden_layers must be a whole number above 0, not 0"),
    ("num_hidden_layers", 10**8, "num_hidden_layers is 100000000, but there are 26 tensors"),
    ("vocab_size", 10**30, "vocab_size must be a whole number above 0, not 1"),
    ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, not 'false'"),
    ("num_key_value_heads", 3, "3 key/value heads must divide 4 heads"),
    ("head_dim", 15, "the head_dim 15 must be even"),
    ("rope_scaling", "llama3", "rope_scaling must be an object, not 'llama3'"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 0}, "factor must be a number above 0, not 0"),
    ("rope_scaling", {"rope_type": "llama3"}, "the key 'factor' is missing"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, "rotary scaling 'yarn' is not supported"),
    ("layer_types", ["sliding_attention", "full_attention"], "use_sliding_window"),
])
def test_a_wrong_config_is_one_line(folder, key, value, message):
    path = folder()
    change_json(path / "config.json", **{key: value})
    with pytest.raises(UserError, match=re.escape(str(path))) as e:
        load(path, "cpu")
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 2},
])
def test_configs_as_people_have_them(changes):
    config = {**TINY, **FAMILIES["qwen2"], "vocab_size": 9}
    assert config_of({**config, **changes}).num_hidden_layers == 2
    if "max_window_layers" in changes:
        with pytest.raises(UserError, match="use_sliding_window"):
            config_of({**config, **changes, "max_window_layers": 1})


def test_head_dim_as_in_transformers():
    """128 for Qwen3 if it is not said, else the width over the heads."""
    for family, want in (("qwen2", 8), ("qwen3", 128), ("llama", 8)):
        config = {**TINY, **FAMILIES[family], "vocab_size": 9}
        del config["head_dim"]
        assert config_of(config).head_dim == want


def test_a_tokenizer_may_have_grown(folder):
    """A pad token was added and the embedding never resized: refused is only an id that is needed."""
    path = folder(padding=0)
    source = json.loads((path / "tokenizer.json").read_text())
    id = max(token["id"] for token in source["added_tokens"]) + 1
    pad = {**source["added_tokens"][-1], "id": id, "content": "<pad>", "special": False}
    source["added_tokens"].append(pad)
    (path / "tokenizer.json").write_text(json.dumps(source))
    model, tokenizer = load(path, "cpu")
    assert model.vocab == tokenizer.size - 1 == model.config.vocab_size
    tokenizer.chat([{"role": "user", "content": "Hi"}])
    for call in (tokenizer.encode, lambda text: tokenizer.chat([{"role": "user", "content": text}])):
        with pytest.raises(UserError, match="none for the token '<pad>'"):
            call("a <pad>")
    with pytest.raises(UserError, match="none for the token"):  # the end of a turn
        Tokenizer(path, rows=tokenizer.end_id).encode_response("a")


def test_what_a_saved_folder_keeps(folder, tmp_path):
    """Files as they are, in whatever encoding. No temperature: engines would apply it in silence."""
    path = folder()
    source = CHATML.encode() + "{# é #}".encode("latin-1")
    (path / "chat_template.jinja").write_bytes(source)
    change_json(path / "generation_config.json", temperature=0.7, repetition_penalty=1.1, bos_token_id=3)
    save(tmp_path / "again", *load(path, "cpu"))
    assert (tmp_path / "again" / "chat_template.jinja").read_bytes() == source
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == Path(MINI, "tokenizer.json").read_bytes()
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation.keys() == {"bos_token_id", "pad_token_id", "eos_token_id"}
    assert generation["eos_token_id"] == Tokenizer(MINI).stop_ids


def test_a_base_without_a_template_is_saved_with_one(folder, tmp_path, capsys):
    """What is written renders in transformers to our ids, and ends a turn where we do."""
    transformers = pytest.importorskip("transformers")
    path = folder()
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (path / "generation_config.json").write_text('{"eos_token_id": 0}')
    model, tokenizer = load(path, "cpu")
    out = capsys.readouterr().out
    assert out == f"{path} has no chat template; it gets ChatML, where <|im_end|> ends a turn\n"
    save(tmp_path / "again", model, tokenizer)
    ours = load(tmp_path / "again", "cpu")[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ours.chat(chat)
    assert theirs.eos_token_id == ours.end_id
    stops = transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id
    assert ours.end_id in stops and stops == ours.stop_ids


def test_template_kwargs_come_from_the_run_that_made_the_folder(folder, capsys):
    path = folder()
    assert load(path, "cpu")[1].template_kwargs is None
    (path / "run.json").write_text(json.dumps({"flags": {"chat_template_kwargs": {"x": 1}}}))
    capsys.readouterr()
    assert load(path, "cpu")[1].template_kwargs == {"x": 1}
    assert """--chat-template-kwargs '{"x": 1}', as its run.json says""" in capsys.readouterr().out
    assert load(path, "cpu", template_kwargs={})[1].template_kwargs == {}
    capsys.readouterr()
    load(path, "cpu", template_kwargs={"enable_thinkng": False})
    assert "its chat template does not look at 'enable_thinkng'" in capsys.readouterr().out
    for flags in ([1], {"chat_template_kwargs": "x"}):
        (path / "run.json").write_text(json.dumps({"flags": flags}))
        with pytest.raises(UserError, match="run.json: .* must be an object"):
            load(path, "cpu")


def test_mini_with_a_slash_is_the_miniature(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_folder("mini/") == find_folder("mini") == Path(MINI)
