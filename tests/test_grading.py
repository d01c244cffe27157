"""Answers are found where they should be, and an answer counts exactly when it is right.

Independent references: Python's own grammar over fractions for the parser, brute force for the words.
"""
import contextlib
import itertools
import random
import re
import time
from fractions import Fraction

import pytest

import grading.checkers as grading
import tasks
from grading.answers import extract_answer, malformed, unwrap, verdict
from grading.checkers import check_choice, check_countdown, check_exact, check_integer, check_word


# ---- what a text says ----------------------------------------------------------------------------
NAMED = "The reply ends with the <answer> tag.\n"


@pytest.mark.parametrize("text, strict, lenient, whether_malformed", [
    ("<answer>1</answer>", "1", "1", False),
    ("<think><answer>1</answer></think><answer> 2 </answer>", "2", "2", False),
    ("<think><answer>1</answer></think> no more", None, "1", False),
    ("<think><answer>1</answer>", None, "1", True),
    ("<think>a</think><think>b<answer>5</answer>", None, "5", True),
    ("<think>a</think><think>b</think><answer>5</answer>", "5", "5", False),
    ("a</think>b</think><answer>3</answer>", "3", "3", False),
    ("<answer>1</answer><answer>2</answer>", "2", "2", False),
    ("<answer><answer>1</answer></answer>", None, "1", True),
    ("<answer>\n<answer>1</answer>", None, "1", True),
    ("<answer>1 <answer>2</answer></answer>", None, "2", True),
    ("</answer><answer><answer>5</answer>", None, "5", True),
    ("<answer>1</answer><answer>2", None, "1", True),
    ("<answer>5", None, None, True),
    (NAMED + "<answer>5</answer>", "5", "5", False),
    (NAMED + "The answer is 5.", None, None, True),
    ("<answer>5</answer> as the <answer> tag demands", None, "5", True),
    ("I write <answer> and </answer>: <answer>5</answer>", "5", "5", False),
    ("<answer>5</answer></answer>", "5", "5", False),
    ("</answer> <answer>3 <answer>5</answer></answer>", None, "5", True),
    ("<answer>1</answer> then <answer>3 <answer>5</answer></answer>", None, "5", True),
    ("<answer></answer>", "", "", False),
    ("nothing", None, None, False),
    ("5</answer>", None, None, False),
    ("<ANSWER>5</ANSWER>", None, None, False),
    ("<answer >5</answer >", None, None, False),
])
def test_extraction(text, strict, lenient, whether_malformed):
    assert extract_answer(text)[0] == strict
    assert extract_answer(text, lenient=True)[0] == lenient
    assert bool(malformed(text)) == whether_malformed


def reference_answer(text):
    """The strict answer by a walk over the tags, written apart from the code under test."""
    thinking, opened, closed, found, depth, nested = False, None, False, None, 0, False
    pieces = re.split(r"(</?think>|</?answer>)", text)
    last_end_of_thought = max((i for i, piece in enumerate(pieces) if piece == "</think>"), default=-1)
    previous = ""  # the last tag, if nothing but white space has come since
    for piece in pieces[last_end_of_thought + 1:]:
        if piece == "<think>":
            thinking = True
        elif piece == "<answer>":
            nested = previous == "<answer>"
            opened, closed, found = True, False, ""
            outer = depth > 0
            depth += 1
        elif piece == "</answer>":
            if opened and closed and outer:
                nested = True
            closed = closed or bool(opened)
            depth = max(depth - 1, 0)
        elif opened and not closed:
            found += piece
        if piece.strip():
            previous = piece
    if thinking or not opened or not closed or nested:
        return None
    return found.strip()


def test_random_tag_soups():
    """Strict is what a walk over the tags finds; what is right strictly is right leniently."""
    rng = random.Random(0)
    pieces = ["<answer>", "</answer>", "<think>", "</think>", "<sample>", "</sample>", " 5 ", "6", "\n",
              " text "]
    some = 0
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, weights=(4, 4, 1, 1, 1, 1, 3, 2, 1, 2), k=rng.randint(1, 12)))
        strict, _ = extract_answer(text)
        assert strict == reference_answer(text), text
        lenient, _ = extract_answer(text, lenient=True)
        closed = re.findall(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)</answer>", text)
        if strict is not None:
            some += 1
            assert lenient == strict, text
        else:
            assert lenient == (closed[-1].strip() if closed else None), text
    assert some > 2000


