"""The tags of a response, the answer in it, and the checkers that say whether it is right. Pure Python.

`Task.grade` in tasks.py puts the two together.

    extract_answer("<think>...</think> <answer> 2 </answer>")           # ("2", "")
    check_countdown("(2 + 3) * 20", {"numbers": [2, 3, 20], "target": 100})   # "": right
    check_countdown("2 + 3", {"numbers": [2, 3, 20], "target": 100})          # "uses [2, 3], the numbers ..."

Grading never runs an answer: countdown has its own parser over exact fractions, with work bounded by the 256
characters that an answer may have.

Left out: symbolic math (the math-verify library does it, if installed).
"""
import gzip
import operator
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from cli import UserError

# The tags of a trace. An attempt or a reflection that holds one of them would break the trace it is put into.
TRACE_TAGS = ("<think>", "</think>", "<sample>", "</sample>", "<reflect>", "</reflect>")


# ---- what a text says ----------------------------------------------------------------------------
def extract_answer(text: str, lenient: bool = False) -> tuple[str | None, str]:
    """(answer or None, the reason why there is none).

    Strict: the last <answer> after the last </think>, none if <think> never closed. Lenient: the last
    <answer> anywhere.

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


VERDICT = re.compile(r"<verdict>\s*(correct|incorrect)\s*</verdict>", re.IGNORECASE)


def verdict(text: str) -> bool | None:
    """True or False for the last <verdict> of a reflection, None if it has none."""
    found = VERDICT.findall(text)
    return found[-1].lower() == "correct" if found else None


# ---- arithmetic ----------------------------------------------------------------------------------
LONGEST = 256  # characters of an answer
DEEPEST = 64  # parentheses
SPELLINGS = {  # other ways to write an operator
    "\\times": "*", "\\cdot": "*", "\\div": "/", "×": "*", "x": "*", "X": "*", "÷": "/", "−": "-",
}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Rejected(Exception):
    """Why an expression is no answer."""


def parse(text: str) -> tuple[Fraction, list[int]]:
    """(value, [integers used in order]) of an expression of integers, + - * / and parentheses.

    parse("(2 + 3) * 20")  ->  (Fraction(100), [2, 3, 20]).  Raises Rejected with a reason for anything else.
    """
    if len(text) > LONGEST:
        raise Rejected(f"longer than {LONGEST} characters")
    for spelling, symbol in SPELLINGS.items():
        text = text.replace(spelling, symbol)
    parser = ExpressionParser(re.findall(r"[0-9]+|\S", text))
    value = parser.sum(depth=0)
    if parser.peek() is not None:
        raise Rejected(f"unexpected {parser.peek()!r}")
    return value, parser.used


class ExpressionParser:
    """Recursive descent, a method for each rule of the grammar. Operators are left-associative.

        sum     = product (("+" | "-") product)*
        product = atom (("*" | "/") atom)*
        atom    = integer | "(" sum ")"          integers have no sign
    """

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0
        self.used = []

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self) -> str | None:
        token = self.peek()
        self.at += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            symbol = self.next()
            value = apply(symbol, value, self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.peek() in ("*", "/"):
            symbol = self.next()
            value = apply(symbol, value, self.atom(depth))
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.next()
        if token == "(":
            if depth == DEEPEST:
                raise Rejected(f"parentheses deeper than {DEEPEST}")
            value = self.sum(depth + 1)
            if self.next() != ")":
                raise Rejected("unbalanced parentheses")
            return value
        if token is None:
            raise Rejected("the expression ends too early")
        if not (token.isascii() and token.isdigit()):
            raise Rejected(f"expected a number, found {token!r}")
        self.used.append(int(token))
        return Fraction(int(token))


def apply(symbol: str, a: Fraction, b: Fraction) -> Fraction:
    if symbol == "/" and b == 0:
        raise Rejected("division by zero")
    return OPERATORS[symbol](a, b)


# ---- checkers: (answer, truth) -> "" if right, else the reason -----------------------------------
def check_countdown(answer: str, truth: dict) -> str:
    """An expression (perhaps with `= 100`, its value as text), or lines `Step 1: a op b = c` to the target.

    Either way each number is used exactly once.
    """
    numbers, target = truth["numbers"], truth["target"]
    if len(answer) > LONGEST:
        return f"longer than {LONGEST} characters"
    if not answer:
        return "empty answer"
    try:
        if answer.startswith("Step"):
            return _check_steps(answer, numbers, target)
        return _check_expression(answer, numbers, target)
    except Rejected as e:
        return str(e)


def _check_expression(answer, numbers, target):
    expression, equals, claim = answer.partition("=")
    claim = claim.strip()
    value, used = parse(expression)
    if equals and claim != str(value):
        return f"claims to be {claim} but is {value}"
    if Counter(used) != Counter(numbers):
        return f"uses {sorted(used)}, the numbers are {sorted(numbers)}"
    return "" if value == target else f"is {value}, not {target}"


STEP = re.compile(r"Step [0-9]+: *(-?[0-9]+) *(\S|\\times|\\cdot|\\div) *(-?[0-9]+) *= *(-?[0-9]+)")


def _check_steps(answer, numbers, target):
    pool = Counter(numbers)  # unused numbers and earlier results
    for line in answer.splitlines():
        line = line.strip()
        if not line:
            continue
        match = STEP.fullmatch(line)
        if not match:
            return f"not a step: {line[:40]!r}"
        a, b, claim = int(match[1]), int(match[3]), int(match[4])
        symbol = SPELLINGS.get(match[2], match[2])
        for operand in (a, b):
            if not pool[operand]:
                return f"{operand} is neither an unused number nor an earlier result"
            pool[operand] -= 1
        if symbol not in OPERATORS:
            return f"{symbol!r} is no operation"
        value = apply(symbol, Fraction(a), Fraction(b))
        if value != claim:
            return f"{a} {symbol} {b} is {value}, not {claim}"
        pool[claim] += 1
    left = sorted(pool.elements())
    return "" if left == [target] else f"ends with {left}, not with {target} alone"


INTEGER = re.compile(r"\$? ?([-+−]?)\$? ?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)? ?(%|[A-Za-z]+)?")
# Words that change the number: "3 k" is not 3 of something.
NOT_UNITS = {"k", "m", "b", "hundred", "thousand", "million", "billion", "dozen", "x", "e"}


def integer_of(text: str) -> int | None:
    """The integer that a text is, or None.

    It may have thousands separators, decimals of zero, a currency sign before and a percent sign or one word
    of a unit after.

    integer_of("$1,234.00 dollars")  ->  1234
    """
    match = INTEGER.fullmatch(text) if len(text) <= LONGEST else None
    if not match:
        return None
    sign, digits, unit = match.groups()
    if (unit or "").lower() in NOT_UNITS:
        return None
    value = int(digits.replace(",", ""))
    return -value if sign in ("-", "−") else value


def check_integer(answer: str, truth: dict) -> str:
    value = integer_of(answer)
    if value is None:
        return "not an integer"
    return "" if value == integer_of(truth["answer"]) else f"is {value}"


def check_exact(answer: str, truth: dict) -> str:
    return "" if answer == truth["answer"].strip() else "differs from the right answer"


LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:].*)?", re.DOTALL)


def check_choice(answer: str, truth: dict) -> str:
    """A letter, `(A)`, `A. bank` or the text of the choice."""
    choices = truth.get("choices", {})
    named = [letter for letter, text in choices.items() if text.lower() == answer.lower()]
    if not named:
        match = LETTER.fullmatch(answer[:LONGEST])
        named = [match[1].upper()] if match else []
    if truth["answer"] in named:
        return ""
    return "is another choice" if named else "is no choice"


def load_math_verify():
    """The library for math equivalence, which is not among the requirements."""
    try:
        import math_verify
    except ImportError as e:
        raise UserError("grading math needs the math-verify library: "
                        "pip install math-verify[antlr4_13_2]") from e
    return math_verify


def check_math(answer: str, truth: dict) -> str:
    library = load_math_verify()
    if len(answer) > LONGEST:
        return f"longer than {LONGEST} characters"
    gold = library.parse(f"${truth['answer']}$")
    same = library.verify(gold, library.parse(f"${answer}$"))
    return "" if same else "is not equal to the right answer"


@lru_cache
def dictionary() -> dict[str, bool]:
    """SCOWL's words of 4 to 8 letters: {word: True if of size 35 (common), False if only of size 60}."""
    with gzip.open(Path(__file__).parent / "words" / "scowl.txt.gz", "rt") as f:
        return {line.split()[0]: line.endswith(" 35\n") for line in f}


def check_word(answer: str, truth: dict) -> str:
    """A dictionary word of at least `least` letters, made of the given ones (in their order if `ordered`)."""
    word, letters = answer.lower(), truth["letters"]
    if word not in dictionary():
        return "not in the dictionary"
    if len(word) < truth["least"]:
        return f"shorter than {truth['least']} letters"
    if truth["ordered"]:
        rest = iter(letters)
        fits = all(letter in rest for letter in word)  # `in` advances the iterator: a subsequence test
        return "" if fits else "not made of the given letters in their order"
    fits = not Counter(word) - Counter(letters)
    return "" if fits else "not made of the given letters"
