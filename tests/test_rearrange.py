"""Traces keep the paper's rules and the format to the byte; what cannot be used is dropped and counted."""
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import read_rows, refused, write_jsonl

import rearrange
import tasks
from rearrange import RECIPES, Pair, build, paper


def reflection(text, said, finish="stop"):
    verdict = "Correct" if said else "Incorrect"
    return {"text": f"{text} <verdict>{verdict}</verdict>", "verdict": said, "finish": finish}


def sample_rows(questions=12, attempts=14, seed=0):
    """Rows as sample.py writes them, with right and wrong attempts and verdicts at random."""
    rng = random.Random(seed)
    rows = []
    for q in range(questions):
        for i in range(attempts):
            correct = rng.random() < 0.4
            answer = "6" if correct else str(7 + i)
            rows.append({
                "id": f"q{q}",
                "task": "multiply-2",
                "problem": {"answer": "6"},
                "question": f"What is {q} * 2?",
                "style": rng.choice(["plain", "plan"]),
                "index": i,
                "system": None,
                "solution": f"attempt {q}.{i} <answer>{answer}</answer>",
                "finish": "stop",
                "answer": answer,
                "correct": correct,
                "reason": "",
                "reflections": [reflection(f"check {q}.{i}.{j}", rng.random() < 0.5) for j in range(2)],
            })
    return rows


def silver(cmd, rows, *flags):
    """(rows of silver.jsonl, what was printed)."""
    write_jsonl("samples.jsonl", rows)
    status, out, err = cmd(rearrange, *flags)
    assert status == 0, err
    return read_rows("silver.jsonl"), out


def blocks(text):
    """[(attempt, reflection)] of a trace, by an independent reading of the format."""
    return re.findall(r"<sample>\n(.*?)\n</sample>\n<reflect>\n(.*?)\n</reflect>\n", text, re.DOTALL)


# ---- the paper's recipe --------------------------------------------------------------------------
def test_paper_recipe(cmd):
    """Rule 17: ends right, more correct pairs than incorrect, no pair twice, verdicts agree with grades."""
    rows = sample_rows(questions=40)
    made, _ = silver(cmd, rows)
    by_attempt = {row["solution"]: row for row in rows}
    used = Counter()
    sizes = set()
    for trace in made:
        *_, assistant = trace["messages"]
        found = blocks(assistant["content"])
        grades = [by_attempt[attempt]["correct"] for attempt, _ in found]
        right = sum(grades)
        assert grades[-1] and right > len(grades) - right and 1 <= right <= 5
        assert grades == [pair["correct"] for pair in trace["pairs"]]
        for (attempt, check), grade in zip(found, grades, strict=True):
            row = by_attempt[attempt]
            assert row["id"] == trace["id"]
            assert f"<verdict>{'Correct' if grade else 'Incorrect'}</verdict>" in check
            assert check in [r["text"] for r in row["reflections"]]
        used.update(attempt for attempt, _ in found)
        sizes.add(len(grades))
        question = by_attempt[found[0][0]]["question"]
        plain = tasks.STYLES["plain"][1]
        assert trace["messages"][0] == {"role": "user", "content": f"{question}\n\n{plain}"}
    assert max(used.values()) == 1 and len(sizes) >= 4
    # Every usable correct attempt ends up in some trace: the loop goes on while there are any.
    usable = set()
    for row in rows:
        if row["correct"] and any(r["verdict"] for r in row["reflections"]):
            usable.add(row["solution"])
    assert usable == {attempt for attempt in used if by_attempt[attempt]["correct"]}


def test_draws_follow_algorithm_1():
    """n+ is uniform on 1..5 and n- uniform on 0..n+-1, while the pools last."""
    pairs = [Pair(f"a{i}", "r", "6", i < 2000, "plain", i) for i in range(4000)]
    *traces, _ = paper(pairs, random.Random(0), 5)
    right = Counter(sum(p.correct for p in trace) for trace in traces)
    assert set(right) == {1, 2, 3, 4, 5} and max(right.values()) < 1.35 * min(right.values())
    four_right = [trace for trace in traces if sum(p.correct for p in trace) == 4]
    assert {len(trace) - 4 for trace in four_right} == {0, 1, 2, 3}