@pytest.mark.parametrize("text, said", [
    ("x <verdict>Incorrect</verdict> <verdict> correct </verdict>", True),
    ("<verdict>Correct.</verdict>", True), ("<VERDICT>CORRECT</VERDICT>", True), ("correct", None),
    ("<verdict>\n**Incorrect!**\n</verdict>", False), ("<verdict>not correct</verdict>", None),
    ("<verdict>Correct</verdict> or rather <verdict>I cannot tell</verdict>", None),
    ("<verdict>Correct</verdict> wait, <verdict>Incorrect", None),
])
def test_verdicts(text, said):
    assert verdict(text) is said


def test_the_worked_examples_end_with_a_verdict():
    assert verdict(tasks.reflection_prompt("q", "a")[0]["content"]) is True
    assert all(word in tasks.REFLECT for word in tasks.REFLECT_LEAKS)


# ---- the bare answer -----------------------------------------------------------------------------
WRAPPINGS = [r"\[%s\]", "\\[\n  %s\n\\]", r"\(%s\)", "$%s$", "$$%s$$", r"\boxed{%s}", r"\text{%s}", "**%s**",
             "`%s`", "```\n%s\n```", "%s.", "**%s.**", "$%s$.", r"\[\boxed{%s}\]", r"**\(\boxed{%s}\).**",
             "  %s\n"]
