"""The sampler generates what the full forward would, whatever the batch, and the command loses no attempt.

The reference is the slow and sure way: the whole sequence through the model for every token.
"""
import random
from collections import Counter, deque
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MINI, read_rows, tiny

import sample
import tasks
from cache import Graphs, KVCache
from grading.answers import verdict
from run.command import UserError
from sample import Request, Sampler, SamplingParams

PROMPTS = [[5, 9, 200, 31], [7], [100 + i for i in range(23)], [3, 3, 3, 3, 3, 3, 3]]


def full_forward(model, prompt, n, stops):
    """Greedy decoding without a cache."""
    tokens = []
    while len(tokens) < n and not (tokens and tokens[-1] in stops):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt + tokens]))
        tokens.append(model.logits(hidden[0, -1]).argmax().item())
    return tokens


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


# ---- the engine ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [3, 16])
def test_cached_decoding_equals_the_full_forward(family, slots):
    """Rule 2: ragged prompts, slots refilled and closed up (3 slots, 8 rows), prompts forked to samples."""
    model, tokenizer = tiny(family)
    got = Sampler(model, tokenizer, slots).generate(PROMPTS, 2, SamplingParams(12, temperature=0))
    for prompt, group in zip(PROMPTS, got, strict=True):
        want = full_forward(model, prompt, 12, tokenizer.stop_ids)
        assert [c.tokens for c in group] == [want, want]


