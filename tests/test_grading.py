"""Answers are found where they should be, and an answer counts exactly when it is right.

Independent references: Python's own grammar over fractions for the parser, brute force for the words.
"""
import itertools
import random
import re
import time
from fractions import Fraction

import pytest

import grading
import tasks
from grading import check_choice, check_countdown, check_integer, check_word, extract_answer, verdict


# ---- what a text says ----------------------------------------------------------------------------
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
    assert extract_answer(text)[0] == strict
    assert extract_answer(text, lenient=True)[0] == lenient


def test_verdicts():
    assert verdict("x <verdict>Incorrect</verdict> <verdict> correct </verdict>") is True
    assert verdict("<verdict>Incorrect</verdict>") is False
    assert verdict("<verdict>Maybe</verdict>") is None
    # The worked examples end with one.
    assert verdict(tasks.reflection_prompt("q", "a")[0]["content"]) is True
    assert all(word in tasks.REFLECT for word in tasks.REFLECT_LEAKS)


# ---- countdown -----------------------------------------------------------------------------------
REFUSED = [
    ("2**5", [2, 5], 32),
    ("7//2", [7, 2], 3),
    ("2.5*4", [2, 5, 4], 10),
    ("98**44**35", [98, 44, 35], 1),
    ("9**9**9", [9, 9, 9], 1),
    ("1e3", [1, 3], 1000),
    ("__import__('os')", [1], 1),
    ("0x10", [10], 16),
    ("0x10", [0, 10], 16),
    ("1_000", [1000], 1000),
    ("2*3+3", [2, 3], 9),
    ("2+3", [2, 3, 4], 5),
    ("5*20 = 101", [5, 20], 100),
    ("5*20 = 99 + 1", [5, 20], 100),
    ("5*20=100=100", [5, 20], 100),
    ("4/(2-2)", [4, 2, 2], 1),
    ("", [1], 1),
    ("()", [], 0),
    ("(1+2", [1, 2], 3),
    ("1+2)", [1, 2], 3),
    ("1 2", [1, 2], 12),
    ("1+2\n3", [1, 2, 3], 3),
    ("-3+5", [3, 5], 2),
    ("²+1", [2, 1], 3),
    ("٣+1", [3, 1], 4),
    ("(" * 65 + "1" + ")" * 65, [1], 1),
    ("1" * 1_000_000, [1], 1),
    ("+".join(["1"] * 200), [1] * 200, 200),
]


@pytest.mark.parametrize("answer, numbers, target", REFUSED, ids=lambda v: str(v)[:20])
def test_countdown_refuses(answer, numbers, target):
    started = time.time()
    assert check_countdown(answer, {"numbers": numbers, "target": target}), "must give a reason"
    assert time.time() - started < 0.1


@pytest.mark.parametrize("answer", [
    "(2 + 3) * 20",
    "(2+3)*20 = 100",
    "20×(3+2)",
    "20x(3+2)",
    "20 \\times (2 + 3)",
    "((((20))))*(2+3)",
    "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100",
    "Step 1: 3 + 2 = 5\n\nStep 2: 20 × 5 = 100\n",
])
def test_countdown_accepts(answer):
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 100}) == ""


def test_countdown_steps_may_go_below_zero():
    answer = "Step 1: 2 - 3 = -1\nStep 2: 20 - -1 = 21"
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 21}) == ""


@pytest.mark.parametrize("answer", [
    "Step 1: 2 + 3 = 6\nStep 2: 6 * 20 = 120",
    "Step 1: 20 * 3 = 60",
    "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100\nStep 3: 100 + 0 = 100",
    "Step 1: 20 * 5 = 100",
    "Step 1: 2 + 3 = 5 or so",
])
def test_countdown_steps_refused(answer):
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 100})


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.3:
        return str(rng.randint(1, 99))
    a, b = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    text = f"{a}{rng.choice(['+', ' - ', '*', ' / '])}{b}"
    return f"({text})" if rng.random() < 0.6 else text


def test_parser_equals_python_on_random_expressions():
    rng = random.Random(0)
    for _ in range(500):
        text = random_expression(rng, depth=4)
        numbers = sorted(map(int, re.findall(r"\d+", text)))
        try:
            want = eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})
        except ZeroDivisionError:
            want = None
        try:
            value, used = grading.parse(text)
            assert value == want and sorted(used) == numbers, text
        except grading.Rejected as e:
            divided_by_zero = want is None and str(e) == "division by zero"
            assert divided_by_zero or len(text) > grading.LONGEST


# ---- the other checkers --------------------------------------------------------------------------
def test_words_by_brute_force():
    words = grading.dictionary()
    assert len(words) == 39724 and sum(words.values()) == 23877
    task = tasks.find("acronym-4")
    for p in task.problems("test", 10):
        letters, answer = p.truth["letters"], p.truth["answer"]
        spelled = set()
        for n in range(4, len(letters) + 1):
            spelled |= {"".join(chosen) for chosen in itertools.combinations(letters, n)} & words.keys()
        assert answer in spelled
        assert task.grade(p, f"<answer>{answer.upper()}</answer>").correct
        for word in itertools.islice(words, 0, None, 997):
            assert task.grade(p, f"<answer>{word}</answer>").correct == (word in spelled)


@pytest.mark.parametrize("word, right", [("beast", True), ("bats", True), ("assets", False), ("bat", False)])
def test_letters_in_any_order(word, right):
    truth = {"letters": "abets", "least": 4, "ordered": False}
    assert (check_word(word, truth) == "") == (right and word in grading.dictionary())


@pytest.mark.parametrize("answer, right", [
    ("1234", True),
    ("1,234", True),
    ("$1,234.00", True),
    ("1234 dollars", True),
    ("1234%", True),
    ("1234 million", False),
    ("1234 or so", False),
    ("12,34", False),
    ("1234.5", False),
    ("-1234", False),
    ("1234 or 1235", False),
    ("", False),
    ("1" * 10**6, False),
    ("1234\n", False),
], ids=lambda v: str(v)[:20])
def test_integers(answer, right):
    assert (check_integer(answer, {"answer": "1234"}) == "") == right


@pytest.mark.parametrize("answer, right", [
    ("B", True),
    ("b", True),
    ("(B)", True),
    ("B. bank", True),
    ("Bank", True),
    ("A", False),
    ("Z", False),
    ("a bank", False),
    ("B or A", False),
    ("because", False),
    ("", False),
])
def test_choices(answer, right):
    truth = {"answer": "B", "choices": {"A": "mall", "B": "bank"}}
    assert (check_choice(answer, truth) == "") == right


def test_math_equivalence():
    pytest.importorskip("math_verify")
    truth = {"answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}
    assert grading.check_math("(3, \\pi/2)", truth) == ""
    assert grading.check_math("(3, \\pi)", truth)
