"""Problems, prompts, answer extraction, grading. Pure Python.

    task = find("countdown-3")
    problem = task.problems("test", 1, seed=0)[0]
    task.prompt(problem, "plan")                                        # messages for a chat model
    task.grade(problem, "... <answer>(2 + 3) * 20</answer>")            # Grade(correct, answer, reason)

Which split a generated problem belongs to is decided by a hash of its content, so no seed and no number of questions can put
a problem that was trained on into a test. Grading never runs an answer: countdown has its own parser over exact fractions,
with work bounded by the 256 characters that an answer may have.

Left out: downloading data sets (they are read from --data-dir), GPQA's choice shuffling, symbolic math (the math-verify
library does it, if installed).
"""
import gzip
import hashlib
import operator
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from cli import UserError, read_jsonl


@dataclass(frozen=True)
class Problem:
    id: str
    task: str
    question: str
    truth: dict  # always holds "answer", one right answer as text


@dataclass(frozen=True)
class Grade:
    correct: bool
    answer: str | None
    reason: str  # "" if correct


# ---- wording ---------------------------------------------------------------------------------------------------------
MUST_ANSWER = "However you work, your reply must end with a final answer between <answer> and </answer>. A reply without it is worth nothing."
ENDING = "Put your final answer between <answer> and </answer>."
STYLES = {  # name: (system turn or None, instruction after the question)
    "plain": (None, f"Think step by step. {ENDING}"),
    "plan": (MUST_ANSWER, f"Write a short plan first, then carry it out. {ENDING}"),
    "alternatives": (MUST_ANSWER, f'Propose several candidates, open each new one with "Alternatively,", weigh them and choose. {ENDING}'),
    "rephrase": (MUST_ANSWER, f"Restate the question first, keeping only what is needed, then solve it. {ENDING}"),
    # The arm without training: the tags of the traces are explained in the prompt instead (an ablation of the paper).
    "instruct": (MUST_ANSWER, "Work inside <think> and </think>. There, write an attempt between <sample> and </sample> with an <answer>, then check it "
                 "between <reflect> and </reflect> and end the check with <verdict>Correct</verdict> or <verdict>Incorrect</verdict>. "
                 f"Add further attempts and checks until you are sure. After </think>: {ENDING}"),
}
HINT = "Hint: the answer is {answer}. Show the steps that lead there as your own work, and do not mention this hint."
REFLECT = """Somebody tried to answer the question below. Find out whether the attempt is right.

Question:
{question}

Attempt:
{attempt}

Two examples of a check. Of an attempt that names Sydney as the capital of Australia:
The capital of Australia is Canberra, so the attempt is wrong.
<verdict>Incorrect</verdict>
Of an attempt that names Canberra:
Canberra is the capital of Australia, so the attempt is right.
<verdict>Correct</verdict>

Now check the attempt above: work it out again, take nothing on trust, and compare. Be brief. Your reply must end with one of these two lines:
<verdict>Incorrect</verdict>
<verdict>Correct</verdict>"""
REFLECT_LEAKS = ("Canberra", "Sydney")  # words of the prompt's worked example: a reflection that has one copied it


def reflection_prompt(question, attempt):
    return [{"role": "user", "content": REFLECT.format(question=question, attempt=attempt.strip())}]


VERDICT = re.compile(r"<verdict>\s*(correct|incorrect)\s*</verdict>", re.IGNORECASE)


def verdict(text):
    """True or False for the last <verdict> of a reflection, None if it has none."""
    found = VERDICT.findall(text)
    return found[-1].lower() == "correct" if found else None


# ---- the answer in a text --------------------------------------------------------------------------------------------
def extract_answer(text, lenient=False):
    """(answer or None, reason). Strict: the last <answer> after the last </think>, none if <think> never closed. Lenient:
    the last <answer> anywhere.

    extract_answer("<think><answer>1</answer></think><answer> 2 </answer>")  ->  ("2", "")
    """
    if not lenient:
        if "</think>" in text:
            text = text[text.rindex("</think>"):]
        elif "<think>" in text:
            return None, "the <think> is never closed"
    opening = text.rfind("<answer>")
    if opening < 0:
        return None, "no <answer>"
    if text.count("<answer>", 0, opening) > text.count("</answer>", 0, opening):
        return None, "nested <answer> tags"
    closing = text.find("</answer>", opening)
    if closing < 0:
        return None, "the <answer> is never closed"
    return text[opening + len("<answer>"):closing].strip(), ""


