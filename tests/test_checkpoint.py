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

import tensors
from checkpoint import config_of, find_folder, load, save
from cli import UserError
from tokenizer import CHATML, Tokenizer

# ---- the folder ----------------------------------------------------------------------------------
def shard(path, model):
    """Split a folder's weights into three shards with an index, as large models come."""
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(model.state_dict())}
    for file in set(where.values()):
        part = {name: w for name, w in model.state_dict().items() if where[name] == file}
        save_file(part, path / file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("family", ["qwen2", "qwen2-untied"])
@pytest.mark.parametrize("sharded", [False, True])
def test_save_and_load_round_trip(folder, tmp_path, family, sharded):
    """Rule 8: the same tensors come back, and a tied head stays tied."""
    model, tokenizer = load(folder(family), "cpu")
    path = tmp_path / "again"
    save(path, model, tokenizer)
    if sharded:
        shard(path, model)
    again, _ = load(path, "cpu")
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, w in model.state_dict().items():
        assert torch.equal(w, again.state_dict()[name])
    assert hasattr(again, "lm_head") == (family == "qwen2-untied")


def test_large_weights_are_saved_in_shards(tmp_path, monkeypatch):
    """As transformers writes and reads them: an index, and no file over the limit."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = tiny("qwen2-untied")
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    save(tmp_path, model, tokenizer)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        held = load_file(shard)
        assert sum(w.nbytes for w in held.values()) <= 20_000 or len(held) == 1
    again, _ = load(tmp_path, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, w in model.state_dict().items():
        assert torch.equal(w, again.state_dict()[name]) and torch.equal(w, theirs[name])
    size = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert size == sum(w.nbytes for w in model.parameters())


@pytest.mark.parametrize("sizes", [(20_000, 20_000), (20_000, 10**9), (10**9, 20_000)])
def test_old_and_new_shards_are_never_mixed(tmp_path, monkeypatch, sizes):
    """A kill at any rename or removal of a save leaves the old weights or the new ones, whole."""
    (old, tokenizer), (new, _) = tiny("qwen2", seed=0), tiny("qwen2", seed=1)
    found = []
    for moment in itertools.count():
        monkeypatch.setattr(tensors, "SHARD_BYTES", sizes[0])
        save(tmp_path / str(moment), old, tokenizer)
        monkeypatch.setattr(tensors, "SHARD_BYTES", sizes[1])
        left = [moment]

        def pulled(real, left=left):
            def step(*args, **kw):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*args, **kw)
            return step

        with monkeypatch.context() as m:
            m.setattr(os, "replace", pulled(os.replace))
            m.setattr(Path, "unlink", pulled(Path.unlink))
            try:
                save(tmp_path / str(moment), new, tokenizer)
                break
            except KeyboardInterrupt:
                pass
        weights = load(tmp_path / str(moment), "cpu")[0].state_dict()
        for name, model in (("old", old), ("new", new)):
            if all(torch.equal(w, weights[key]) for key, w in model.state_dict().items()):
                found.append(name)
    assert len(found) == moment > 3 and {"old", "new"} <= set(found)


def test_shards_stay_inside_the_folder(folder):
    """Rule 8: an index cannot point elsewhere."""
    path = folder()
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        load(path, "cpu")


@pytest.mark.parametrize("weight_map", [
    None, 5, ["x"], {"a": 5}, {"a": None}, {"a": ""}, {"a": ".."}, {"a": "b.bin"},
])
def test_a_wrong_index_is_one_line(folder, weight_map):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="model.safetensors.index.json: "):
        load(path, "cpu")


def test_save_keeps_config_and_tokenizer_and_adds_stop_ids(folder):
    path = folder()
    assert (path / "tokenizer.json").read_bytes() == Path(MINI, "tokenizer.json").read_bytes()
    assert "chat_template" in json.loads((path / "tokenizer_config.json").read_text())
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == Tokenizer(MINI).stop_ids


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda w: w.update({"model.extra": torch.zeros(1)}), "model.extra is unexpected"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
     r"model.norm.weight has shape \(3,\), the config says \(32,\)"),
], ids=["missing", "unexpected", "misshaped"])
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


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    save_file(change(weights) or weights, path / "model.safetensors")


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tied_head_stored_twice_is_read_once(folder):
    """Rule 8."""
    path = folder()
    embedding = "model.embed_tokens.weight"
    change_weights(path, lambda w: w.update({"lm_head.weight": w[embedding].clone()}))
    assert not hasattr(load(path, "cpu")[0], "lm_head")


@pytest.mark.parametrize("head", [lambda e: e + 1, lambda e: e[:-1].clone()], ids=["other", "misshaped"])
def test_a_head_of_its_own_is_not_thrown_away(folder, head):
    """Rule 8: a LoRA merged into the head of a tied model."""
    path = folder()
    change_weights(path, lambda w: w.update({"lm_head.weight": head(w["model.embed_tokens.weight"])}))
    with pytest.raises(UserError, match="lm_head.weight of its own.*\"tie_word_embeddings\": false"):
        load(path, "cpu")


def test_constants_of_old_folders_are_skipped(folder):
    path = folder()
    change_weights(path, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(path, "cpu")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_prefix_of_all_names_is_named(folder, prefix):
    path = folder()
    change_weights(path, lambda w: {prefix + name: tensor for name, tensor in w.items()})
    with pytest.raises(UserError, match=f"every tensor begins with '{prefix}'"):
        load(path, "cpu")


@pytest.mark.parametrize("name, message", [
    ("adapter_config.json", "adapter_config.json means an adapter.*merge"),
    ("pytorch_model.bin", "pytorch_model.bin means weights in a format that can run code"),
])
def test_what_is_no_safetensors_model_is_recognised(folder, name, message):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        load(path, "cpu")


def test_other_weights_may_lie_beside_safetensors(folder):
    path = folder()
    (path / "pytorch_model.bin").write_text("")
    load(path, "cpu")
    change_json(path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantization_config means quantised weights"):
        load(path, "cpu")


@pytest.mark.parametrize("key, value, message", [
    ("rope_theta", None, "rope_theta must be a number above 0, not None"),
    ("rope_theta", "1e6", "rope_theta must be a number above 0, not '1e6'"),
    ("rope_theta", float("nan"), "rope_theta must be a number above 0"),
    ("rms_norm_eps", -1e-6, "rms_norm_eps must be a number above 0"),
    ("hidden_size", 32.0, "hidden_size must be a whole number above 0, not 32.0"),
    ("hidden_size", True, "hidden_size must be a whole number above 0, not True"),
    ("num_hidden_layers", 0, "num_hidden_layers must be a whole number above 0, not 0"),
    ("vocab_size", 10**30, "vocab_size must be a whole number above 0"),
    ("rope_theta", 10**400, "rope_theta must be a number above 0"),
    ("vocab_size", -5, "vocab_size must be a whole number above 0, not -5"),
    ("max_position_embeddings", "2048", "max_position_embeddings must be a whole number above 0"),
    ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, not 'false'"),
    ("attention_bias", 1, "attention_bias must be true or false"),
    ("num_key_value_heads", 3, "3 key/value heads must divide 4 heads"),
    ("head_dim", 15, "the head_dim 15 must be even"),
    ("rope_scaling", "llama3", "rope_scaling must be an object"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 0}, "factor must be a number above 0, not 0"),
    ("rope_scaling", {"rope_type": "llama3"}, "the key 'factor' is missing"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, "rotary scaling 'yarn' is not supported"),
    ("layer_types", ["sliding_attention", "full_attention"], "use_sliding_window"),
])
def test_a_wrong_config_is_one_line(folder, key, value, message):
    path = folder()
    change_json(path / "config.json", **{key: value})
    with pytest.raises(UserError, match=re.escape(f"{path / 'config.json'}: ")) as e:
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


def test_a_control_token_without_an_embedding_is_refused(folder):
    path = folder()
    end = Tokenizer(path).end_id
    tokenizer = Tokenizer(path, rows=end)
    assert tokenizer.encode("a <|im_end|>")
    for call in (tokenizer.response, lambda text: tokenizer.chat([{"role": "user", "content": text}])):
        for text in ("a", "a <|im_end|>"):
            with pytest.raises(UserError, match="none for the token"):
                call(text)


def test_files_are_copied_as_they_are(folder, tmp_path):
    """A template in another encoding was a traceback at the first checkpoint."""
    path = folder()
    source = CHATML.encode() + "{# é #}".encode("latin-1")
    (path / "chat_template.jinja").write_bytes(source)
    save(tmp_path / "again", *load(path, "cpu"))
    assert (tmp_path / "again" / "chat_template.jinja").read_bytes() == source


def test_a_saved_folder_has_no_sampling_of_its_source(folder, tmp_path):
    """Engines apply a temperature or a penalty in silence; the model was trained without."""
    path = folder()
    change_json(path / "generation_config.json", temperature=0.7, repetition_penalty=1.1, bos_token_id=3)
    save(tmp_path / "again", *load(path, "cpu"))
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation.keys() == {"bos_token_id", "pad_token_id", "eos_token_id"}


def test_a_base_without_a_template_is_saved_with_one(folder, tmp_path, capsys):
    """What is written renders in transformers to our ids, and ends a turn where we do."""
    transformers = pytest.importorskip("transformers")
    path = folder()
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
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


def test_a_template_of_another_tokenizer_is_told(folder, capsys):
    """Its markers are text to this one, and so is the end of a turn."""
    path = folder()
    load(path, "cpu")
    assert "ends a turn with no token" not in capsys.readouterr().out
    source = "{% for m in messages %}<|start|>{{ m.content }}<|eot|>{% endfor %}"
    (path / "chat_template.jinja").write_text(source)
    load(path, "cpu")
    assert "ends a turn with no token that the tokenizer has; eos_token does" in capsys.readouterr().out


def test_what_run_json_says_of_the_template_is_checked(folder):
    path = folder()
    for flags in ([1], {"chat_template_kwargs": "x"}):
        (path / "run.json").write_text(json.dumps({"flags": flags}))
        with pytest.raises(UserError, match="run.json: .* must be an object"):
            load(path, "cpu")


def test_mini_with_a_slash_is_the_miniature(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_folder("mini/") == find_folder("mini") == Path(MINI)
