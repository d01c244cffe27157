"""The sampler generates what the full forward would, whatever the batch, and the command loses no attempt.

The reference is the slow and sure way: the whole sequence through the model for every token.
"""
import random
from collections import Counter, deque
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MINI, read_rows, refused, tiny

import sample
import tasks
from cache import Graphs, KVCache
from cli import UserError
from grading import verdict
from sample import Params, Request, Sampler

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
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_cached_decoding_equals_the_full_forward(family, slots):
    """Rule 2: ragged prompts, slots refilled and closed up (3 slots, 8 rows), prompts forked to samples."""
    model, tokenizer = tiny(family)
    got = Sampler(model, tokenizer, slots).generate(PROMPTS, 2, Params(12, temperature=0))
    for prompt, group in zip(PROMPTS, got, strict=True):
        want = full_forward(model, prompt, 12, tokenizer.stop_ids)
        assert [c.tokens for c in group] == [want, want]


def test_rows_that_end_apart_leave_the_others_whole():
    """Rule 2: rows end at different times (budgets of 3 to 24 tokens) and live ones move into the gaps."""
    model, tokenizer = tiny()
    budgets = [3 + 7 * i % 22 for i in range(12)]
    queue = deque(Request(PROMPTS[i % 4], [0], max_new_tokens=n, payload=i) for i, n in enumerate(budgets))
    for request, _, c in Sampler(model, tokenizer, 5).stream(queue, Params(99, temperature=0)):
        want = full_forward(model, request.prompt, budgets[request.payload], tokenizer.stop_ids)
        assert c.tokens == want, request.payload


@pytest.mark.parametrize("params", [
    Params(30),
    Params(30, temperature=0.7, top_k=20, top_p=0.8),
    Params(30, temperature=1.3, repetition_penalty=1.1),
    Params(30, temperature=0),
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
        return tokens_of(Sampler(model, tokenizer, slots).generate(prompts, n, Params(25), seed))

    reference = sampled(16)
    assert sampled(2) == reference
    assert sampled(16, PROMPTS[::-1])[::-1] == reference
    assert sampled(7, PROMPTS[2:3], n=2) == [reference[2][:2]]
    assert sampled(16, seed=4) != reference
    # No two share their randomness.
    assert len({tuple(tokens) for group in reference for tokens in group}) == 16


def test_requests_may_join_while_others_run():
    """A longer request joins: the cache is made anew for it and nothing that ran before is disturbed."""
    model, tokenizer = tiny()
    long = [9] * 150
    queue = deque([Request(PROMPTS[0], [0, 1], "a"), Request(PROMPTS[3], [0], "b")])
    seen = {}
    for request, index, c in Sampler(model, tokenizer, 2).stream(queue, Params(20), 0):
        if not seen:
            queue.appendleft(Request(long, [0], "c"))
        seen[request.identity, index] = c.tokens
    sampler = Sampler(model, tokenizer, 4)
    a, b, c = tokens_of(sampler.generate([PROMPTS[0], PROMPTS[3], long], 2, Params(20), 0, ["a", "b", "c"]))
    assert seen == {("a", 0): a[0], ("a", 1): a[1], ("b", 0): b[0], ("c", 0): c[0]}


def test_weights_are_shared_with_training():
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, 4)
    before = tokens_of(sampler.generate(PROMPTS, 1, Params(10, 0)))
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.3).add_(0.01)
    after = tokens_of(sampler.generate(PROMPTS, 1, Params(10, 0)))
    assert after == [[full_forward(model, prompt, 10, tokenizer.stop_ids)] for prompt in PROMPTS] != before


def test_ends():
    """A stop token is part of the completion; a budget that runs out leaves none; the context is one too."""
    model, tokenizer = tiny()
    stops = set(tokenizer.stop_ids)
    finishes = set()
    groups = Sampler(model, tokenizer, 8).generate(PROMPTS, 8, Params(300))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            finishes.add(c.finish)
            assert not stops & set(c.tokens[:-1])
            assert (c.finish == "stop") == (c.tokens[-1] in stops)
            assert c.finish == "stop" or len(prompt) + len(c.tokens) == 256
    assert finishes == {"stop", "length"}
    with pytest.raises(UserError, match="does not fit the model's context of 256"):
        Sampler(model, tokenizer).generate([[5] * 256], 1, Params(5))


def test_padded_ids_are_never_sampled():
    """Rule 5: padding rows of the vocabulary with the largest logits of all."""
    model, tokenizer = tiny(padding=9)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[tokenizer.size:] = 50 * embedding[:9]
    groups = tokens_of(Sampler(model, tokenizer, 32).generate(PROMPTS, 8, Params(20, temperature=5.0)))
    assert max(token for group in groups for tokens in group for token in tokens) < tokenizer.size