# ---- checkers: answer -> "" if right, else the reason ----------------------------------------------------------------
LONGEST, DEEPEST = 256, 64
SYMBOLS = [("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("x", "*"), ("X", "*"), ("÷", "/"), ("−", "-")]


class Rejected(Exception):
    """Why an expression is no answer."""


def parse(text):
    """(value as a Fraction, [integers used in order]) of an expression of integers, + - * / and parentheses.

    parse("(2 + 3) * 20")  ->  (Fraction(100), [2, 3, 20]).  Raises Rejected with a reason for anything else.
    """
    if len(text) > LONGEST:
        raise Rejected(f"longer than {LONGEST} characters")
    for symbol, plain in SYMBOLS:
        text = text.replace(symbol, plain)
    tokens = re.findall(r"[0-9]+|\S", text)
    used, at = [], 0

    def peek():
        return tokens[at] if at < len(tokens) else None

    def chain(depth, operators=("+", "-")):  # operand (operator operand)*, from left to right; a sum's operands are products
        nonlocal at
        operand = (lambda: chain(depth, ("*", "/"))) if "+" in operators else lambda: atom(depth)
        value = operand()
        while peek() in operators:
            symbol, at = tokens[at], at + 1
            other = operand()
            if symbol == "/" and other == 0:
                raise Rejected("division by zero")
            value = OPERATORS[symbol](value, other)
        return value

    def atom(depth):
        nonlocal at
        token, at = peek(), at + 1
        if token == "(":
            if depth == DEEPEST:
                raise Rejected(f"parentheses deeper than {DEEPEST}")
            value = chain(depth + 1)
            if peek() != ")":
                raise Rejected("unbalanced parentheses")
            at += 1
            return value
        if token is None or not token.isascii() or not token.isdigit():
            raise Rejected(f"expected a number, found {token!r}" if token else "the expression ends too early")
        used.append(int(token))
        return Fraction(used[-1])

    value = chain(0)
    if at < len(tokens):
        raise Rejected(f"unexpected {tokens[at]!r}")
    return value, used


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
STEP = re.compile(r"Step [0-9]+: *(-?[0-9]+) *(\S|\\times|\\cdot|\\div) *(-?[0-9]+) *= *(-?[0-9]+)")


def check_countdown(answer, truth):
    """One expression (perhaps with `= target`), or lines `Step 1: a op b = c` that use up the numbers and reach the target."""
    numbers, target = truth["numbers"], truth["target"]
    try:
        if len(answer) > LONGEST:
            return f"longer than {LONGEST} characters"
        if not answer:
            return "empty answer"
        if answer.startswith("Step"):
            return _check_steps([line.strip() for line in answer.splitlines() if line.strip()], numbers, target)
        expression, equals, claim = answer.partition("=")
        value, used = parse(expression)
        if equals and claim.strip() != str(value):
            return f"claims to be {claim.strip()} but is {value}"
        if Counter(used) != Counter(numbers):
            return f"uses {sorted(used)}, the numbers are {sorted(numbers)}"
        return "" if value == target else f"is {value}, not {target}"
    except Rejected as e:
        return str(e)


def _check_steps(lines, numbers, target):
    pool = Counter(numbers)
    for line in lines:
        match = STEP.fullmatch(line)
        if not match:
            return f"not a step: {line[:40]!r}"
        a, symbol, b, c = int(match[1]), dict(SYMBOLS).get(match[2], match[2]), int(match[3]), int(match[4])
        for operand in (a, b):
            if not pool[operand]:
                return f"{operand} is neither an unused number nor an earlier result"
            pool[operand] -= 1
        if symbol not in OPERATORS:
            return f"{symbol!r} is no operation"
        if symbol == "/" and b == 0:
            return "division by zero"
        value = OPERATORS[symbol](Fraction(a), b)
        if value != c:
            return f"{a} {symbol} {b} is {value}, not {c}"
        pool[c] += 1
    left = sorted(pool.elements())
    return "" if left == [target] else f"ends with {left}, not with {target} alone"


INTEGER = re.compile(r"\$? ?([-+−]?)\$? ?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)? ?(%|[A-Za-z]+)?")
NO_UNIT = {"k", "m", "b", "hundred", "thousand", "million", "billion", "dozen", "x", "e"}  # words that change the number


def integer_of(text):
    """The integer that a text is, perhaps with thousands separators, a currency sign before or one word of a unit after; or None.

    integer_of("$1,234.00 dollars")  ->  1234
    """
    match = INTEGER.fullmatch(text) if len(text) <= LONGEST else None
    plain = match and (match[3] or "").lower() not in NO_UNIT
    return int(match[2].replace(",", "")) * (-1 if match[1] in ("-", "−") else 1) if plain else None


def check_integer(answer, truth):
    value = integer_of(answer)
    if value is None:
        return "not an integer"
    return "" if value == integer_of(truth["answer"]) else f"is {value}"


def check_choice(answer, truth):
    """A letter, `(A)`, `A. bank` or the text of the choice."""
    right, named = truth["answer"], [letter for letter, text in truth.get("choices", {}).items() if text.lower() == answer.lower()]
    match = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:].*)?", answer[:LONGEST], re.DOTALL)
    chosen = named or ([match[1].upper()] if match else [])
    if right in chosen:
        return ""
    return "is another choice" if chosen else "is no choice"