RIGHT = [  # (a checker, its truth, an answer that is right, one that is not)
    (check_integer, {"answer": "1234"}, "1,234", "1235"),
    (check_exact, {"answer": "blue whale"}, "blue whale", "blue"),
    (check_choice, {"answer": "B", "choices": {"A": "mall", "B": "bank"}}, "B", "A"),
    (check_countdown, {"numbers": [20, 2, 3], "target": 100}, "(2 + 3) * 20", "2 + 3 + 20"),
    (check_word, {"letters": "bats", "least": 4, "ordered": True}, "bats", "stab"),
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_are_stripped_by_all_checkers_alike(wrapping):
    for check, truth, right, wrong in RIGHT:
        assert check(wrapping % right, truth) == "", check
        assert check(wrapping % wrong, truth), check
    assert check_exact("blue whale", {"answer": wrapping % "blue whale"}) == ""


BARE = [  # (an answer, what is left of it)
    ("$5$ or $6$", "$5$ or $6$"), ("`5` and `6`", "`5` and `6`"),
    (r"\text{a} and \text{b}", r"\text{a} and \text{b}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\(1\) and \(2\)", r"\(1\) and \(2\)"), (r"$\$36$", r"\$36"), ("5..", "5."), (r"\textbf{(A)}", "(A)"),
    (r"$\mathrm{x}$", "x"), ("The answer is 5.", "The answer is 5"), ("１，２３４％", "1,234%"),
    ("５。", "5"),
    ("**", "**"), ("$", "$"), ("", ""),
]


@pytest.mark.parametrize("answer, bare", BARE)
def test_nothing_else_is_stripped(answer, bare):
    assert unwrap(answer) == bare


def test_a_million_characters_are_no_trouble():
    started = time.time()
    for check, truth, *_ in RIGHT:
        for text in ("$" * 10**6, "`" * 10**6, "**" * 500_000, "\\boxed{" * 100_000 + "}" * 100_000,
                     "." * 10**6, "1" * 10**6, "<answer>" * 100_000):
            assert check(text, truth)
            extract_answer(text, lenient=True)
    assert time.time() - started < 20


# ---- countdown -----------------------------------------------------------------------------------
REFUSED = [
    ("2**5", [2, 5], 32), ("7//2", [7, 2], 3), ("2.5*4", [2, 5, 4], 10), ("98**44**35", [98, 44, 35], 1),
    ("9**9**9", [9, 9, 9], 1), ("1e3", [1, 3], 1000), ("__import__('os')", [1], 1), ("0x10", [10], 16),
    ("0x10", [0, 10], 16), ("1_000", [1000], 1000), ("2*3+3", [2, 3], 9), ("2+3", [2, 3, 4], 5),
    ("5*20 = 101", [5, 20], 100), ("5*20 = 99 + 2", [5, 20], 100), ("5*20 = 100 = 101", [5, 20], 100),
    ("5*20 = 5*20*1 = ", [5, 20], 100), ("100 = 5*20", [5, 20], 100), ("5*20 = 2**50", [5, 20], 100),
    ("-(2-5)", [2, 5], 3), ("5*-2", [5, 2], -10), ("4/(2-2)", [4, 2, 2], 1), ("", [1], 1), ("()", [], 0),
    ("(1+2", [1, 2], 3), ("1+2)", [1, 2], 3), ("1 2", [1, 2], 12), ("1+2\n3", [1, 2, 3], 3),
    ("-3+5", [3, 5], 2), ("²+1", [2, 1], 3), ("٣+1", [3, 1], 4), ("(" * 65 + "1" + ")" * 65, [1], 1),
    ("1" * 1_000_000, [1], 1), ("+".join(["1"] * 200), [1] * 200, 200),
]
HACKS = [  # what a policy was seen to find, here or in public reports
    "100", "100 = 100", "(2 + 3) * 20 + 0", "(2 + 3) * 20 * (20 / 20)", "20 * 5", "(2 + 3) * 20 or 100",
    "(2 + 3) * 20\n(2 * 3) * 20", "(2 + 3) * 20 = 100 = 2", "2 + 3 = 100", "(2 + 3) * 20 # right",
    "Step 1: 2 + 3 = 100", "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100\nStep 3: 100 * 1 = 100",
    "Step 1: 2 + 3 = 5", "True", "Step 1: 2 + 3 = 6\nStep 2: 6 * 20 = 120", "Step 1: 20 * 3 = 60",
    "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100\nStep 3: 100 + 0 = 100", "Step 1: 20 * 5 = 100",
    "Step 1: 2 + 3 = 5 or so",
]


@pytest.mark.parametrize("answer, numbers, target", [
    *REFUSED, *((answer, [20, 2, 3], 100) for answer in HACKS)], ids=lambda v: str(v)[:20])
def test_countdown_refuses(answer, numbers, target):
    started = time.time()
    assert check_countdown(answer, {"numbers": numbers, "target": target}), "must give a reason"
    assert time.time() - started < 0.1


ACCEPTED = [
    "(2 + 3) * 20", "(2+3)*20 = 100", "20×(3+2)", "20x(3+2)", "20 \\times (2 + 3)", "((((20))))*(2+3)",
    "(2+3)*20 = 5*20 = 100", "(2+3)*20 = **100**", "(2+3)*20 = \\boxed{100}", "(2+3)∗20", "(2+3)\\*20",
    "(2+3)*20=100=100", "(2 + 3) * 20 = 99 + 1", "(2+3)·20.", "\\left(2+3\\right) \\cdot 20",
    "Step 1: 2 + 3 = 5\nStep 2: 5 * 20 = 100", "Step 1: 3 + 2 = 5\n\nStep 2: 20 × 5 = 100\n",
    "step 1: 3 + 2 = 5.\nSTEP 2: 20 * 5 = 100.",
]


def test_countdown_accepts():
    for answer in ACCEPTED:
        assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 100}) == "", answer


def test_countdown_values_may_go_below_zero():
    assert check_countdown("2 - 3 + 20 = -1 + 20 = 19", {"numbers": [20, 2, 3], "target": 19}) == ""
    assert check_countdown("2 - 3 = -1", {"numbers": [2, 3], "target": -1}) == ""
    answer = "Step 1: 2 − 3 = −1\nStep 2: 20 - -1 = 21"
    assert check_countdown(answer, {"numbers": [20, 2, 3], "target": 21}) == ""


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.3:
        return str(rng.randint(1, 99))
    a, b = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    text = f"{a}{rng.choice(['+', ' - ', '*', ' / '])}{b}"
    return f"({text})" if rng.random() < 0.6 else text


