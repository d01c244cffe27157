"""The figures are what they say: pass@k by brute force, intervals that cover, skills as a reader counts."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, read_rows, refused

import evaluate
import tasks
from cli import UserError
from evaluate import bootstrap, f1, forced_prompt, interval, named_model, pass_at, skills, wilson
from sample import Completion
from tokenizer import Tokenizer


# ---- statistics ----------------------------------------------------------------------------------
def test_pass_at_k_by_brute_force():
    for n, c in [(5, 0), (5, 2), (6, 6), (4, 1)]:
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            hits = [any(subset) for subset in itertools.combinations(samples, k)]
            assert pass_at(k, n, c) == pytest.approx(np.mean(hits))
    with pytest.raises(UserError, match="pass@8 needs at least 8 samples"):
        pass_at(8, 4, 1)


def test_wilson_equals_its_tabulated_values():
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-3)
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-3)
    assert interval([[0, 0]] * 20) == wilson(0, 20)  # no spread between questions


def test_samples_of_a_question_are_not_independent():
    """An interval by question must be wider than one that takes all samples for independent."""
    rng = np.random.default_rng(0)
    right = (rng.random((60, 1)) < 0.5).repeat(8, 1)
    low, high = interval(right)
    naive_low, naive_high = wilson(right.sum(), right.size)
    assert high - low > 1.8 * (naive_high - naive_low)


def test_the_bootstrap_covers():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.random(80) < 0.3, seed=i, draws=400) for i in range(200)]
    assert 0.88 < np.mean([low <= 0.3 <= high for low, high in intervals]) < 0.99


def test_f1():
    pairs = [(True, True), (True, False), (False, False), (False, False), (False, True)]
    assert f1(pairs, True) == 0.5 and f1(pairs, False) == pytest.approx(2 / 3) and f1([], True) is None


# ---- skills and budget forcing -------------------------------------------------------------------
TRACE = """<think>
<sample>
a <answer>7</answer>
</sample>
<reflect>
no <verdict>Incorrect</verdict>
</reflect>
Again.
<sample>
<answer>6</answer>
</sample>
<reflect>
no <verdict>Incorrect</verdict>
</reflect>
</think>

So

<answer>
6
</answer>"""


def test_skills():
    task = tasks.find("multiply-2")
    problem = tasks.Problem("", "", "", {"answer": "6"})
    verdicts = [(False, False), (False, True)]  # (said, true)
    assert skills(task, problem, TRACE) == {
        "answers": 2, "reflections": 2, "attempts": [False, True], "verdicts": verdicts}
    plain = "just <answer>6</answer>"
    assert skills(task, problem, plain) == {
        "answers": 1, "reflections": 0, "attempts": [True], "verdicts": []}


@pytest.mark.parametrize("text, cut, opened", [
    (TRACE, TRACE[:TRACE.index("</think>")], "<sample>\n"),
    ("no tags é <answer>5</answer>", "no tags é <answer>5</answer>", "\n<sample>\n"),
], ids=["trace", "plain"])
def test_budget_forcing_appends_ids(text, cut, opened):
    """Rule 6: what stays is a prefix of the sampled ids, the very same, where `encode` would give others."""
    tokenizer = Tokenizer(MINI)
    tokens = [i for character in text for i in tokenizer.encode(character)]
    assert tokens != tokenizer.encode(text)
    ids, kept = forced_prompt(tokenizer, Completion([1, 2, 3], tokens + [tokenizer.end_id]))
    appended = tokenizer.encode(opened)
    stayed = kept[:-len(appended)]
    assert ids == [1, 2, 3] + kept
    assert stayed == tokens[:len(stayed)] and kept == stayed + appended
    assert tokenizer.decode(kept) == cut + opened


# ---- the command ---------------------------------------------------------------------------------
def test_command(cmd):
    names = "countdown-3-small,countdown-2-small"
    status, out, err = cmd(
        evaluate, "--models", f"base={MINI},again={MINI}", "--tasks", names, "--questions", "6",
        "--device", "cpu", "--samples", "3", "--k", "1,2", "--max-new-tokens", "60", "--budget-forcing")
    assert status == 0, err
    assert "accuracy" in out and "report.html" in out
    results = read_rows("out/evaluate/results.jsonl")
    cells = json.loads(Path("out/evaluate/summary.json").read_text())
    assert len(results) == 2 * 2 * 6 * 3 and len(cells) == 4
    for cell in cells:
        mine = [r for r in results if r["model"] == cell["model"] and r["task"] == cell["task"]]
        low, high = cell["interval"]
        assert cell["accuracy"] == pytest.approx(np.mean([r["correct"] for r in mine]))
        assert low <= cell["accuracy"] <= high and cell["lenient"] >= cell["accuracy"]
        assert cell["pass"]["1"] == pytest.approx(cell["accuracy"]) and cell["pass"]["2"] >= cell["accuracy"]
        for r in mine:
            assert r["forced"]["tokens"] <= 120
            if r["finish"] == "stop":
                assert r["forced"]["response"].startswith(r["response"].split("</think>")[0])
        if cell["model"] == "again":  # same questions, same seed, same model
            low, high = cell["difference_interval"]
            assert cell["difference"] == 0 and low < 0 < high


def test_compares_what_is_there(cmd, folder):
    """With no --models: the base, and those of the README's folders that hold a model."""
    Path("out").mkdir()
    folder("qwen3").rename("out/grpo")
    Path("out/sft").mkdir()  # nothing in it yet
    status, _, err = cmd(evaluate, "--questions", "2", "--samples", "1", "--max-new-tokens", "5",
                         "--device", "cpu", "--tasks", "countdown-3-small")
    assert status == 0, err
    cells = json.loads(Path("out/evaluate/summary.json").read_text())
    assert [cell["model"] for cell in cells] == ["base", "sft+grpo"]