def math_verify():
    """The library for math equivalence, which is not among the requirements."""
    try:
        import math_verify
    except ImportError:
        raise UserError("grading math needs the math-verify library: pip install math-verify[antlr4_13_2]")
    return math_verify


def check_math(answer, truth):
    parse_math, verify = math_verify().parse, math_verify().verify
    if len(answer) > LONGEST:
        return f"longer than {LONGEST} characters"
    return "" if verify(parse_math(f"${truth['answer']}$"), parse_math(f"${answer}$")) else "is not equal to the right answer"


@lru_cache
def dictionary():
    """SCOWL's words of 4 to 8 letters: {word: True if of size 35 (common), False if only of size 60}."""
    with gzip.open(Path(__file__).parent / "words" / "scowl.txt.gz", "rt") as f:
        return {line.split()[0]: line.endswith(" 35\n") for line in f}


@lru_cache
def common_words(length):
    return [w for w, common in dictionary().items() if common and (length is None or len(w) == length)]


def check_word(answer, truth):
    """A dictionary word of at least `least` letters: made of the given letters, or in their order if the truth says so."""
    word, letters = answer.lower(), truth["letters"]
    if word not in dictionary():
        return "not in the dictionary"
    if len(word) < truth["least"]:
        return f"shorter than {truth['least']} letters"
    if truth["ordered"]:
        rest = iter(letters)
        fits = all(letter in rest for letter in word)  # `in` advances the iterator: a subsequence test
    else:
        fits = not Counter(word) - Counter(letters)
    return "" if fits else "not made of the given letters" + (" in their order" if truth["ordered"] else "")


# ---- tasks -----------------------------------------------------------------------------------------------------------
# Hundredths of the hash space. `pretrain` is what the miniature's base was trained on: no other split can meet it.
SPLITS = {"pretrain": range(0, 40), "sft": range(40, 60), "rl": range(60, 80), "val": range(80, 85), "test": range(85, 100)}


def hundredth(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100


class Task:
    """What all tasks share. A task has a name, `problems` and `check(answer, truth)`."""

    @staticmethod
    def prompt(problem, style="plain", hint=False):
        """Chat messages that ask the problem in one of the STYLES; `hint` tells the right answer (rationalisation)."""
        system, instruction = STYLES[style]
        content = f"{problem.question}\n\n{instruction}" + (f"\n{HINT.format(answer=problem.truth['answer'])}" if hint else "")
        return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": content}]

    def grade(self, problem, text, lenient=False):
        answer, reason = extract_answer(text, lenient)
        if answer is not None:
            reason = self.check(answer, problem.truth)
        return Grade(answer is not None and not reason, answer, reason)

    def _check_split(self, split, known):
        if split not in known:
            raise UserError(f"{self.name} has no split {split!r}; it has {', '.join(known)}")


class Generated(Task):
    """A task that makes its problems: `make(rng)` returns (key, question, truth), or None for an unlucky draw."""

    def __init__(self, name, n, small=False):
        self.name, self.n, self.small = name, n, small

    def problems(self, split, n, seed=0):
        self._check_split(split, SPLITS)
        if n < 1:
            raise UserError(f"{self.name} makes its questions, so there is no \"all\" of them; ask for at least 1")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found, idle = {}, 0
        while len(found) < n:
            made = self.make(rng)
            if made and made[0] not in found and hundredth(made[0]) in SPLITS[split]:
                key, question, truth = made
                found[key] = Problem(f"{self.name}/{key}", self.name, question, truth)
                idle = 0
            elif (idle := idle + 1) > 20_000:
                raise UserError(f"{self.name} has only about {len(found)} different problems in the split {split}, {n} were asked for; ask for fewer")
        return list(found.values())


class Countdown(Generated):
    check = staticmethod(check_countdown)

    def make(self, rng):
        largest, targets = (12, range(10, 61)) if self.small else (100, range(100, 1000))
        numbers = [rng.randint(1, largest) for _ in range(self.n)]
        pool = [(value, str(value)) for value in numbers]  # (value, expression)
        while len(pool) > 1:
            # The miniature's problems are chains: each step goes on from the last result. The others may join any two.
            a = pool.pop() if self.small else pool.pop(rng.randrange(len(pool)))
            b = pool.pop(rng.randrange(len(pool)))
            symbol = rng.choice("+-*" if self.small else "+-*/")
            if symbol == "/" and (b[0] == 0 or a[0] % b[0]):
                return None
            value = int(OPERATORS[symbol](a[0], b[0]))
            if value < 0 or self.small and value > 60:
                return None
            pool.append((value, f"({a[1]} {symbol} {b[1]})"))
        target, solution = pool[0][0], pool[0][1][1:-1]
        if target not in targets:
            return None
        rng.shuffle(numbers)
        key = f"{','.join(map(str, sorted(numbers)))}={target}"
        question = (f"Numbers: {' '.join(map(str, numbers))}\nTarget: {target}\n"
                    "Reach the target with + - * / and parentheses, using every number exactly once. Work by hand, without code. The answer is one expression.")
        return key, question, {"answer": solution, "numbers": numbers, "target": target}


class Letters(Generated):
    check = staticmethod(check_word)

    def make(self, rng):
        hidden = rng.choice(common_words(self.n))
        letters = list(hidden) + [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(0, 4))]
        rng.shuffle(letters)
        question = f"Letters: {' '.join(letters)}\nMake an English word of {self.n} to 8 letters out of these, using each letter at most as often as it is given."
        return "".join(sorted(letters)), question, {"answer": hidden, "letters": "".join(letters), "least": self.n, "ordered": False}