def test_repetition_penalty_is_vllms():
    """Positive logits of seen tokens are divided, negative ones multiplied, for prompt and output."""
    model, tokenizer = tiny()
    got = Sampler(model, tokenizer, 2).generate(PROMPTS, 1, Params(15, 0, repetition_penalty=1.8))
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
@pytest.fixture
def caches(monkeypatch):
    """The (slots, capacity) of every cache that is made."""
    made = []
    real = KVCache.__init__

    def init(self, config, slots, capacity, device, dtype):
        made.append((slots, capacity))
        real(self, config, slots, capacity, device, dtype)
    monkeypatch.setattr(KVCache, "__init__", init)
    return made


def test_memory_decides_slots_and_is_refused_in_one_line(monkeypatch, caches):
    model, tokenizer = tiny()
    bytes_a_slot = 64 * KVCache.bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(sample, "free_memory", lambda device: 3 * bytes_a_slot / 0.6 + 100)
    Sampler(model, tokenizer).generate(PROMPTS, 4, Params(20))
    assert caches[0] == (3, 64)
    with pytest.raises(UserError, match="lower --slots or --max-new-tokens"):
        Sampler(model, tokenizer, slots=8).generate(PROMPTS, 4, Params(20))


def replay_without_a_gpu(graphs, step):
    """In place of Graphs.capture: a replay that runs the step."""
    return step


def test_a_cache_with_graphs_stays(monkeypatch, caches):
    """A GRPO run on a GPU: prompts of several lengths, few questions or many, never more memory than first.

    The cache with its graphs is made anew only when a longer slot or another slot is needed.
    """
    model, tokenizer = tiny()
    total = 100 * 64 * KVCache.bytes_per_token(model.config, torch.float32)
    sampler = Sampler(model, tokenizer, cache_fraction=0.3)
    monkeypatch.setattr(sample, "GRAIN", {"cpu": 16})
    def free_memory(device):
        return total - (sampler.cache.nbytes if sampler.cache else 0)
    monkeypatch.setattr(sample, "free_memory", free_memory)
    monkeypatch.setattr(Graphs, "capture", replay_without_a_gpu)
    sampler.graphed = True
    for length, rows in [(30, 50), (30, 50), (18, 50), (34, 3), (30, 50), (46, 3), (30, 50)]:
        sampler.generate([[5] * length], rows, Params(18))
    assert caches == [(40, 48), (30, 64)]  # 30% of 100 slots of 64 positions; then longer ones, fewer


# The last two fill a slot of 64 to its last position.
BUDGETS = [3 + 7 * i % 22 for i in range(10)] + [41, 57]


@pytest.mark.parametrize("params", [Params(30, 0), Params(30, 0.9, 20, repetition_penalty=1.2)])
def test_looking_less_often_changes_nothing(monkeypatch, params):
    """What a GPU does, but for the GPU: five tokens between reads, whole buckets, steps replayed.

    Rows end within a burst; what they chose after their end is dropped; filled-up slots disturb nobody.
    """
    model, tokenizer = tiny()

    def sample_all(sampler):
        queue = deque()
        for i, n in enumerate(BUDGETS):
            queue.append(Request(PROMPTS[i % 4], [0, 1], f"question {i}", max_new_tokens=n, payload=i))
        found = {}
        for request, index, c in sampler.stream(queue, params):
            found[request.payload, index] = (c.tokens, c.finish, len(c.logprobs))
        return found

    # Stop tokens that really occur, but not in one of the longest rows.
    tokenizer.stop_ids = []
    free = {key: tokens for key, (tokens, *_) in sample_all(Sampler(model, tokenizer, 7)).items()}
    occurring = {token for tokens in free.values() for token in tokens}
    tokenizer.stop_ids = sorted(occurring - {*free[10, 0], *free[10, 1]})[::3]
    want = sample_all(Sampler(model, tokenizer, 7))
    assert {finish for _, finish, _ in want.values()} == {"stop", "length"}
    assert any(len(want[10, index][0]) == 41 for index in (0, 1))

    kinds = []
    monkeypatch.setattr(Graphs, "capture", replay_without_a_gpu)
    real = Graphs.run
    monkeypatch.setattr(Graphs, "run", lambda self, kind, step: kinds.append(kind) or real(self, kind, step))
    sampler = Sampler(model, tokenizer, 7)
    sampler.tokens_per_sync, sampler.graphed = 5, True
    assert sample_all(sampler) == want
    captured = {B for (B, _), count in Counter(kinds).items() if count > 1}
    assert {7} < captured <= {1, 2, 4, 7}
    graphs = sampler.graphs
    sampler.release()
    assert sample_all(sampler) == want and sampler.graphs is graphs  # the cache and its graphs stayed


