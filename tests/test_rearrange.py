import json
import random
import re
from collections import Counter

import pytest
from conftest import write_jsonl

import rearrange
from rearrange import RECIPES, Pair, build, paper, read_phrases


def sample_rows(questions=12, attempts=14, seed=0, **change):
    """Rows as sample.py writes them, with right and wrong attempts and verdicts at random."""
    rng, rows = random.Random(seed), []
    for q in range(questions):
        for i in range(attempts):
            correct = rng.random() < 0.4
            rows.append({"id": f"q{q}", "task": "multiply-2", "problem": {"answer": "6"}, "question": f"What is {q} * 2?", "style": rng.choice(["plain", "plan"]), "index": i, "system": None,
                         "solution": f"attempt {q}.{i} <answer>{6 if correct else 7 + i}</answer>", "finish": "stop", "answer": str(6 if correct else 7 + i), "correct": correct, "reason": "",
                         "reflections": [{"text": f"check {q}.{i}.{j} <verdict>{'Correct' if v else 'Incorrect'}</verdict>", "verdict": v, "finish": "stop"}
                                         for j in range(2) if (v := rng.random() < 0.5) is not None], **change})
    return rows


def silver(cmd, rows, *flags):
    write_jsonl("samples.jsonl", rows)
    status, out, err = cmd(rearrange, *flags)
    assert status == 0, err
    return [json.loads(line) for line in open("silver.jsonl")], out


def blocks(text):
    """[(attempt, reflection)] of a trace, by an independent reading of the format."""
    return re.findall(r"<sample>\n(.*?)\n</sample>\n<reflect>\n(.*?)\n</reflect>\n", text, re.DOTALL)


def test_paper_recipe(cmd):
    """Rule 17: ends right, correct pairs outnumber incorrect ones, no pair twice, every verdict agrees with its grade."""
    rows = sample_rows(questions=40)
    made, _ = silver(cmd, rows)
    by_attempt = {row["solution"]: row for row in rows}
    used, sizes = Counter(), Counter()
    for trace in made:
        found = blocks(trace["messages"][-1]["content"])
        grades = [by_attempt[attempt]["correct"] for attempt, _ in found]
        assert grades[-1] and sum(grades) > len(grades) - sum(grades) and 1 <= sum(grades) <= 5
        assert grades == [p["correct"] for p in trace["pairs"]]
        for (attempt, reflection), grade in zip(found, grades):
            assert by_attempt[attempt]["id"] == trace["id"]
            assert f"<verdict>{'Correct' if grade else 'Incorrect'}</verdict>" in reflection
            assert reflection in [r["text"] for r in by_attempt[attempt]["reflections"]]
            used[attempt] += 1
        sizes[len(grades)] += 1
        assert trace["messages"][0] == {"role": "user", "content": f"{by_attempt[found[0][0]]['question']}\n\n{rearrange.tasks.STYLES['plain'][1]}"}
    assert max(used.values()) == 1 and len(sizes) >= 4
    # Every usable correct attempt ends up in some trace: the loop goes on while there are any.
    usable = {r["solution"] for r in rows if r["correct"] and any(x["verdict"] for x in r["reflections"])}
    assert usable == {a for a in used if by_attempt[a]["correct"]}


def test_draws_follow_algorithm_1():
    """n+ is uniform on 1..5 and n- uniform on 0..n+-1, while the pools last."""
    pairs = [Pair(f"a{i}", "r", "6", i < 2000, "plain", i) for i in range(4000)]
    traces = paper(pairs, random.Random(0), 5)
    right = Counter(sum(p.correct for p in t) for t in traces[:-1])
    assert set(right) == {1, 2, 3, 4, 5} and max(right.values()) < 1.35 * min(right.values())
    wrong = Counter(sum(not p.correct for p in t) for t in traces[:-1] if sum(p.correct for p in t) == 4)
    assert set(wrong) == {0, 1, 2, 3}


def test_same_bytes_whatever_the_order_of_rows(cmd):
    rows = sample_rows()
    first, _ = silver(cmd, rows)
    again, _ = silver(cmd, random.Random(1).sample(rows, len(rows)), "--out", "silver2.jsonl")
    assert open("silver.jsonl", "rb").read() == open("silver2.jsonl", "rb").read()
    write_jsonl("samples.jsonl", rows)
    cmd(rearrange, "--seed", "1", "--out", "other.jsonl")
    assert open("silver.jsonl").read() != open("other.jsonl").read()