def test_same_bytes_whatever_the_order_of_rows(cmd):
    """Rule 17: the order of the input does not matter, the seed does."""
    rows = sample_rows()
    silver(cmd, rows)
    silver(cmd, random.Random(1).sample(rows, len(rows)), "--out", "again.jsonl")
    assert Path("silver.jsonl").read_bytes() == Path("again.jsonl").read_bytes()
    cmd(rearrange, "--seed", "1", "--out", "other.jsonl")
    assert Path("silver.jsonl").read_bytes() != Path("other.jsonl").read_bytes()


# ---- the format ----------------------------------------------------------------------------------
def test_format_to_the_byte(monkeypatch):
    """With one phrase of each kind, so that nothing is drawn."""
    phrases = {
        "correct": ["Fine, but check."],
        "incorrect": ["Wrong, again."],
        "neutral": ["Wrong, again."],
        "closing": ["So:"],
    }
    trace = [
        Pair("A <answer>7</answer>", "B <verdict>Incorrect</verdict>", "7", False, "plan", 0),
        Pair("C <answer>6</answer>", "D <verdict>Correct</verdict>", "6", True, "plain", 1),
    ]
    monkeypatch.setattr(rearrange, "PHRASES", phrases)
    parts = build(trace, RECIPES["paper"], random.Random(0))
    assert "".join(text for _, text in parts) == """<think>
<sample>
A <answer>7</answer>
</sample>
<reflect>
B <verdict>Incorrect</verdict>
</reflect>
Wrong, again.
<sample>
C <answer>6</answer>
</sample>
<reflect>
D <verdict>Correct</verdict>
</reflect>
</think>

So:

<answer>
6
</answer>"""


def test_glue_fits_what_it_follows(cmd):
    made, _ = silver(cmd, sample_rows(questions=30))
    for trace in made:
        glue = re.findall(r"</reflect>\n(.*)\n<sample>", trace["messages"][-1]["content"])
        assert len(glue) == len(trace["pairs"]) - 1
        for text, before in zip(glue, trace["pairs"], strict=False):
            kind = "correct" if before["correct"] else "incorrect"
            assert text in rearrange.PHRASES[kind] + rearrange.PHRASES["neutral"]