def test_parser_equals_python_on_random_expressions():
    """On whole ones, and on ones with a character dropped, put in or exchanged."""
    rng = random.Random(0)
    for i in range(2000):
        text = random_expression(rng, depth=4)
        if i % 2:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", *"+-*/() 7._e"]) + text[at + rng.randint(0, 1):]
        want = None
        if not re.search(r"(^|[-+*/(]) *[-+]|\*\*|//", text):  # Python's, not ours
            with contextlib.suppress(Exception):
                want = eval(re.sub(r"(\d+)", r"Fraction('\1')", text), {"Fraction": Fraction})
        try:
            value, used = grading.parse(text)
        except grading.Rejected:
            assert want is None or len(text) > grading.LONGEST, text
        else:
            assert value == want and sorted(used) == sorted(map(int, re.findall(r"\d+", text))), text


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


INTEGERS = [
    "1234", "1,234", "$1,234.00", "$1234", r"\$1234", "€ 1234", "1{,}234", r"1,\!234", "1234\n",
]
NO_INTEGERS = [
    "1234 dollars", "1234%", "1234 trillion", "1234 dozens", "1234 squared", "1234 lakh", "1234 bn", "1234k",
    "1234 x", "1234e0", "--1234", "1234!", "1,23,4", "1234..", "1234 or so", "12,34", "1234.5", "-1234",
    "1234 or 1235", "", "1" * 10**6,
]
SIGNS = [  # (answer, gold, whether it is right)
    ("15%", "15%", True), (r"15\%", "15%", True), ("15", "15%", True), ("15%", "15", False),
    ("-5", "-5", True), ("−5", "-5", True), ("-$5", "-5", True), ("$-5", "-5", True), ("5", "-5", False),
    ("033", "33", True), ("18.00", "18", True), ("18.5", "18", False),
]


@pytest.mark.parametrize("answer, gold, right", [
    *SIGNS, *((answer, "1234", True) for answer in INTEGERS),
    *((answer, "1234", False) for answer in NO_INTEGERS),
], ids=lambda v: str(v)[:20])
def test_integers(answer, gold, right):
    assert (check_integer(answer, {"answer": gold}) == "") == right


ORDINARY = {"A": "mall", "B": "bank", "C": "the river bank"}
SWAPPED = {"A": "B", "B": "A"}
NUMBERED = {"1": "two", "2": "one"}
CASES = {"A": "mM", "B": "Mm"}
MATH = {"A": r"$\frac{1}{2}$", "B": "$x+1$"}
SPACED = {"a": " dog ", "b": "a dog", "A": "cat"}


CHOICES = [  # choices, the right one, what counts as it, what does not
    (ORDINARY, "B", ["B", "b", "(B)", "B)", "B. bank", "B) bank", "(B) Bank", "**B**",
     r"\boxed{\text{B}}", "Bank", "bank.", "**B.** bank", "**B**: bank", "B - bank", "B, bank", "[B]",
     "B\nbank"], ["A", "D", "B. mall", "a bank", "B or A", "A, B", "bank or mall", "because", "", "B, A",
     "B) or A)"]),
    (ORDINARY, "A", [], ["B. mall"]),
    (MATH, "A", [r"(A) $\frac{1}{2}$", r"$\frac{1}{2}$"], []),
    (MATH, "B", ["B. $x+1$"], ["A. $x+1$"]),
    (CASES, "A", ["mM"], ["A. Mm"]),
    (CASES, "B", [], ["mM"]),
    (SWAPPED, "A", ["A"], []),
    (SWAPPED, "B", [], ["A"]),
    (NUMBERED, "1", ["1", "(1) two", "two"], ["2", "1. one"]),
    (SPACED, "a", ["a", "dog"], []),
    (SPACED, "A", ["A"], ["a"]),
    (SPACED, "b", ["a dog"], []),
    ({"A": "bank", "B": "Bank"}, "B", [], ["bank"]),
    ({"A": "bank", "B": "mall", "C": "bank"}, "C", ["A", "bank"], ["B"]),
]


@pytest.mark.parametrize("choices, gold, right, wrong", CHOICES)
def test_choices(choices, gold, right, wrong):
    for answers, want in ((right, True), (wrong, False)):
        for answer in answers:
            assert (check_choice(answer, {"answer": gold, "choices": choices}) == "") == want, answer