def test_format_to_the_byte():
    """SPEC 1.5, with one phrase of each kind so that nothing is drawn."""
    phrases = {"correct": ["Fine, but check."], "incorrect": ["Wrong, again."], "neutral": ["Wrong, again."], "closing": ["So:"]}
    pairs = [Pair("A <answer>7</answer>", "B <verdict>Incorrect</verdict>", "7", False, "plan", 0), Pair("C <answer>6</answer>", "D <verdict>Correct</verdict>", "6", True, "plain", 1)]
    assert "".join(text for _, text in build(pairs, "paper", phrases, random.Random(0))) == """<think>
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
    phrases = read_phrases(rearrange.Path(rearrange.__file__).parent / "phrases.json")
    assert all(len(phrases[kind]) == len(set(phrases[kind])) >= 12 for kind in ("correct", "incorrect", "neutral"))
    made, _ = silver(cmd, sample_rows(questions=30))
    for trace in made:
        glue = re.findall(r"</reflect>\n(.*)\n<sample>", trace["messages"][-1]["content"])
        for text, pair in zip(glue, trace["pairs"]):
            assert text in phrases["correct" if pair["correct"] else "incorrect"] + phrases["neutral"]
        assert len(glue) == len(trace["pairs"]) - 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(cmd, recipe):
    made, _ = silver(cmd, sample_rows(), "--recipe", recipe)
    grades = [[p["correct"] for p in t["pairs"]] for t in made]
    texts = [t["messages"][-1]["content"] for t in made]
    task = rearrange.tasks.find("multiply-2")
    right = [task.grade(rearrange.tasks.Problem("", "", "", {"answer": "6"}), text).correct for text in texts]
    assert all(right) == (recipe not in ("random", "unarranged"))
    if recipe == "full":
        assert {len(g) for g in grades} == {1, 2, 3, 4, 5} and all(g[-1] for g in grades)
    if recipe == "backtrack":
        assert all(not g[-1] and any(g) for g in grades)
    if recipe == "confirm":
        assert all(g[-2:] == [True, True] and not any(g[:-2]) for g in grades)
    if recipe == "random":
        assert not all(g[-1] for g in grades)
    assert all(("<reflect>" in t) == (recipe not in ("no-reflection", "star", "unarranged")) for t in texts)
    assert all(("<think>" in t) == (recipe not in ("star", "unarranged")) for t in texts)
    if recipe == "star":
        assert all(g == [True] for g in grades)
    if recipe == "unarranged":
        assert {g[0] for g in grades} == {True, False} and all(len(g) == 1 for g in grades)


@pytest.mark.parametrize("change, reason", [
    (dict(solution="I <think> so <answer>6</answer>"), "holds a tag of the traces"),
    (dict(finish="length"), "cut off at the budget"),
    (dict(style="plain-hint", solution="By the Hint, <answer>6</answer>"), "mentions the hint"),
    (dict(reflections=[]), "no valid reflection"),
    (dict(reflections=[{"text": "The capital is Canberra. <verdict>Correct</verdict>", "verdict": True, "finish": "stop"}]), "leaked the prompt's example"),
    (dict(reflections=[{"text": "</reflect> <verdict>Correct</verdict>", "verdict": True, "finish": "stop"}]), "no valid reflection"),
])
def test_flawed_attempts_are_dropped_and_counted(cmd, change, reason):
    good = sample_rows(questions=2)
    bad = sample_rows(questions=1, attempts=1)[0] | dict(id="bad", correct=True, answer="6") | change
    made, out = silver(cmd, good + [bad])
    assert reason in out and all(t["id"] != "bad" for t in made)


def test_show_prints_and_writes_nothing(cmd, tmp_path):
    write_jsonl("samples.jsonl", sample_rows())
    status, out, _ = cmd(rearrange, "--show", "2")
    assert status == 0 and out.count("<think>") == 2 and "drawn, in order" in out and not (tmp_path / "silver.jsonl").exists()


def test_bad_input(cmd, tmp_path):
    assert cmd(rearrange)[2] == "rearrange.py: samples.jsonl: no such file\n"
    for content, message in [("", "holds no rows"), ('{"id": 1}\n', "samples.jsonl:1: the key 'task' is missing"), ("[1]\n", "samples.jsonl:1: expected an object"),
                             (json.dumps(sample_rows()[0]) + "\n{oops\n", "samples.jsonl:2: not valid JSON")]:
        (tmp_path / "samples.jsonl").write_text(content)
        status, _, err = cmd(rearrange)
        assert status == 2 and message in err and err.count("\n") == 1
    write_jsonl("samples.jsonl", [r | {"correct": False} for r in sample_rows()])
    assert "none of the 168 sampled attempts is correct; sample more" in cmd(rearrange)[2]
    write_jsonl("samples.jsonl", sample_rows())
    (tmp_path / "p.json").write_text('{"correct": []}')
    assert "'correct' must be a list of phrases" in cmd(rearrange, "--phrases", "p.json")[2]
    cmd(rearrange)
    assert "--out silver.jsonl exists" in cmd(rearrange)[2]
