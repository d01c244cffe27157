"""SFT trains the assistant's turn and its end, nothing else, however a step is cut."""
import math
import re

import pytest
import torch
from conftest import CHAT, SFT, tiny, write_jsonl

import sft
from run.command import UserError
from sft import plain_messages
from sft import Example, learning_rate, loss_of, make_batches

pytestmark = pytest.mark.usefixtures("data")


def examples_of(rows):
    _, tokenizer = tiny()
    write_jsonl("rows.jsonl", rows)
    return sft.read_examples("rows.jsonl", tokenizer, 256), tokenizer


# ---- the loss ------------------------------------------------------------------------------------
def test_loss_is_of_the_assistant_turn_and_its_end():
    """Rule 10, with an independent sum over the tokens of dense logits."""
    examples, tokenizer = examples_of(CHAT[:5])
    model, _ = tiny()
    want = 0.0
    for example, chat in zip(examples, CHAT, strict=False):
        user, assistant = chat["messages"]
        prompt = tokenizer.chat([user])
        ids = prompt + tokenizer.encode(assistant["content"]) + [tokenizer.end_id]
        assert (example.prompt, example.answer) == (prompt, ids[len(prompt):])
        logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
        want -= sum(logp[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
    assert torch.allclose(loss_of(model, examples), want, rtol=1e-5)


def gradients(examples, cuts):
    """The gradient of all weights, from micro-batches of the examples at these indices."""
    model, _ = tiny("qwen3")
    count = sum(len(example.answer) for example in examples)
    for cut in cuts:
        (loss_of(model, [examples[i] for i in cut]) / count).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def test_micro_batches_do_not_change_the_gradient():
    """Rule 9, with rows of different lengths, where a mean of means would differ."""
    rows = []
    for i, chat in enumerate(CHAT[:8]):
        user, assistant = chat["messages"]
        rows.append({"messages": [user, {**assistant, "content": assistant["content"] * (1 + i)}]})
    examples, _ = examples_of(rows)
    whole = gradients(examples, [range(8)])
    for cuts in ([range(0, 4), range(4, 8)], [[0, 7], [1, 6], [2, 5], [3, 4]], [[i] for i in range(8)]):
        assert torch.allclose(gradients(examples, cuts), whole, atol=1e-5, rtol=1e-4)


# ---- batches and schedule ------------------------------------------------------------------------
def test_an_epoch_sees_every_example_once():
    examples = [Example([0], [0] * (n - 1), 0) for n in (5, 3, 9, 4, 2, 7)]
    batches = make_batches(examples, tokens_per_batch=10, seed=0, epoch=0)
    assert sorted(len(e) for batch in batches for e in batch) == [2, 3, 4, 5, 7, 9]
    assert all(sum(map(len, batch)) <= 10 for batch in batches)
    assert make_batches(examples, 10, 0, 0) == batches != make_batches(examples, 10, 0, 1)


def test_schedule():
    rates = [learning_rate(step, 100, 2.0) for step in range(1, 101)]
    assert rates[0] == 0.4 and max(rates) == rates[4] == 2.0 and 0 < rates[-1] < 0.002
    assert rates[52] == pytest.approx(1 + math.cos(math.pi * 48 / 96))


# ---- input ---------------------------------------------------------------------------------------
def turns(user=None, first=None, **last):
    """A row of two exchanges, of which the last assistant's turn has these fields too."""
    return {"messages": [
        {"role": "user", "content": "one", **(user or {})},
        {"role": "assistant", "content": "two", **(first or {})},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four", **last}]}


@pytest.mark.parametrize("row, message", [
    ({"messages": "no"}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last of the messages must be the assistant's"),
    ({"text": "x"}, "the key 'messages' is missing"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "the key 'messages' is missing"),
    (turns(content=""), "the last turn is empty, which would teach silence"),
    (turns(content="", reasoning_content="only this"), "the last turn is empty"),
    (turns(content="<think>x"), "the <think> of the last turn is never closed"),
    (turns(content="y", reasoning_content="a</think>b"), "reasoning must be text"),
    (turns(content=None), "messages must be a list"),
    (turns(weight=0), "weight is 0, but the last turn of a row is trained and no other"),
    (turns(train=False), "train is false, but"),
    (turns(first={"weight": 1}), "weight is 1, but"),
    ({**turns(), "train": False}, "train is false, but"),
    (turns(tool_calls=[{"function": {"name": "f"}}]), "tool_calls is not supported"),
    (turns(first={"function_call": {"name": "f"}}), "function_call is not supported"),
    ({**turns(), "system": "Be brief."}, "system is not supported"),
    (turns(refusal="I cannot"), "refusal is not supported"),
    ({**turns(), "tools": [{"type": "function"}]}, "tools is not supported"),
    (turns(user={"role": "tool"}), "messages must be a list of {role: system|user|assistant"),
    (turns(user={"content": [{"type": "image_url", "image_url": "x"}]}), "messages must be a list"),
    (turns(user={"thinking": "hm"}), "reasoning must be text, of an assistant's turn"),
    (turns(reasoning_content="a", content="<think>b</think>c"), "reasoning must be text"),
    (turns(thinking=["a"]), "reasoning must be text"),
])
def test_fields_that_change_the_meaning_are_not_dropped(row, message):
    with pytest.raises(UserError, match=f"rows.jsonl:2: {re.escape(message)}"):
        examples_of([CHAT[0], row])


@pytest.mark.parametrize("row, texts", [
    (turns(), ["one", "two", "three", "four"]),
    (turns(weight=1, first={"weight": 0}), ["one", "two", "three", "four"]),
    (turns(train=True, refusal=None, tool_calls=[], name="x"), ["one", "two", "three", "four"]),
    (turns(content=[{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]),
     ["one", "two", "three", "four"]),
    (turns(reasoning_content="why\n"), ["one", "two", "three", "<think>\nwhy\n</think>\n\nfour"]),
    (turns(reasoning="why"), ["one", "two", "three", "<think>\nwhy\n</think>\n\nfour"]),
    (turns(first={"thinking": "why"}), ["one", "<think>\nwhy\n</think>\n\ntwo", "three", "four"]),
    (turns(user={"weight": 0, "train": True, "label": "math"}), ["one", "two", "three", "four"]),
])
def test_fields_that_are_used(row, texts):
    assert [m["content"] for m in plain_messages(row, "chat.jsonl:1")] == texts


def test_rows_over_the_context_are_counted(cmd):
    user, assistant = CHAT[0]["messages"]
    long = {"messages": [user, {**assistant, "content": "word " * 300}]}
    write_jsonl("chat.jsonl", [*CHAT, long])
    status, out, _ = cmd(sft, *SFT, "--context", "200")
    assert status == 0 and "left out 1 of 29 rows" in out
