import json
from collections import Counter, deque

import pytest
import torch
from conftest import FAMILIES, MINI, tiny

import sample
import tasks
from cli import UserError
from sample import Params, Request, Sampler

PROMPTS = [[5, 9, 200, 31], [7], [100 + i for i in range(23)], [3, 3, 3, 3, 3, 3, 3]]


def full_forward(model, prompt, n, stops):
    """Greedy decoding the slow and sure way: the whole sequence through the model for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n and not (len(tokens) > len(prompt) and tokens[-1] in stops):
        with torch.no_grad():
            tokens.append(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax().item())
    return tokens[len(prompt):]


# ---- the engine ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_cached_decoding_equals_the_full_forward(family, slots):
    """Rule 2: ragged prompts, slots that are refilled and closed up (3 slots, 8 rows), prompts forked to several samples."""
    model, tokenizer = tiny(family)
    got = Sampler(model, tokenizer, slots).generate(PROMPTS, 2, Params(12, temperature=0))
    for prompt, group in zip(PROMPTS, got):
        want = full_forward(model, prompt, 12, tokenizer.stop_ids)
        assert [c.tokens for c in group] == [want, want]


def test_rows_that_end_apart_leave_the_others_whole():
    """Rule 2: budgets of 3 to 24 tokens, so that rows end at different times and live ones move into the gaps."""
    model, tokenizer = tiny()
    queue = deque(Request(PROMPTS[i % 4], [0], max_new_tokens=3 + 7 * i % 22, tag=i) for i in range(12))
    budgets = {r.tag: r.max_new_tokens for r in queue}
    for request, _, c in Sampler(model, tokenizer, 5).stream(queue, Params(99, temperature=0)):
        assert c.tokens == full_forward(model, request.prompt, budgets[request.tag], tokenizer.stop_ids), request.tag


@pytest.mark.parametrize("params", [Params(30), Params(30, 0.7, 20, 0.8), Params(30, 1.3, repetition_penalty=1.1), Params(30, 0)])
def test_logprobs_equal_the_trainers(params):
    """Rule 3, and the cuts and the penalty are not in the number."""
    model, tokenizer = tiny("qwen3")
    for prompt, group in zip(PROMPTS, Sampler(model, tokenizer, 5).generate(PROMPTS, 3, params)):
        for c in group:
            hidden = model(torch.tensor([prompt + c.tokens[:-1]]))[0, len(prompt) - 1:]
            logp, _ = model.logprobs(hidden, torch.tensor(c.tokens), params.temperature or 1)
            assert (logp - torch.tensor(c.logprobs)).abs().max() < 1e-4


def test_a_completion_depends_on_its_key_only():
    """Rule 4: not on slots, order, the other requests, or the number of samples (so not on processes, which split requests)."""
    model, tokenizer = tiny()
    reference = Sampler(model, tokenizer, 16).generate(PROMPTS, 4, Params(25), seed=3)
    tokens = lambda groups: [[c.tokens for c in g] for g in groups]
    assert tokens(Sampler(model, tokenizer, 2).generate(PROMPTS, 4, Params(25), seed=3)) == tokens(reference)
    assert tokens(Sampler(model, tokenizer, 16).generate(PROMPTS[::-1], 4, Params(25), seed=3))[::-1] == tokens(reference)
    assert tokens(Sampler(model, tokenizer, 7).generate(PROMPTS[2:3], 2, Params(25), seed=3)) == [tokens(reference)[2][:2]]
    assert tokens(Sampler(model, tokenizer, 16).generate(PROMPTS, 4, Params(25), seed=4)) != tokens(reference)
    assert len({tuple(t) for g in tokens(reference) for t in g}) == 16  # no two samples share their randomness


def test_requests_may_join_while_others_run():
    """The queue grows by a longer request: the cache is made anew for it and nothing that ran before is disturbed."""
    model, tokenizer = tiny()
    queue = deque([Request(PROMPTS[0], [0, 1], "a"), Request(PROMPTS[3], [0], "b")])
    seen, added = {}, False
    for request, index, c in Sampler(model, tokenizer, 2).stream(queue, Params(20), 0):
        seen[request.key, index] = c.tokens
        if not added:
            added = True
            queue.appendleft(Request([9] * 150, [0], "c"))
    alone = Sampler(model, tokenizer, 4).generate([PROMPTS[0], PROMPTS[3], [9] * 150], 2, Params(20), 0, ["a", "b", "c"])
    assert seen == {("a", 0): alone[0][0].tokens, ("a", 1): alone[0][1].tokens, ("b", 0): alone[1][0].tokens, ("c", 0): alone[2][0].tokens}


def test_weights_are_shared_with_training():
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, 4)
    before = sampler.generate(PROMPTS, 1, Params(10, 0))
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.3).add_(0.01)
    after = sampler.generate(PROMPTS, 1, Params(10, 0))
    assert [g[0].tokens for g in after] == [full_forward(model, p, 10, tokenizer.stop_ids) for p in PROMPTS] != [g[0].tokens for g in before]


def test_ends():
    """A stop token is part of the completion; a budget that runs out leaves none; the context is a budget too."""
    model, tokenizer = tiny()
    groups = Sampler(model, tokenizer, 8).generate(PROMPTS, 8, Params(300))
    for prompt, group in zip(PROMPTS, groups):
        for c in group:
            inside = set(c.tokens[:-1] if c.finish == "stop" else c.tokens) & set(tokenizer.stop_ids)
            assert not inside and (c.finish == "stop") == (c.tokens[-1] in tokenizer.stop_ids)
            assert c.finish == "stop" or len(prompt) + len(c.tokens) == 256
    assert {c.finish for g in groups for c in g} == {"stop", "length"}
    with pytest.raises(UserError, match="does not fit the model's context of 256"):
        Sampler(model, tokenizer).generate([[5] * 256], 1, Params(5))


def test_padded_ids_are_never_sampled():
    """Rule 5: padding rows of the vocabulary with the largest logits of all."""
    model, tokenizer = tiny(padding=9)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.size:] = 50 * model.model.embed_tokens.weight[:9]
    groups = Sampler(model, tokenizer, 32).generate(PROMPTS, 8, Params(20, temperature=5.0))
    assert max(t for g in groups for c in g for t in c.tokens) < tokenizer.size


def test_memory_decides_slots_and_is_refused_in_one_line(monkeypatch):
    model, tokenizer = tiny()
    each = 64 * sample.KVCache.bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(sample, "free_memory", lambda device: 3 * each / 0.6 + 100)
    made, real = [], sample.KVCache.__init__
    monkeypatch.setattr(sample.KVCache, "__init__", lambda self, config, slots, *a: made.append(slots) or real(self, config, slots, *a))
    Sampler(model, tokenizer).generate(PROMPTS, 4, Params(20))
    assert made[0] == 3
    with pytest.raises(UserError, match="lower --slots or --max-new-tokens"):
        Sampler(model, tokenizer, slots=8).generate(PROMPTS, 4, Params(20))


def test_a_cache_with_graphs_stays(monkeypatch):
    """A GRPO run on a GPU: prompts a little longer or shorter, few questions or many, never more memory than at first, and the
    cache with its graphs is made anew only when a longer slot or another slot is needed."""
    model, tokenizer = tiny()
    monkeypatch.setattr(sample, "GRAIN", {"cpu": 16})
    total = 100 * 64 * sample.KVCache.bytes_per_token(model.config, torch.float32)
    sampler, made, real = Sampler(model, tokenizer, share=0.3), [], sample.KVCache.__init__
    monkeypatch.setattr(sample, "free_memory", lambda device: total - (2 * sampler.cache.k.nbytes if sampler.cache else 0))
    monkeypatch.setattr(sample.KVCache, "__init__", lambda self, config, slots, capacity, *a: made.append((slots, capacity)) or real(self, config, slots, capacity, *a))
    monkeypatch.setattr(Sampler, "_capture", lambda self, B, longest: lambda: self._advance(B, longest))
    sampler.graphed = True
    for length, rows in [(30, 50), (30, 50), (18, 50), (34, 3), (30, 50), (46, 3), (30, 50)]:
        sampler.generate([[5] * length], rows, Params(18))
    assert made == [(40, 48), (30, 64)]  # 30% of 100 slots of 64 positions; then longer ones, fewer


@pytest.mark.parametrize("params", [Params(30, 0), Params(30, 0.9, 20, repetition_penalty=1.2)])
def test_looking_less_often_changes_nothing(monkeypatch, params):
    """What a GPU does, but for the GPU: five tokens between two looks, steps of whole buckets, each kind of step run once and from
    then on replayed. Rows end within a burst; what they chose after their end is dropped; filled-up slots disturb nobody."""
    model, tokenizer = tiny()
    budgets = [3 + 7 * i % 22 for i in range(10)] + [41, 57]  # the last two fill a slot of 64 to its last position

    def sample_all(sampler):
        queue = deque(Request(PROMPTS[i % 4], [0, 1], f"question {i}", max_new_tokens=n, tag=i) for i, n in enumerate(budgets))
        return {(r.tag, index): (c.tokens, c.finish, len(c.logprobs)) for r, index, c in sampler.stream(queue, params)}
    tokenizer.stop_ids = []
    free = {key: tokens for key, (tokens, *_) in sample_all(Sampler(model, tokenizer, 7)).items()}
    tokenizer.stop_ids = sorted({t for tokens in free.values() for t in tokens} - {*free[10, 0], *free[10, 1]})[::3]
    want = sample_all(Sampler(model, tokenizer, 7))
    assert {finish for _, finish, _ in want.values()} == {"stop", "length"} and any(len(want[10, i][0]) == 41 for i in range(2))
    captured = []
    monkeypatch.setattr(Sampler, "_capture", lambda self, B, longest: captured.append(B) or (lambda: self._advance(B, longest)))
    sampler = Sampler(model, tokenizer, 7)
    sampler.look, sampler.graphed = 5, True
    assert sample_all(sampler) == want
    assert sorted(captured) == sorted(set(captured)) and {4, 7} <= set(captured) <= {1, 2, 4, 7}
    sampler.release()
    before = len(captured)
    assert sample_all(sampler) == want and len(captured) == before  # the cache and its graphs stayed


def test_repetition_penalty_is_vllms():
    """Positive logits of seen tokens are divided, negative ones multiplied, for prompt and output: greedy by hand."""
    model, tokenizer = tiny()
    got = Sampler(model, tokenizer, 2).generate(PROMPTS, 1, Params(15, 0, repetition_penalty=1.8))
    for prompt, (c,) in zip(PROMPTS, got):
        tokens = list(prompt)
        for t in c.tokens:
            with torch.no_grad():
                z = model.logits(model(torch.tensor([tokens]))[0, -1])
            for i in set(tokens):
                z[i] = z[i] / 1.8 if z[i] > 0 else z[i] * 1.8
            assert z.argmax() == t
            tokens.append(t)


# ---- the command -----------------------------------------------------------------------------------------------------

ARGS = ("--model", MINI, "--questions", "3", "--n", "2", "--max-new-tokens", "60", "--slots", "5", "--device", "cpu")


def test_command_writes_and_resumes(cmd, tmp_path):
    """Cut the file anywhere, even within a line: the same command adds what is missing, and nothing twice."""
    status, out, _ = cmd(sample, *ARGS)
    whole = (tmp_path / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert status == 0 and len(rows) == 3 * 4 * 2
    assert Counter(r["style"] for r in rows) == dict.fromkeys(["plain", "plan", "alternatives", "rephrase"], 6)
    task = tasks.find("countdown-3-small")
    for row in rows:
        grade = task.grade(tasks.Problem(row["id"], row["task"], row["question"], row["problem"]), row["solution"])
        assert (grade.correct, grade.answer, grade.reason) == (row["correct"], row["answer"], row["reason"])
        assert len(row["reflections"]) == (2 if row["finish"] == "stop" else 0)
        assert all(r["verdict"] == tasks.verdict(r["text"]) for r in row["reflections"])
        assert (row["system"] is None) == (row["style"] == "plain")
    for cut in (len(whole) // 2, len(whole) - 1, 3):
        (tmp_path / "samples.jsonl").write_text(whole[:cut])
        assert cmd(sample, *ARGS)[0] == 0
        again = (tmp_path / "samples.jsonl").read_text()
        assert sorted(again.splitlines()) == sorted(whole.splitlines())
        assert again.startswith(whole[:whole[:cut].rfind("\n") + 1])
    assert "sampling 0 attempts" in cmd(sample, *ARGS)[1]
    assert "--n 2, not 3" in cmd(sample, *ARGS, "--n", "3")[2]


def test_same_seed_same_bytes_and_shards_cover(cmd, tmp_path):
    cmd(sample, *ARGS, "--out", "a.jsonl")
    cmd(sample, *ARGS, "--out", "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    for i in range(2):
        cmd(sample, *ARGS, "--out", f"shard{i}.jsonl", "--shard", f"{i}/2")
    shards = (tmp_path / "shard0.jsonl").read_text() + (tmp_path / "shard1.jsonl").read_text()
    assert sorted(shards.splitlines()) == sorted((tmp_path / "a.jsonl").read_text().splitlines())


def test_hints_are_for_attempts_only(cmd, tmp_path):
    cmd(sample, *ARGS, "--hint", "--styles", "plain")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert Counter(r["style"] for r in rows) == {"plain": 6, "plain-hint": 6}
    assert all("Hint" not in r["question"] for r in rows)  # the reflection prompt is made of the question


def test_prompt_by_hand(cmd):
    status, out, _ = cmd(sample, "--model", MINI, "--prompt", "What is 7 * 8?", "--n", "2", "--device", "cpu", "--max-new-tokens", "40")
    assert status == 0 and out.count("---") == 2