@pytest.mark.parametrize("flags, message", [
    (("--k", "9", "--samples", "4"), "pass@9 needs at least 9"),
    (("--k", "x"), "give whole numbers"),
    (("--k", "1,-2"), "give whole numbers"),
    (("--questions", "0"), "makes its questions"),
    (("--tasks", "chess"), "unknown; the tasks are"),
    (("--split", "train"), "has no split 'train'"),
    (("--tasks", "gsm8k"), "no such file; gsm8k is not downloaded"),
    (("--models", "nowhere"), "no such folder"),
    (("--models", "a=mini,a=mini"), "two models have the same name"),
])
def test_bad_input(cmd, flags, message):
    refused(cmd, evaluate, ("--models", MINI, "--device", "cpu", "--questions", "5", *flags), message)


def test_figures_stand_under_their_own_heading():
    """A set of 100 questions and one of 30 have pass@4 and pass@34: each column holds its own figures."""
    figures = {"accuracy": 0.5, "interval": (0.4, 0.6), "lenient": 0.5, "truncated": 0, "tokens": 9,
               "answers": 1, "reflections": 0, "first_attempt": 0.5, "any_attempt": 0.5, "f1_correct": None,
               "f1_incorrect": None, "model": "m", "questions": 100}
    cells = [{**figures, "task": "large", "samples": 4, "pass": {4: 0.25}},
             {**figures, "task": "small", "samples": 34, "pass": {34: 0.75}}]
    headings, *rows = evaluate.table_of(cells)
    large, small = (dict(zip(headings, row, strict=True)) for row in rows)
    assert (large["pass@4"], large["pass@34"]) == ("25.0", "")
    assert (small["pass@4"], small["pass@34"]) == ("", "75.0")


def test_names_of_models():
    assert named_model("sft=out/sft") == ("sft", "out/sft")
    assert named_model("out/sft/") == ("sft", "out/sft/")
    assert named_model("Qwen/Qwen3-0.6B") == ("Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert named_model("out/lr=1e-3") == ("lr=1e-3", "out/lr=1e-3")
    assert named_model("./a=b") == ("a=b", "./a=b")
    assert named_model("a=out/lr=1") == ("a", "out/lr=1")


def test_a_path_with_a_comma_is_refused(cmd, tmp_path):
    (tmp_path / "a,b").mkdir()
    refused(cmd, evaluate, ["--models", "mini,x=a,b"], "--models a,b: a comma stands between models")


def test_paper_figures_are_printed_for_its_tasks():
    headings, *_, last = evaluate.paper_table({"countdown-4", "gsm8k", "mine"})
    assert headings == ["paper, 1.5B", "countdown-4", "gsm8k"]
    assert last == ["SkillFactory then GRPO", "42.1", "68.2"]
    assert evaluate.paper_table({"mine"}) == []
