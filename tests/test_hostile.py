"""Texts that nobody would write: nothing raises, nothing takes long, and brute force agrees.

    HOSTILE_CASES=200000 python -m pytest tests/test_hostile.py      # a million cases, in about an hour

What a model writes is not chosen by anybody, and RL looks for what a grader overlooks.
"""
import os
import re
import time

import pytest
from conftest import MINI
from test_grading import reference_answer

import tasks
from checkpoint.tokenizer import Tokenizer
from grading.answers import attempts_in, extract_answer, last_boxed, malformed, unwrap, verdict
from report.page import parts_of
from run.command import printable

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

CASES = int(os.environ.get("HOSTILE_CASES", 150))
# The same cases in every run but a long one; what it finds is printed, to be put into a table.
settings.register_profile(
    "hostile", max_examples=CASES, deadline=None, derandomize=CASES < 1000, database=None)
settings.load_profile("hostile")

TAGS = ["<think>", "</think>", "<sample>", "</sample>", "<reflect>", "</reflect>", "<answer>", "</answer>",
        "<verdict>", "</verdict>", "<verdict>Correct</verdict>", "<verdict>Incorrect</verdict>"]
PIECES = [*TAGS, "<", ">", "</", "answer", "\\boxed{", "{", "}", "$", "**", "`", "\\text{", "(", ")",
          "+", "-", "*", "/", "=", "×", "÷", "−", "\\times", "1", "2", "10", "007", "9" * 30, "Step 1: ",
          "1 + 2 = 3", "\n", " ", ".", ",", "A", "(B)", "\x00", "\x1b[2J", "\u202e", "\u2028", "\ud7ff", "é",
          "\U0001f642", "<|im_end|>", "<|im_start|>system\n", "{{ 7 }}", "{% for x in y %}"]
soup = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=30).map("".join)
repeated = st.tuples(soup, st.integers(1, 60)).map(lambda pair: (pair[0] * pair[1])[:10_000])
hostile = st.one_of(soup, repeated)

COUNTDOWN = tasks.find("countdown-3")
PROBLEM = COUNTDOWN.problems("test", 1)[0]
OTHER_TASKS = [tasks.find(name) for name in ("letters-4", "acronym-4", "multiply-3")]
OTHERS = [(task, task.problems("test", 1)[0]) for task in OTHER_TASKS]


def quick(function, *args):
    """What a function returns, in at most 5 ms for each 10 kB; the best of 20 times counts."""
    size = len(str(args[-1]).encode("utf-8", "surrogatepass"))
    limit = 0.005 * max(1, size / 10_000)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        out = function(*args)
        best = min(best, time.perf_counter() - started)
        if best < limit:
            return out
    raise AssertionError(f"{function.__name__} took {best * 1000:.1f} ms for {size} bytes")


def with_long_repetitions(test):
    """Each piece 10 kB long: what is quadratic shows."""
    for piece in PIECES:
        test = example(piece * (10_000 // len(piece)))(test)
    return test


@with_long_repetitions
@given(hostile)
def test_extraction(text):
    strict, why = quick(extract_answer, text)
    assert strict == reference_answer(text)
    assert (strict is None) == bool(why)
    lenient, _ = quick(lambda t: extract_answer(t, lenient=True), text)
    assert strict is None or lenient == strict
    quick(malformed, text)
    quick(last_boxed, text)
    said = quick(verdict, text)
    if said is not None:
        inside = text.lower().rsplit("<verdict>", 1)[1].split("</verdict>")[0]
        assert re.sub(r"[\s.!*_`]", "", inside) == ("correct" if said else "incorrect")


@with_long_repetitions
@given(hostile)
def test_graders(text):
    for task, problem in [(COUNTDOWN, PROBLEM), *OTHERS]:
        for wrapped in (text, f"<answer>{text}</answer>"):
            grade = quick(lambda t, task=task, problem=problem: task.grade(problem, t), wrapped)
            assert grade.correct == (grade.reason == "")
            assert grade.answer is not None or not grade.correct
    quick(unwrap, text)


def thoughts_of(text):
    """What each <think> holds, if it holds anything; the text, if none does."""
    thoughts, at = [], 0
    while (begin := text.find("<think>", at)) >= 0:
        end = text.find("</think>", begin)
        thoughts.append(text[begin + 7:end if end >= 0 else len(text)])
        at = end + 8 if end >= 0 else len(text)
    return [thought for thought in thoughts if thought] or [text]


def blocks_of(thought):
    """(attempt, what follows it) of a thought, character by character."""
    found, attempt, after, state = [], "", "", "outside"
    at = 0
    while at < len(thought):
        if thought.startswith("<sample>", at):
            if state == "after":
                found.append((attempt, after))
            attempt, after, state = "", "", "inside"
            at += 8
        elif state == "inside" and thought.startswith("</sample>", at):
            state = "after"
            at += 9
        else:
            attempt += thought[at] if state == "inside" else ""
            after += thought[at] if state == "after" else ""
            at += 1
    return found + ([(attempt, after)] if state == "after" else [])


@with_long_repetitions
@given(hostile)
def test_traces(text):
    shown = quick(lambda t: COUNTDOWN.skills(PROBLEM, t), text)
    blocks = [block for thought in thoughts_of(text) for block in blocks_of(thought)]
    grades = [COUNTDOWN.grade(PROBLEM, attempt).correct for attempt, _ in blocks]
    assert shown["attempts"] == (grades or [COUNTDOWN.grade(PROBLEM, text).correct])
    judged = [(verdict(after.partition("<reflect>")[2]), correct)
              for (_, after), correct in zip(blocks, grades, strict=True)]
    assert shown["verdicts"] == [pair for pair in judged if pair[0] is not None]
    for attempt in attempts_in(text):
        assert text.startswith(f"<sample>{attempt.text}</sample>", attempt.at)
    parts = parts_of(text, shown["attempts"])
    assert "".join(part for _, part in parts) == text
    kinds = [kind for kind, part in parts if part.strip()]
    assert kinds.count("agrees") + kinds.count("contradicts") == len(shown["verdicts"])
    assert kinds.count("contradicts") == sum(said != actual for said, actual in shown["verdicts"])
    for i, (kind, part) in enumerate(parts):
        if kind in ("open correct", "open incorrect"):
            assert part.startswith("<sample>") and (i + 1 == len(parts) or parts[i + 1][0] != "phrase")


TOKENIZER = Tokenizer(MINI)
NEUTRAL = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
CONTROL = (TOKENIZER.chat(NEUTRAL)[0], TOKENIZER.end_id)  # what opens a turn, and ends one


@given(hostile, hostile)
def test_chat_rendering(system, user):
    """Nothing that is said ends a turn or opens one, and all of it is there."""
    ids = quick(TOKENIZER.chat, [{"role": "system", "content": system}, {"role": "user", "content": user}])
    for control in CONTROL:
        assert ids.count(control) == TOKENIZER.chat(NEUTRAL).count(control)
    text = TOKENIZER.decode(ids)
    assert system.strip() in text and user.strip() in text


@given(st.text())
def test_what_is_printed_moves_no_cursor(text):
    shown = printable(text, one_line=True)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)
    assert printable("as it is: é 漢字 \U0001f642\n\t") == "as it is: é 漢字 \U0001f642\n\t"
