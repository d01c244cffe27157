"""The figures are what they say: pass@k by brute force, intervals that cover, skills as a reader counts."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, read_rows, write_jsonl

import evaluate
import tasks
from checkpoint.tokenizer import Tokenizer
from evaluate import forced_prompt, named_model
from report.figures import all_figures, checked_by_number, f1, interval, paired, pass_at, student, wilson
from run.command import UserError
from sample import Completion


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
    assert interval([[1]] * 3 + [[0]] * 7) == wilson(3, 10)


@pytest.mark.parametrize("df, quantile", [(4, 2.776), (1, 12.706), (5, 2.571), (14, 2.145), (29, 2.045),
                                          (99, 1.984), (10**6, 1.960)])
def test_students_quantile_equals_its_tabulated_values(df, quantile):
    assert student(df) == pytest.approx(quantile, abs=1e-2)


@pytest.mark.parametrize("questions, samples", [(15, 34), (30, 34), (100, 4), (500, 4)])
def test_the_interval_holds_the_truth(questions, samples):
    """Before, 75% of the intervals did for a set like AIME at 1%: a bootstrap sees too few right answers.

    How hard questions are differs: their chances are Beta, from all alike to mostly 0 or 1.
    """
    rng = np.random.default_rng(0)
    for accuracy in (0.01, 0.1, 0.5):
        for correlation in (0.01, 0.1, 0.3, 0.6):
            scale = (1 - correlation) / correlation
            held = []
            for _ in range(400):
                chances = rng.beta(accuracy * scale, (1 - accuracy) * scale, (questions, 1))
                low, high = interval(rng.random((questions, samples)) < chances)
                held.append(low <= accuracy <= high)
            least = 0.9 if questions == 15 else 0.92
            assert np.mean(held) > least, (accuracy, correlation, np.mean(held))


def test_the_interval_of_a_difference_holds_the_truth():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        chances = rng.beta(0.3, 0.7, (80, 1))
        ours, theirs = rng.random((80, 4)) < chances + 0.1 * (1 - chances), rng.random((80, 4)) < chances
        low, high = paired((ours.mean(1) - theirs.mean(1)))
        held.append(low <= 0.07 <= high)
    assert 0.93 < np.mean(held) < 0.97
    assert paired([0.5] * 20) == pytest.approx((0.5 - 0.161, 0.5 + 0.161), abs=1e-3)  # no spread


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
    assert task.skills(problem, TRACE) == {
        "answers": 2, "reflections": 2, "attempts": [False, True], "verdicts": verdicts}
    plain = "just <answer>6</answer>"
    assert task.skills(problem, plain) == {
        "answers": 1, "reflections": 0, "attempts": [True], "verdicts": []}


@pytest.mark.parametrize("change, attempts, verdicts", [
    # Words between the attempt and its check.
    (("</sample>\n<reflect>", "</sample>\nLet me check.\n<reflect>"), [False, True],
     [(False, False), (False, True)]),
    # An attempt that is not checked does not take the next one's check.
    (("<reflect>\nno <verdict>Incorrect</verdict>\n</reflect>\nAgain.", "Again."), [False, True],
     [(False, True)]),
    # Nor does one whose check was never closed.
    (("no <verdict>Incorrect</verdict>\n</reflect>\nAgain.", "no"), [False, True], [(False, True)]),
    # A second thought counts too, and one that never ends.
    (("Again.", "</think>\nHm.\n<think>"), [False, True], [(False, False), (False, True)]),
    (("</think>", ""), [False, True], [(False, False), (False, True)]),
    # What the verdict says, however it is dressed.
    (("<verdict>Incorrect</verdict>", "<verdict>**Incorrect.**</verdict>"), [False, True],
     [(False, False), (False, True)]),
    # An attempt is graded as everywhere else: this answer cannot be read.
    (("<answer>6</answer>\n</sample>", "<answer><answer>6</answer></answer>\n</sample>"), [False, False],
     [(False, False), (False, False)]),
])
def test_skills_of_responses_that_are_not_by_the_book(change, attempts, verdicts):
    task = tasks.find("multiply-2")
    text = TRACE.replace(*change)
    assert text != TRACE
    found = task.skills(tasks.Problem("", "", "", {"answer": "6"}), text)
    assert found["attempts"] == attempts and found["verdicts"] == verdicts


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


class Bytes:
    """A tokenizer whose tokens are bytes. Part of a character reads as a sign for each of its bytes."""
    def __init__(self, pieces=()):
        self.pieces = list(pieces)

    def decode(self, ids):
        content = b"".join(self.pieces[i] for i in ids)
        text = ""
        while content:
            try:
                return text + content.decode()
            except UnicodeDecodeError as e:
                text += content[:e.start].decode() + "\ufffd"
                content = content[e.start + 1:]
        return text

    def encode(self, text):
        self.pieces += [bytes([b]) for b in text.encode()]
        return list(range(len(self.pieces) - len(text.encode()), len(self.pieces)))


def test_budget_forcing_keeps_every_token_before_the_cut():
    """Before, a token that held the end of the block and half of </think> took its text with it."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        words = ["a\U0001f600", "é\n", "</reflect>", "日本語", "x"]
        before = "".join(rng.choice(words, size=rng.integers(1, 6)))
        content = f"{before}</think>\n\n<answer>é</answer>".encode()
        cuts = sorted(rng.choice(range(1, len(content)), size=rng.integers(1, len(content)), replace=False))
        pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        tokenizer = Bytes([*pieces, b"<end>"])
        tokens = list(range(len(pieces) + 1))
        _, kept = forced_prompt(tokenizer, Completion([], tokens))
        line = "" if before.endswith("\n") else "\n"
        assert tokenizer.decode(kept) == f"{before}{line}<sample>\n"
        ends = [sum(map(len, pieces[:n])) for n in range(len(pieces) + 1)]
        # The last boundary at or before the tag that is also one of characters.
        whole = max(n for n, end in enumerate(ends) if end <= len(before.encode())
                    and content[:end].decode(errors="ignore").encode() == content[:end])
        inside += ends[whole] != len(before.encode())
        assert kept[:whole] == tokens[:whole] and kept[whole] >= len(tokens)
    assert inside > 100


