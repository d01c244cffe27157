"""A model folder means what it says, and a wrong one is named as such."""
import json
from pathlib import Path

import pytest
import torch
from conftest import MINI
from safetensors.torch import load_file, save_file

from checkpoint import load, save
from cli import UserError
from tokenizer import Tokenizer

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


def test_shards_stay_inside_the_folder(folder):
    """Rule 8: an index cannot point elsewhere."""
    path = folder()
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
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


def test_tied_head_stored_twice_is_read_once(folder):
    path = folder()
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors")
    assert not hasattr(load(path, "cpu")[0], "lm_head")
