"""The whole method on models that think: one whose prompts open <think>, one that can switch it off."""
import json

import pytest
import torch
from conftest import FAMILIES, TINY, read_rows, refused, write_jsonl
from test_tokenizer import TEMPLATES, folder_with

import evaluate
import grpo
import rearrange
import sample
import sft
from checkpoint import config_of, save
from checkpoint.tokenizer import Tokenizer
from model import Transformer

TASK = ("--task", "multiply-2-small")
OFF = {"enable_thinking": False}


def thinker(path, name):
    """A random model with the template of a public one."""
    case, = [case for case in TEMPLATES if case["name"] == name]
    tokenizer = Tokenizer(folder_with(path, case))
    torch.manual_seed(0)
    config = {**TINY, **FAMILIES["qwen2"], "vocab_size": tokenizer.size, "max_position_embeddings": 2048}
    model = Transformer(config_of(config))
    for w in model.parameters():
        torch.nn.init.normal_(w, std=0.3)
    save(path, model, tokenizer)
    return tokenizer


def right_answers(rows):
    """As if the random model had solved the problems and checked what it did."""
    for row in rows:
        answer = str(row["problem"]["answer"])
        row.update(solution=f"It is <answer>{answer}</answer>", answer=answer, correct=True, finish="stop")
        row["reflections"] = [{"text": "<verdict>Correct</verdict>", "verdict": True, "finish": "stop"}]
    return rows


@pytest.mark.parametrize("name, flags, kwargs, opening", [
    ("r1", (), None, "<think>\n"),
    ("qwen3", ("--chat-template-kwargs", json.dumps(OFF)), OFF, ""),
])
def test_sample_to_evaluate(cmd, tmp_path, name, flags, kwargs, opening):
    tokenizer = thinker(tmp_path / "base", name)
    assert tokenizer.opening == opening
    few = ("--max-new-tokens", 8, "--device", "cpu")
    assert cmd(sample, "--model", "base", *TASK, "--questions", 4, "--n", 1, *few, *flags)[0] == 0
    other = ("--chat-template-kwargs", '{"enable_thinking": true}')
    again = ("--model", "base", *TASK, "--questions", 4, "--n", 1, *few, *other)
    refused(cmd, sample, again, "--chat-template-kwargs")
    write_jsonl("right.jsonl", right_answers(read_rows("samples.jsonl")))
    assert cmd(rearrange, "--data", "right.jsonl")[0] == 0
    assert read_rows("silver.jsonl")[0]["messages"][-1]["content"].startswith("<think>\n<sample>\n")
    assert cmd(sft, "--model", "base", "--out", "sft", "--epochs", 1, "--device", "cpu", *flags)[0] == 0
    few = ("--questions", 4, *TASK, *few)
    step = ("--steps", 1, "--questions-per-step", 4)
    status, out, _ = cmd(grpo, "--model", "sft", "--out", "grpo", *step, *few)
    assert status == 0 and ("as its run.json says" in out) == bool(kwargs)
    for run in ("sft", "grpo"):
        recorded = json.loads((tmp_path / run / "run.json").read_text())["flags"]
        assert recorded["chat_template_kwargs"] == kwargs
    few = ("--questions", 2, "--samples", 2, "--tasks", TASK[1], "--max-new-tokens", 8, "--device", "cpu")
    assert cmd(evaluate, "--models", "sft,grpo", "--budget-forcing", "--out", "evaluate", *few)[0] == 0
    for row in read_rows("evaluate/results.jsonl"):
        assert row["response"].startswith(opening) and row["forced"]["response"].startswith(opening)


def test_a_trace_begins_where_its_prompt_ends(tmp_path):
    """There is one <think> in prompt and response together."""
    tokenizer = thinker(tmp_path / "base", "r1")
    trace = "<think>\n<sample>\n1\n</sample>\n</think>\n\n<answer>1</answer>"
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": trace}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    example, = sft.read_examples(str(path), tokenizer, 2048)
    text = tokenizer.decode(example.prompt + example.answer)
    assert text.count("<think>") == 1 and "<think>\n<sample>\n" in text
    assert tokenizer.decode(example.answer).startswith("<sample>\n")
    assert example.answer[-1] == tokenizer.end_id


@pytest.mark.parametrize("text, want", [
    ("<think>\nhm</think>\n\nSo <answer>1</answer>", "So <answer>1</answer>"),
    ("<think>\nhm</think>\n</think>x", "</think>x"),
    ("<think>\nhm", "<think>\nhm"),  # it never ended: dropped later, for its tag
])
def test_the_attempt_is_what_follows_the_models_own_thought(tmp_path, text, want):
    r1, qwen3 = thinker(tmp_path / "r1", "r1"), thinker(tmp_path / "qwen3", "qwen3")
    assert r1.after_own_thought([*r1.encode(text.removeprefix("<think>\n")), r1.end_id]) == want
    assert qwen3.after_own_thought(qwen3.encode(text)) == text


def test_attempts_are_cut_after_the_models_own_thought(cmd, tmp_path, monkeypatch):
    """In the file that sample.py writes."""
    thinker(tmp_path / "base", "r1")
    thought = "hm</think>\n\nSo <answer>1</answer>"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: thought)
    few = ("--questions", 2, "--max-new-tokens", 4, "--device", "cpu")
    assert cmd(sample, "--model", "base", *TASK, *few)[0] == 0
    for row in read_rows("samples.jsonl"):
        assert row["solution"] == "So <answer>1</answer>" and row["answer"] == "1"


def test_a_model_that_thinks_unasked_is_named(cmd, tmp_path):
    """480 of 480 attempts were dropped for a tag, and the advice was to sample more."""
    thinker(tmp_path / "base", "qwen3")
    few = ("--questions", 2, "--max-new-tokens", 4, "--device", "cpu")
    assert cmd(sample, "--model", "base", *TASK, *few)[0] == 0
    rows = right_answers(read_rows("samples.jsonl"))
    for row in rows:
        row["solution"] = "<think>\nhm\n</think>\n\n" + row["solution"]
    write_jsonl("thoughts.jsonl", rows)
    status, out, _ = cmd(rearrange, "--data", "thoughts.jsonl")
    assert status == 2 and f"dropped {len(rows)} (opens with <think>: the model thinks before" in out