# ---- the command ---------------------------------------------------------------------------------
def test_sets_of_different_sizes_and_samples(cmd, monkeypatch):
    """A set of 30 questions beside one of 100, with the default --k: once a KeyError lost the later cells."""
    write_jsonl("aime.jsonl", [{"question": f"{i}?", "answer": i} for i in range(3)])
    write_jsonl("large.jsonl", [{"question": f"{i}?", "answer": i} for i in range(101)])
    status, out, err = cmd(evaluate, "--models", f"a={MINI},b={MINI}", "--split", "all", "--questions", "0",
                           "--tasks", "file:aime.jsonl:integer,file:large.jsonl:integer",
                           "--max-new-tokens", "2", "--device", "cpu")
    assert status == 0, err
    cells = json.loads(Path("out/evaluate/summary.json").read_text())
    assert [cell["samples"] for cell in cells] == [34, 4, 34, 4]
    assert "pass@4" in out and "pass@34" in out and "no answer" in out
    assert all(cell["no_answer"] == 1 for cell in cells)


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


def test_figures_stand_under_their_own_heading():
    """A set of 100 questions and one of 30 have pass@4 and pass@34: each column holds its own figures."""
    figures = {"accuracy": 0.5, "interval": (0.4, 0.6), "lenient": 0.5, "truncated": 0, "tokens": 9,
               "answers": 1, "reflections": 0, "first_attempt": 0.5, "any_attempt": 0.5, "checked": [],
               "f1_correct": None, "f1_incorrect": None, "model": "m", "questions": 100, "no_answer": 0}
    cells = [{**figures, "task": "large", "samples": 4, "pass": {"4": 0.25}},
             {**figures, "task": "small", "samples": 34, "pass": {"34": 0.75}}]
    headings, *rows = all_figures(cells)
    large, small = (dict(zip(headings, row, strict=True)) for row in rows)
    assert (large["pass@4"], large["pass@34"]) == ("25.0", "")
    assert (small["pass@4"], small["pass@34"]) == ("", "75.0")


def test_attempts_that_are_checked_by_number():
    """A second `</sample>` in place of <reflect> is one attempt that nobody checked; a cut says nothing."""
    whole = "<sample>\n1\n</sample>\n<reflect>\nno\n</reflect>\n"
    responses = [(whole * 2, "stop"), (whole + "<sample>2</sample></sample>", "stop"),
                 (whole + "<sample>2</sample>\n<ref", "length"), ("5", "stop")]
    rows = [{"response": text, "finish": finish} for text, finish in responses]
    assert checked_by_number(rows) == [{"attempts": 3, "checked": 1.0}, {"attempts": 2, "checked": 0.5},
                                       {"attempts": 1, "checked": 0.0}]
    broken = [{"response": "<sample></sample></sample>6", "finish": "length"}]  # only the last can be cut off
    assert checked_by_number(broken) == [{"attempts": 1, "checked": 0.0}, {"attempts": 1, "checked": 0.0}]


def test_names_of_models():
    assert named_model("sft=out/sft") == ("sft", "out/sft")
    assert named_model("out/sft/") == ("sft", "out/sft/")
    assert named_model("Qwen/Qwen3-0.6B") == ("Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert named_model("out/lr=1e-3") == ("lr=1e-3", "out/lr=1e-3")
    assert named_model("./a=b") == ("a=b", "./a=b")
    assert named_model("a=out/lr=1") == ("a", "out/lr=1")