class Acronym(Generated):
    check = staticmethod(check_word)

    def make(self, rng):
        hidden = rng.choice(common_words(self.n))
        initials = list(hidden)
        for _ in range(rng.randint(0, 8 - self.n)):
            initials.insert(rng.randint(0, len(initials)), rng.choice("abcdefghijklmnoprstw"))
        words = []
        for letter in initials:
            if not _words_by_initial()[letter]:
                return None
            words.append(rng.choice(_words_by_initial()[letter]))
        question = (f"Words: {' '.join(words)}\nTake first letters of these words, in order and leaving out as many words as you like, so that they spell "
                    f"an English word of at least {self.n} letters. The answer is that word.")
        return " ".join(words), question, {"answer": hidden, "letters": "".join(initials), "least": self.n, "ordered": True}


@lru_cache
def _words_by_initial():
    return {initial: [w for w in common_words(None) if w[0] == initial] for initial in "abcdefghijklmnopqrstuvwxyz"}


class Multiply(Generated):
    check = staticmethod(check_integer)

    def make(self, rng):
        low, high = (2, 12) if self.small else (10 ** (self.n - 1), 10**self.n - 1)
        a, b = rng.randint(low, high), rng.randint(low, high)
        return f"{min(a, b)}*{max(a, b)}", f"What is {a} * {b}?", {"answer": str(a * b)}


class FromFile(Task):
    """A set that is a JSONL file of {id, question, answer}, with `choices` for multiple choice.

    `files` names the file of each split, `shares` the hundredths of it (by a hash of the row's id) that a split takes: a set
    with one training file shares it between sft, rl and val.
    """

    def __init__(self, name, check, files, shares, data_dir, source=""):
        self.name, self.check, self.files, self.shares, self.data_dir, self.source = name, check, files, shares, Path(data_dir), source

    def problems(self, split, n, seed=0):
        self._check_split(split, self.files)
        path = self.data_dir / self.files[split]
        if not path.is_file():
            raise UserError(f"{path}: no such file; {self.name} is not downloaded for you" + (f": {self.source}, or point --data-dir at it" if self.source else ""))
        if self.check is check_math:
            math_verify()  # now, not after an hour of sampling
        rows = {}
        for number, row in enumerate(read_jsonl(path, ("question", "answer")), 1):
            question, answer, choices = row["question"], row["answer"], row.get("choices") or {}
            identity = str(row.get("id", number))
            texts = isinstance(question, str) and isinstance(answer, (str, int))
            if not (texts and isinstance(choices, dict) and all(isinstance(c, str) for c in choices.values())):
                raise UserError(f"{path}: row {number}: question, answer and every choice must be text")
            answer = str(answer)
            if self.check is check_integer and integer_of(answer) is None:
                raise UserError(f"{path}: row {number}: the answer {answer[:40]!r} is not an integer; grade with file:PATH:exact or :math")
            if choices and answer not in choices:
                raise UserError(f"{path}: row {number}: the answer {answer[:40]!r} is none of the choices {', '.join(choices)}")
            if identity in rows:
                raise UserError(f"{path}: row {number}: the id {identity!r} stands there twice")
            rows[identity] = {"question": question, "answer": answer, "choices": choices}
        if split in self.shares:
            rows = {identity: row for identity, row in rows.items() if hundredth(identity) in self.shares[split]}
        if n > len(rows):
            raise UserError(f"{self.name} has {len(rows)} questions in the split {split}, {n} were asked for; ask for fewer (0 takes all)")
        chosen = random.Random(f"{self.name}/{split}/{seed}").sample(sorted(rows), n or len(rows))
        return [self._problem(identity, rows[identity]) for identity in chosen]

    def _problem(self, identity, row):
        truth = {"answer": row["answer"]}
        question = row["question"]
        if row["choices"]:
            question += "".join(f"\n{letter}. {text}" for letter, text in row["choices"].items()) + "\nThe answer is the letter of the best choice."
            truth["choices"] = row["choices"]
        return Problem(f"{self.name}/{identity}", self.name, question, truth)


