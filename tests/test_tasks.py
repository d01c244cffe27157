import itertools
import random
import time
from fractions import Fraction

import pytest
from conftest import write_jsonl

import tasks
from cli import UserError
from tasks import check_choice, check_countdown, check_integer, extract_answer, find

GENERATED = ["countdown-2", "countdown-3", "countdown-6", "countdown-3-small", "countdown-5-small", "letters-4", "letters-5", "acronym-4", "acronym-5",
             "multiply-2", "multiply-5", "multiply-2-small"]


# ---- problems --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", GENERATED)
def test_every_problem_has_a_right_answer(name):
    task, n = find(name), 8 if name == "multiply-2-small" else 30
    for p in task.problems("sft", n, seed=5):
        assert task.grade(p, f"<answer>{p.truth['answer']}</answer>").correct, p
        assert not task.grade(p, "<answer></answer>").correct
        assert p.question in task.prompt(p, "plan")[-1]["content"] and task.prompt(p, "plan")[0]["role"] == "system"


@pytest.mark.parametrize("name", ["countdown-3-small", "countdown-4", "letters-4", "multiply-2"])
def test_splits_share_no_problem(name):
    """SPEC 2: whatever the seeds, no test problem is in another split, and none stands twice in one."""
    task, seen = find(name), {}
    for split in tasks.SPLITS:
        for seed in (0, 1):
            problems = task.problems(split, 60, seed)
            assert len({p.id for p in problems}) == 60
            for p in problems:
                assert seen.setdefault(p.id, split) == split
    assert task.problems("test", 20, 3) == task.problems("test", 20, 3) != task.problems("test", 20, 4)


def test_a_problem_is_its_numbers_and_target():
    """The order in which the numbers are shown makes no new problem."""
    by_id = {}
    for seed in range(20):
        for p in find("countdown-2-small").problems("test", 10, seed):
            by_id.setdefault(p.id, set()).add((tuple(sorted(p.truth["numbers"])), p.truth["target"]))
    assert all(len(v) == 1 for v in by_id.values())


def test_countdown_ranges():
    for p in find("countdown-4").problems("test", 50):
        assert len(p.truth["numbers"]) == 4 and all(1 <= n <= 100 for n in p.truth["numbers"]) and 100 <= p.truth["target"] <= 999
    for p in find("countdown-4-small").problems("test", 50):
        assert all(1 <= n <= 12 for n in p.truth["numbers"]) and 10 <= p.truth["target"] <= 60


def test_too_many_questions_is_one_line():
    with pytest.raises(UserError, match="countdown-2-small has only about"):
        find("countdown-2-small").problems("test", 10_000)


def test_files(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [{"id": i, "question": f"{i}+1?", "answer": str(i + 1)} for i in range(20)])
    task = find(f"file:{path}:integer")
    assert len(task.problems("all", 0)) == 20
    parts = [{p.id for p in task.problems(split, 0)} for split in ("sft", "rl", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20  # one file, and still no test question is trained on
    p = task.problems("all", 1)[0]
    assert task.grade(p, f"<answer>${p.truth['answer']}.00</answer>").correct
    assert not find(f"file:{path}").grade(p, f"<answer>${p.truth['answer']}</answer>").correct  # exact
    with pytest.raises(UserError, match="has 20 questions in the split all"):
        task.problems("all", 21)
    (tmp_path / "gsm8k").mkdir()
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [{"id": f"t{i}", "question": "?", "answer": "1"} for i in range(200)])
    parts = [{p.id for p in find("gsm8k", tmp_path).problems(s, 0)} for s in ("sft", "rl", "val")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    with pytest.raises(UserError, match="test.jsonl: no such file; gsm8k is not downloaded for you"):
        find("gsm8k", tmp_path).problems("test", 1)
    with pytest.raises(UserError, match="math500 has no split 'sft'; it has test"):
        find("math500", tmp_path).problems("sft", 1)
    write_jsonl(path, [{"question": "?", "answer": "two"}])
    with pytest.raises(UserError, match="'two' is not an integer"):
        task.problems("all", 1)
    write_jsonl(path, [{"question": "?", "answer": "F", "choices": {"A": "x"}}])
    with pytest.raises(UserError, match="is none of the choices"):
        find(f"file:{path}").problems("all", 1)
    with pytest.raises(UserError, match="unknown; the tasks are"):
        find("countdown-9")


# ---- answers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, strict, lenient", [
    ("<answer>1</answer>", "1", "1"),
    ("<think><answer>1</answer></think><answer> 2 </answer>", "2", "2"),
    ("<think><answer>1</answer></think> no more", None, "1"),
    ("<think><answer>1</answer>", None, "1"),
    ("a</think>b</think><answer>3</answer>", "3", "3"),
    ("<answer>1</answer><answer>2</answer>", "2", "2"),
    ("<answer><answer>1</answer></answer>", None, None),
    ("<answer>1</answer><answer>2", None, None),
    ("nothing", None, None),
])
def test_extraction(text, strict, lenient):
    assert extract_answer(text)[0] == strict and extract_answer(text, lenient=True)[0] == lenient