def watched():
    """A Sampler of 8 slots that looks every 4 tokens, and the samples that were running at each look."""
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, 8)
    sampler.tokens_per_sync = 4
    sampler.free_to_prefill = 1 / 2
    looks = []
    real = sampler.step
    sampler.step = lambda: looks.append([s.request.payload for s in sampler.live]) or real()
    return sampler, looks


def test_prompts_wait_until_enough_slots_are_free():
    """On a GPU to run a prompt costs ten steps. Further samples of a prompt that is there come at once."""
    sampler, looks = watched()
    queue = deque(Request(PROMPTS[0], [0], f"{i}", max_new_tokens=4 * (1 + i), payload=i) for i in range(8))
    queue.append(Request(PROMPTS[1], list(range(9)), "nine", max_new_tokens=40, payload="nine"))
    queue.append(Request(PROMPTS[2], [0], "last", max_new_tokens=4, payload="last"))
    sampler.tokenizer.stop_ids = []
    done = [r.payload for r, _, _ in sampler.stream(queue, Params(99))]
    rows = [look.count("nine") for look in looks]
    # One slot is free at the second look, two at the third, ...: its prompt is run at the fifth, with four.
    assert rows[:9] == [0, 0, 0, 0, 4, 5, 6, 7, 8]
    assert sorted(map(str, done)) == sorted([*map(str, range(8)), *["nine"] * 9, "last"])


def test_the_last_prompts_do_not_wait():
    """All that waits fits: nothing is gained by waiting."""
    sampler, looks = watched()
    sampler.tokenizer.stop_ids = []
    budgets = [4, *[40] * 7]
    queue = deque(Request(PROMPTS[0], [0], f"{i}", n, payload=i) for i, n in enumerate(budgets))
    queue.append(Request(PROMPTS[1], [0], "last", max_new_tokens=4, payload="last"))
    assert len(list(sampler.stream(queue, Params(99)))) == 9
    assert "last" in looks[1]


@pytest.mark.parametrize("seed", range(4))
def test_random_workloads_equal_one_row_at_a_time(seed):
    """Rule 4, for prompts, groups, budgets, slots and policies of any kind, and requests that come late."""
    rng = random.Random(seed)
    model, tokenizer = tiny(rng.choice(["qwen2", "qwen3"]), dtype=torch.float64)  # no near-ties
    params = rng.choice([Params(), Params(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2)])
    requests = []
    for _ in range(9):
        prompt = [rng.randrange(250) for _ in range(rng.choice([1, 2, 9, 40]))]
        requests.append((prompt, rng.randint(1, 4), rng.randint(1, 20)))

    def sample_all(sampler, late):
        queue = deque(Request(prompt, list(range(n)), f"{i}", budget, payload=i)
                      for i, (prompt, n, budget) in enumerate(requests))
        waiting = [queue.pop() for _ in range(late)]
        found = {}
        for request, index, c in sampler.stream(queue, params, seed):
            found[request.payload, index] = c.tokens
            if waiting:
                queue.append(waiting.pop())
        return found
    want = sample_all(Sampler(model, tokenizer, 1), 0)
    sampler = Sampler(model, tokenizer, rng.randint(2, 9))
    sampler.tokens_per_sync = rng.choice([1, 3, 8])
    sampler.free_to_prefill = rng.choice([0, 1 / 8, 1 / 2])
    assert sample_all(sampler, rng.randint(0, 5)) == want
    assert len(want) == sum(n for _, n, _ in requests)


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
    for cut in (len(whole) // 2, len(whole) - 1, 3):
        path.write_text(whole[:cut])
        assert cmd(sample, *ARGS)[0] == 0
        again = path.read_text()
        kept = whole[:whole[:cut].rfind("\n") + 1]
        assert again.startswith(kept) and sorted(again.splitlines()) == sorted(whole.splitlines())
    assert "sampling 0 attempts" in cmd(sample, *ARGS)[1]
    refused(cmd, sample, (*ARGS, "--n", "3"), "--n 2, not 3")


def test_same_seed_same_bytes(cmd):
    cmd(sample, *ARGS, "--out", "a.jsonl")
    cmd(sample, *ARGS, "--out", "b.jsonl")
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()


def test_hints_are_for_attempts_only(cmd):
    cmd(sample, *ARGS, "--hint", "--styles", "plain")
    rows = read_rows("samples.jsonl")
    assert Counter(row["style"] for row in rows) == {"plain": 6, "plain-hint": 6}
    assert all("Hint" not in row["question"] for row in rows)  # the reflection prompt is made of the question


def test_prompt_by_hand(cmd):
    flags = ("--model", MINI, "--n", "2", "--device", "cpu", "--max-new-tokens", "40")
    status, out, _ = cmd(sample, "--prompt", "What is 7 * 8?", *flags)
    assert status == 0 and out.count("---") == 2
