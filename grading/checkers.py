"""The checkers: whether an answer is right, and why not. Pure Python.

    check_countdown("(2 + 3) * 20", {"numbers": [2, 3, 20], "target": 100})   # "": right
    check_countdown("2 + 3", {"numbers": [2, 3, 20], "target": 100})          # "uses [2, 3], the numbers ..."

Grading never runs an answer: countdown has its own parser over exact fractions, with work bounded by the 256
characters that an answer may have. Every checker reads the bare answer, without `$`, `\\boxed{}`, `**` and
their like around it; what else stands there makes it another answer. Math is in `math.py`.
"""
import gzip
import operator
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from grading.answers import of_bare_answers, unwrap


# ---- arithmetic ----------------------------------------------------------------------------------
LONGEST = 256  # characters of an answer
DEEPEST = 64  # parentheses
SPELLINGS = {  # other ways to write an operator or a parenthesis
    "\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "",
    "\\*": "*", "∗": "*", "×": "*", "x": "*", "X": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-",
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
@of_bare_answers
def check_countdown(answer: str, truth: dict) -> str:
    """An expression, perhaps with its value (`= 5 * 20 = 100`), or lines `Step 1: a op b = c` to the target.

    Either way each number is used exactly once.
    """
    numbers, target = truth["numbers"], truth["target"]
    if len(answer) > LONGEST:
        return f"longer than {LONGEST} characters"
    answer = answer.replace("−", "-")
    try:
        if answer.lower().startswith("step"):
            return _check_steps(answer, numbers, target)
        return _check_expression(answer, numbers, target)
    except Rejected as e:
        return str(e)


def _check_expression(answer, numbers, target):
    expression, *links = answer.split("=")
    value, used = parse(expression)
    for link in map(unwrap, links):
        claim, _ = parse("0" + link if link.startswith("-") else link)  # the grammar has no sign
        if claim != value:
            return f"claims to be {link} but is {value}"
    if Counter(used) != Counter(numbers):
        return f"uses {sorted(used)}, the numbers are {sorted(numbers)}"
    return "" if value == target else f"is {value}, not {target}"


STEP = re.compile(r"step [0-9]+: *(-?[0-9]+) *(\S|\\times|\\cdot|\\div) *(-?[0-9]+) *= *(-?[0-9]+)\.?",
                  re.IGNORECASE)


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


SEPARATOR = re.compile(r"(?<=[0-9])(?:,\\!|\{,\}|\\,) ?(?=[0-9]{3})")  # LaTeX's commas of thousands
INTEGER = re.compile(r"""
    ([-+−]?) \ ? (?:\\?[$]|[€£¥])? \ ? ([-+−]?)  # a sign, before or after a currency
    ([0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+)
    (?:\.0+)? (\ ?\\?%)?
    """, re.VERBOSE)


def integer_of(text: str, percent: bool = False) -> int | None:
    """The integer that a bare text is, or None.

    It may have thousands separators, decimals of zero, a currency sign before it and, with `percent`, a
    percent sign after it. No other unit: "5 trillion" is not 5.

    integer_of("$1,234.00")  ->  1234
    """
    match = INTEGER.fullmatch(SEPARATOR.sub(",", text)) if len(text) <= LONGEST else None
    if not match:
        return None
    sign, inner_sign, digits, percent_sign = match.groups()
    if (sign and inner_sign) or (percent_sign and not percent):
        return None
    value = int(digits.replace(",", ""))
    return -value if sign + inner_sign in ("-", "−") else value


@of_bare_answers
def check_integer(answer: str, truth: dict) -> str:
    gold = unwrap(truth["answer"])
    value = integer_of(answer, percent=gold.endswith("%"))
    if value is None:
        return "not an integer"
    return "" if value == integer_of(gold, percent=True) else f"is {value}"


@of_bare_answers
def check_exact(answer: str, truth: dict) -> str:
    return "" if answer == unwrap(truth["answer"]) else "differs from the right answer"


@of_bare_answers
def check_choice(answer: str, truth: dict) -> str:
    """The label of a choice, alone or with its text (`A`, `(A)`, `A) bank`, `A. bank`), or the text alone.

    Labels go before texts: of the choices {A: "B", B: "C"}, `B` is the second. Small letters will do. Where
    two choices have the right text (CommonsenseQA has such rows), either is right.
    """
    choices = {label: unwrap(text) for label, text in truth["choices"].items()}
    lower = str.lower if len({text.lower() for text in choices.values()}) == len(choices) else str

    def labelled(fold):
        return [label for label, text in choices.items() if _is_label(fold(answer), fold(label), fold(text))]

    def worded(fold):
        return [label for label, text in choices.items() if fold(text) == fold(answer)]

    named = labelled(str) or labelled(lower) or worded(str) or worded(lower)
    if not named:
        return "is no choice"
    right = choices[truth["answer"]]
    return "" if all(choices[label] == right for label in named) else "is another choice"


def _is_label(answer, label, text):
    """Whether an answer is this label, perhaps with its own text. `a dog` is not the label a."""
    label = re.escape(label)
    match = re.fullmatch(rf"(?:[(\[]{label}[)\]][.:]?|{label}(?:[).:,]|\s[-–]|(?=\n)|$))(.*)",
                         answer.replace("**", ""), re.DOTALL)
    return match is not None and unwrap(match[1]) in ("", text)


@lru_cache
def dictionary() -> dict[str, bool]:
    """SCOWL's words of 4 to 8 letters: {word: True if of size 35 (common), False if only of size 60}."""
    with gzip.open(Path(__file__).parent.parent / "words" / "scowl.txt.gz", "rt") as f:
        return {line.split()[0]: line.endswith(" 35\n") for line in f}


@of_bare_answers
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