@pytest.mark.parametrize("params", [
    SamplingParams(30),
    SamplingParams(30, temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(30, temperature=1.3, repetition_penalty=1.1),
    SamplingParams(30, temperature=0),
], ids=["plain", "cuts", "penalty", "greedy"])
def test_logprobs_equal_the_trainers(params):
    """Rule 3, and the cuts and the penalty are not in the number."""
    model, tokenizer = tiny("qwen3")
    for prompt, group in zip(PROMPTS, Sampler(model, tokenizer, 5).generate(PROMPTS, 3, params), strict=True):
        for c in group:
            hidden = model(torch.tensor([prompt + c.tokens[:-1]]))[0, len(prompt) - 1:]
            logp, _ = model.logprobs(hidden, torch.tensor(c.tokens), params.temperature or 1)
            assert (logp - torch.tensor(c.logprobs)).abs().max() < 1e-4


def test_a_completion_depends_on_its_identity_only():
    """Rule 4: not on slots, order, the other requests or the number of samples, so not on processes."""
    model, tokenizer = tiny()

    def sampled(slots, prompts=PROMPTS, n=4, seed=3):
        return tokens_of(Sampler(model, tokenizer, slots).generate(prompts, n, SamplingParams(25), seed))

    reference = sampled(16)
    assert sampled(2) == reference
    assert sampled(16, PROMPTS[::-1])[::-1] == reference
    assert sampled(7, PROMPTS[2:3], n=2) == [reference[2][:2]]
    assert sampled(16, seed=4) != reference
    # No two share their randomness.
    assert len({tuple(tokens) for group in reference for tokens in group}) == 16


def test_ends():
    """A stop token is part of the completion; a budget that runs out leaves none; the context is one too."""
    model, tokenizer = tiny()
    stops = set(tokenizer.stop_ids)
    finishes = set()
    groups = Sampler(model, tokenizer, 8).generate(PROMPTS, 8, SamplingParams(300))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            finishes.add(c.finish)
            assert not stops & set(c.tokens[:-1])
            assert (c.finish == "stop") == (c.tokens[-1] in stops)
            assert c.finish == "stop" or len(prompt) + len(c.tokens) == 256
    assert finishes == {"stop", "length"}
    with pytest.raises(UserError, match="has 256 tokens and does not fit the model's context of 256"):
        Sampler(model, tokenizer).generate([[5] * 256], 1, SamplingParams(5))


def test_padded_ids_are_never_sampled():
    """Rule 5: padding rows of the vocabulary with the largest logits of all."""
    model, tokenizer = tiny(padding=9)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[tokenizer.size:] = 50 * embedding[:9]
    groups = tokens_of(Sampler(model, tokenizer, 32).generate(PROMPTS, 8, SamplingParams(20, 5.0)))
    assert max(token for group in groups for tokens in group for token in tokens) < tokenizer.size


def test_repetition_penalty_is_vllms():
    """Positive logits of seen tokens are divided, negative ones multiplied, for prompt and output."""
    model, tokenizer = tiny()
    got = Sampler(model, tokenizer, 2).generate(PROMPTS, 1, SamplingParams(15, 0, repetition_penalty=1.8))
    for prompt, (c,) in zip(PROMPTS, got, strict=True):
        tokens = list(prompt)
        for token in c.tokens:
            with torch.no_grad():
                z = model.logits(model(torch.tensor([tokens]))[0, -1])
            for i in set(tokens):
                z[i] = z[i] / 1.8 if z[i] > 0 else z[i] * 1.8
            assert z.argmax() == token
            tokens.append(token)


# ---- slots and graphs ----------------------------------------------------------------------------
def test_memory_decides_slots_and_is_refused_in_one_line(monkeypatch):
    model, tokenizer = tiny()
    bytes_a_slot = 64 * KVCache.bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(sample, "free_memory", lambda device: 3 * bytes_a_slot / 0.6 + 100)
    sampler = Sampler(model, tokenizer)
    sampler.params = SamplingParams(20)
    sampler.fit_cache([Request(prompt, [0, 1, 2, 3]) for prompt in PROMPTS])
    assert (sampler.cache.slots, sampler.cache.capacity) == (3, 64)
    with pytest.raises(UserError, match="lower --slots or --max-new-tokens"):
        Sampler(model, tokenizer, slots=8).generate(PROMPTS, 4, SamplingParams(20))


def replay_without_a_gpu(graphs, step):
    """In place of Graphs.capture: a replay that runs the step."""
    return step


def test_a_cache_with_graphs_stays(monkeypatch):
    """A GRPO run on a GPU: prompts of several lengths, few questions or many, never more memory than first.

    The cache with its graphs is made anew only when a longer slot or another slot is needed.
    """
    model, tokenizer = tiny()
    total = 100 * 64 * KVCache.bytes_per_token(model.config, torch.float32)
    sampler = Sampler(model, tokenizer, cache_fraction=0.3)
    monkeypatch.setattr(sample, "GRAIN", {"cpu": 16})
    monkeypatch.setattr(
        sample, "free_memory", lambda device: total - (sampler.cache.nbytes if sampler.cache else 0))
    monkeypatch.setattr(Graphs, "capture", replay_without_a_gpu)
    sampler.graphed = True
    caches = []
    for length, rows in [(30, 50), (30, 50), (18, 50), (34, 3), (30, 50), (46, 3), (30, 50)]:
        sampler.generate([[5] * length], rows, SamplingParams(18))
        caches += [sampler.cache] if sampler.cache not in caches else []
    # 30% of 100 slots of 64 positions; then longer ones, fewer.
    assert [(cache.slots, cache.capacity) for cache in caches] == [(40, 48), (30, 64)]


@pytest.mark.parametrize("seed", range(4))
def test_random_workloads_equal_one_row_at_a_time(seed, monkeypatch):
    """Rules 2 and 4, for prompts, groups, budgets, slots and policies of any kind, and late requests.

    Half of them as on a GPU, but for the GPU: whole buckets, steps replayed. Rows end within a burst; what
    they chose after their end is dropped.
    """
    rng = random.Random(seed)
    model, tokenizer = tiny(rng.choice(["qwen2", "qwen3"]), dtype=torch.float64)  # no near-ties
    tokenizer.stop_ids = rng.sample(range(250), 8)
    cut = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2)
    params = rng.choice([SamplingParams(), cut])
    requests = [([3] * 7, 1, 57)]  # it fills a slot of 64 to its last position
    for _ in range(9):
        prompt = [rng.randrange(250) for _ in range(rng.choice([1, 2, 9, 40] if seed < 2 else [1, 9, 150]))]
        requests.append((prompt, rng.randint(1, 4), rng.randint(1, 20)))

    def sample_all(sampler, late):
        queue = deque(Request(prompt, list(range(n)), f"{i}", budget, payload=i)
                      for i, (prompt, n, budget) in enumerate(requests))
        waiting = [queue.pop() for _ in range(late)]
        found = {}
        for request, index, c in sampler.stream(queue, params, seed):
            found[request.payload, index] = (c.tokens, c.finish, len(c.logprobs))
            if waiting:
                queue.append(waiting.pop())
        return found
    want = sample_all(Sampler(model, tokenizer, 1), 0)
    assert {finish for _, finish, _ in want.values()} == {"stop", "length"}
    monkeypatch.setattr(Graphs, "capture", replay_without_a_gpu)
    sampler = Sampler(model, tokenizer, rng.randint(2, 9))
    sampler.graphed = bool(seed % 2)
    sampler.tokens_per_sync = rng.choice([1, 3, 8])
    sampler.free_to_prefill = rng.choice([0, 1 / 8, 1 / 2])
    assert sample_all(sampler, rng.randint(0, 5)) == want
    assert len(want) == sum(n for _, n, _ in requests)
    assert not sampler.graphed or any(sampler.graphs.replays.values())