TRAIN = {"sft": "train.jsonl", "rl": "train.jsonl", "val": "train.jsonl"}
TRAIN_SHARES = {"sft": range(0, 45), "rl": range(45, 90), "val": range(90, 100)}
OWN_SHARES = {"sft": range(0, 40), "rl": range(40, 80), "val": range(80, 85), "test": range(85, 100)}  # of file:PATH; the split `all` is the whole file
FILES = {  # name: (checker, {split: file}, where to get it)
    "gsm8k": (check_integer, {**TRAIN, "test": "test.jsonl"}, "github.com/openai/grade-school-math, as rows {id, question, answer} with the final integer as answer"),
    "csqa": (check_choice, {**TRAIN, "test": "dev.jsonl"}, "CommonsenseQA 1.11, as rows {id, question, choices, answer}; test is its dev file"),
    "math500": (check_math, {"test": "test.jsonl"}, "github.com/openai/prm800k, math_splits/test, as rows {id, question, answer}"),
    "aime": (check_integer, {"test": "test.jsonl"}, "its text is not openly licensed; bring your own rows {id, question, answer}"),
    "amc": (check_integer, {"test": "test.jsonl"}, "its text is not openly licensed; bring your own rows {id, question, answer}"),
    "gpqa": (check_choice, {"test": "test.jsonl"}, "its licence asks not to publish it; bring your own rows {id, question, choices, answer}"),
    "openthoughts": (check_math, TRAIN, "OpenThoughts on the hub, as rows {id, question, answer}"),
}
NAMES = ("countdown-2..6 and countdown-2..6-small, letters-4/5, acronym-4/5, multiply-2..5 and multiply-2-small, "
         f"{', '.join(FILES)}, file:PATH[:exact|:integer|:math]")


def find(name, data_dir="data"):
    """The task of a name. Raises UserError that lists the names."""
    match = re.fullmatch(r"(countdown)-([2-6])(-small)?|(multiply)-([2-5])|(multiply)-(2)(-small)|(letters|acronym)-([45])", name)
    if match:
        kind, n, *small = [g for g in match.groups() if g]
        return {"countdown": Countdown, "multiply": Multiply, "letters": Letters, "acronym": Acronym}[kind](name, int(n), bool(small))
    if name in FILES:
        check, files, source = FILES[name]
        return FromFile(name, check, {split: os.path.join(name, file) for split, file in files.items()}, TRAIN_SHARES, data_dir, source)
    if name.startswith("file:"):
        path, _, grading = name.removeprefix("file:").rpartition(":")
        if grading not in ("exact", "integer", "math") or not path:
            path, grading = name.removeprefix("file:"), "exact"
        exact = lambda answer, truth: "" if answer == truth["answer"].strip() else "differs from the right answer"
        check = {"exact": exact, "integer": check_integer, "math": check_math}[grading]
        return FromFile(name, check, dict.fromkeys([*OWN_SHARES, "all"], os.path.abspath(path)), OWN_SHARES, "")
    raise UserError(f"task {name}: unknown; the tasks are {NAMES}")


def find_all(names, data_dir="data"):
    """The tasks of a comma-separated list."""
    return [find(name.strip(), data_dir) for name in names.split(",")]