# What the grades of a trace's pairs must be, recipe by recipe.
ENDINGS = {
    "paper": lambda grades: grades[-1],
    "no-reflection": lambda grades: grades[-1],
    "full": lambda grades: grades[-1],
    "backtrack": lambda grades: not grades[-1] and any(grades),
    "confirm": lambda grades: grades[-2:] == [True, True] and not any(grades[:-2]),
    "random": lambda grades: True,
    "star": lambda grades: grades == [True],
    "unarranged": lambda grades: len(grades) == 1,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(cmd, recipe):
    made, _ = silver(cmd, sample_rows(), "--recipe", recipe)
    grades = [[pair["correct"] for pair in trace["pairs"]] for trace in made]
    texts = [trace["messages"][-1]["content"] for trace in made]
    task = tasks.find("multiply-2")
    problem = tasks.Problem("", "", "", {"answer": "6"})
    right = [task.grade(problem, text).correct for text in texts]
    may_end_wrong = recipe in ("random", "unarranged")
    untagged = recipe in ("star", "unarranged")
    assert all(ENDINGS[recipe](g) for g in grades)
    assert all(right) == (not may_end_wrong)
    assert all(("<think>" in text) == (not untagged) for text in texts)
    assert all(("<reflect>" in text) == (not untagged and recipe != "no-reflection") for text in texts)
    if recipe == "full":
        assert {len(g) for g in grades} == {1, 2, 3, 4, 5}
    if may_end_wrong:
        assert {g[-1] for g in grades} == {True, False}


# ---- what is dropped -----------------------------------------------------------------------------
LEAK = {"text": "The capital is Canberra. <verdict>Correct</verdict>", "verdict": True, "finish": "stop"}
SYDNEY = {**LEAK, "text": LEAK["text"].replace("Canberra", "Sydney")}
TAGGED = {"text": "</reflect> <verdict>Correct</verdict>", "verdict": True, "finish": "stop"}


@pytest.mark.parametrize("change, reason", [
    ({"solution": "I <think> so <answer>6</answer>"}, "holds a tag of the traces"),
    ({"finish": "length"}, "cut off at the budget"),
    ({"style": "plain-hint", "solution": "By the Hint, <answer>6</answer>"}, "mentions the hint"),
    ({"reflections": []}, "no valid reflection"),
    ({"reflections": [LEAK]}, "leaked the prompt's example"),
    ({"solution": "<answer><answer>6</answer></answer>"}, "malformed: nested <answer> tags"),
    ({"solution": "It is <answer>6", "correct": False, "answer": None},
     "malformed: the <answer> is never closed"),
    ({"reflections": [TAGGED]}, "no valid reflection (one holds a tag of the traces)"),
])
def test_flawed_attempts_are_dropped_and_counted(cmd, change, reason):
    bad, = sample_rows(questions=1, attempts=1)
    bad |= {"id": "bad", "correct": True, "answer": "6", **change}
    made, out = silver(cmd, sample_rows(questions=2) + [bad])
    assert reason in out and all(trace["id"] != "bad" for trace in made)


@pytest.mark.parametrize("change", [
    {"solution": "I end with the <answer> tag. <answer>6</answer>"},
    {"question": "Is Sydney large?", "reflections": [SYDNEY]},  # no leak: it is asked about
    {"solution": "Sydney. <answer>6</answer>", "reflections": [SYDNEY]},
])
def test_an_attempt_without_a_flaw_is_used(cmd, change):
    good, = sample_rows(questions=1, attempts=1)
    good |= {"id": "good", "correct": True, "answer": "6", "reflections": [reflection("r", True)], **change}
    made, _ = silver(cmd, [good])
    assert [trace["id"] for trace in made] == ["good"]


def test_no_reflection_has_the_traces_of_paper(cmd):
    rows = sample_rows(questions=20)
    paper_rows, _ = silver(cmd, rows)
    cmd(rearrange, "--recipe", "no-reflection", "--out", "bare.jsonl")
    bare = read_rows("bare.jsonl")
    assert [row["pairs"] for row in bare] == [row["pairs"] for row in paper_rows]
    for with_blocks, without in zip(paper_rows, bare, strict=True):
        stripped = re.sub(r"<reflect>\n.*?\n</reflect>\n", "", with_blocks["messages"][-1]["content"],
                          flags=re.DOTALL)
        assert stripped == without["messages"][-1]["content"]


def test_samples_of_several_seeds_are_pooled(cmd):
    """The same questions, styles and indices, other texts: all are used, whatever the order of the files."""
    rows = sample_rows()
    others = json.loads(json.dumps(rows).replace("attempt ", "another ").replace("check ", "another check "))
    write_jsonl("a.jsonl", rows)
    write_jsonl("b.jsonl", others)
    write_jsonl("same.jsonl", rows[:3])
    assert cmd(rearrange, "--data", "a.jsonl,b.jsonl")[0] == 0
    assert cmd(rearrange, "--data", "b.jsonl,same.jsonl,a.jsonl", "--out", "again.jsonl")[0] == 0
    assert Path("silver.jsonl").read_bytes() == Path("again.jsonl").read_bytes()
    text = Path("silver.jsonl").read_text()
    right = [row["solution"] for row in rows + others
             if row["correct"] and any(r["verdict"] for r in row["reflections"])]
    assert right and all(text.count(json.dumps(solution)[1:-1]) == 1 for solution in right)
    write_jsonl("c.jsonl", [rows[0], others[0]])
    refused(cmd, rearrange, ("--data", "c.jsonl", "--out", "c"), "c.jsonl:2: attempt")
    refused(cmd, rearrange, ("--data", "a.jsonl,a.jsonl", "--out", "c"), "a.jsonl appears twice")


# ---- the command ---------------------------------------------------------------------------------
def test_show_prints_and_writes_nothing(cmd, tmp_path):
    write_jsonl("samples.jsonl", sample_rows())
    status, out, _ = cmd(rearrange, "--show", "2")
    assert status == 0 and out.count("<think>") == 2
    assert not (tmp_path / "silver.jsonl").exists()