REFUSED = [("2**5", [2, 5], 32), ("7//2", [7, 2], 3), ("2.5*4", [2, 5, 4], 10), ("98**44**35", [98, 44, 35], 1), ("9**9**9", [9, 9, 9], 1), ("1e3", [1, 3], 1000),
           ("__import__('os')", [1], 1), ("0x10", [10], 16), ("0x10", [0, 10], 16), ("1_000", [1000], 1000), ("2*3+3", [2, 3], 9), ("2+3", [2, 3, 4], 5), ("5*20 = 101", [5, 20], 100), ("5*20 = 99 + 1", [5, 20], 100),
           ("4/(2-2)", [4, 2, 2], 1), ("", [1], 1), ("(1+2", [1, 2], 3), ("1+2)", [1, 2], 3), ("1 2", [1, 2], 12), ("(" * 65 + "1" + ")" * 65, [1], 1), ("1" * 1_000_000, [1], 1),
           ("+".join(["1"] * 200), [1] * 200, 200), ("-3+5", [3, 5], 2), ("²+1", [2, 1], 3), ("٣+1", [3, 1], 4), ("()", [], 0), ("5*20=100=100", [5, 20], 100), ("1+2\n3", [1, 2, 3], 3)]


@pytest.mark.parametrize("answer, numbers, target", REFUSED, ids=lambda v: str(v)[:20])
def test_countdown_refuses(answer, numbers, target):
    started = time.time()
    assert check_countdown(answer, {"numbers": numbers, "target": target}), "must give a reason"
    assert time.time() - started < 0.1


@pytest.mark.parametrize("answer", ["(2 + 3) * 20", "(2+3)*20 = 100", "20×(3+2)", "20x(3+2)", "20 \\times (2 + 3)", "((((20))))*(2+3)", "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100",
                                    "Step 1: 3 + 2 = 5\n\nStep 2: 20 × 5 = 100\n",
                                    "Step 1: 2 - 3 = -1\nStep 2: 20 - -1 = 21"])
def test_countdown_accepts(answer):
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 21 if "-1" in answer else 100}) == ""


@pytest.mark.parametrize("answer", ["Step 1: 2 + 3 = 6\nStep 2: 6 * 20 = 120", "Step 1: 20 * 3 = 60", "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100\nStep 3: 100 + 0 = 100", "Step 1: 20 * 5 = 100", "Step 1: 2 + 3 = 5 or so"])
def test_countdown_steps_refused(answer):
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 100})


def test_parser_equals_python_on_random_expressions():
    """The independent reference is Python's own grammar over Fractions, on 500 random trees."""
    rng = random.Random(0)

    def tree(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(1, 99))
        a, b = tree(depth - 1), tree(depth - 1)
        text = f"{a}{rng.choice(['+', ' - ', '*', ' / '])}{b}"
        return f"({text})" if rng.random() < 0.6 else text

    for _ in range(500):
        text = tree(4)
        numbers = sorted(map(int, "".join(c if c.isdigit() else " " for c in text).split()))
        try:
            want = eval(__import__("re").sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})
        except ZeroDivisionError:
            want = None
        try:
            value, used = tasks.parse(text)
            assert value == want and sorted(used) == numbers, text
        except tasks.Rejected as e:
            assert (want is None and str(e) == "division by zero") or len(text) > tasks.LONGEST


def test_words_by_brute_force():
    words = tasks.dictionary()
    assert len(words) == 39724 and sum(words.values()) == 23877
    task = find("acronym-4")
    for p in task.problems("test", 10):
        letters = p.truth["letters"]
        spelled = {"".join(c) for n in range(4, len(letters) + 1) for c in itertools.combinations(letters, n)} & words.keys()
        assert p.truth["answer"] in spelled
        for w in itertools.islice(words, 0, None, 997):
            assert task.grade(p, f"<answer>{w}</answer>").correct == (w in spelled)
        assert task.grade(p, f"<answer>{p.truth['answer'].upper()}</answer>").correct
    truth = {"letters": "abets", "least": 4, "ordered": False}
    assert not tasks.check_word("beast", truth) and tasks.check_word("bats", truth) == "" and tasks.check_word("assets", truth) and tasks.check_word("bat", truth)


@pytest.mark.parametrize("answer, right", [("1234", True), ("1,234", True), ("$1,234.00", True), ("1234 dollars", True), ("1234%", True), ("1234 million", False), ("1234 or so", False), ("12,34", False), ("1234.5", False),
                                           ("-1234", False), ("1234 or 1235", False), ("", False), ("1" * 10**6, False), ("1234\n", False)])
def test_integers(answer, right):
    assert (check_integer(answer, {"answer": "1234"}) == "") == right


@pytest.mark.parametrize("answer, right", [("B", True), ("b", True), ("(B)", True), ("B. bank", True), ("Bank", True), ("A", False), ("Z", False), ("a bank", False), ("B or A", False), ("because", False), ("", False)])
def test_choices(answer, right):
    assert (check_choice(answer, {"answer": "B", "choices": {"A": "mall", "B": "bank"}}) == "") == right


def test_math_equivalence():
    pytest.importorskip("math_verify")
    truth = {"answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}
    assert tasks.check_math("(3, \\pi/2)", truth) == "" and tasks.check_math("(3, \\pi)", truth)


def test_verdicts():
    assert tasks.verdict("x <verdict>Incorrect</verdict> <verdict> correct </verdict>") is True
    assert tasks.verdict("<verdict>Incorrect</verdict>") is False and tasks.verdict("<verdict>Maybe</verdict>") is None
    assert tasks.verdict(tasks.reflection_prompt("q", "a")[0]["content"]) is True  # the worked examples end with one
    assert all(word in tasks.REFLECT for word in tasks.REFLECT_LEAKS)