# ---- the command ---------------------------------------------------------------------------------
ARGS = ("--model", MINI, "--device", "cpu", "--questions", "3", "--n", "2", "--max-new-tokens", "60",
        "--reflections", "2", "--slots", "5")


def test_command_writes_attempts_with_grades_and_reflections(cmd):
    assert cmd(sample, *ARGS)[0] == 0
    rows = read_rows("samples.jsonl")
    assert len(rows) == 3 * 4 * 2
    styles = ["plain", "plan", "alternatives", "rephrase"]
    assert Counter(row["style"] for row in rows) == dict.fromkeys(styles, 6)
    task = tasks.find("countdown-3-small")
    for row in rows:
        problem = tasks.Problem(row["id"], row["task"], row["question"], row["problem"])
        grade = task.grade(problem, row["solution"])
        assert (grade.correct, grade.answer, grade.reason) == (row["correct"], row["answer"], row["reason"])
        assert len(row["reflections"]) == (2 if row["finish"] == "stop" else 0)
        assert all(r["verdict"] == verdict(r["text"]) for r in row["reflections"])
        assert (row["system"] is None) == (row["style"] == "plain")


def test_command_resumes(cmd):
    """Cut the file anywhere, even within a line: the same command adds what is missing, and nothing twice."""
    cmd(sample, *ARGS)
    path = Path("samples.jsonl")
    whole = path.read_text()
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_text(whole[:cut])
        assert cmd(sample, *ARGS)[0] == 0
        again = path.read_text()
        kept = whole[:whole[:cut].rfind("\n") + 1]
        assert again.startswith(kept) and sorted(again.splitlines()) == sorted(whole.splitlines())
    assert "sampling 0 attempts" in cmd(sample, *ARGS)[1]
    path.write_text("")
    assert cmd(sample, *ARGS)[0] == 0 and path.read_text() == whole  # the same seed, the same bytes


def test_hints_are_for_attempts_only(cmd):
    cmd(sample, *ARGS, "--hint", "--styles", "plain")
    rows = read_rows("samples.jsonl")
    assert Counter(row["style"] for row in rows) == {"plain": 6, "plain-hint": 6}
    assert all("Hint" not in row["question"] for row in rows)  # the reflection prompt is made of the question


def test_prompt_by_hand(cmd):
    flags = ("--model", MINI, "--n", "2", "--device", "cpu", "--max-new-tokens", "40")
    status, out, _ = cmd(sample, "--prompt", "What is 7 * 8?", *flags)
    assert status == 0 and out.count("---") == 2
