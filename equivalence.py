r"""When two math answers are the same. math-verify computes; here is what it may be asked.

    check_math(r"\frac{2}{4}", {"answer": "0.5"})          # "": right
    check_math("5 trillion", {"answer": "5"})              # "holds a letter that the right answer has not"

The library reads LaTeX and compares with sympy, far better than a few hundred lines of ours would. But it
drops in silence what it cannot read (`7 \\ 6` is 6, `52_8` is 52), takes `2(3)` for 2 + 3 and R for r, and
works for as long as sympy does (`9^{9^9}`). So an answer comes to it only after

1. harmless spellings were rewritten (REWRITES), and the two are not already the same text,
2. it was found to be made of nothing but what the library reads whole (`unreadable`),
3. it was found to be small enough to compute (`too_large`).

The right answers of a data set go through 2 and 3 when it is loaded. Names (`\text{Evelyn}`) and numbers in
another base (`52_8`) are compared as text.
"""
import re
from functools import lru_cache

from cli import UserError
from grading import LONGEST, SEPARATOR, of_bare_answers, unwrap


def load_math_verify():
    """The library for math equivalence, which is not among the requirements."""
    try:
        import math_verify
    except ImportError as e:
        raise UserError("grading math needs the math-verify library: "
                        "pip install math-verify[antlr4_13_2]") from e
    return math_verify


@of_bare_answers
def check_math(answer: str, truth: dict) -> str:
    """The checker. Two texts are compared once: attempts of a question often agree."""
    return difference(answer, unwrap(truth["answer"]))


# ---- spellings -----------------------------------------------------------------------------------
UNIT = r"(?:\\text|\\mbox)\s*\{([^{}]*)\}"
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"−", "-"), (r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "), (r"∞", r"\\infty "), (r"×", r"\\times "),
    (r"\\(?:mathrm|mathit|rm)\s*\{\s*([A-Za-z])\s*\}", r"\1"),  # \mathrm{e}
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\frac\s*([0-9])", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),  # \frac43
    (r"(?:(?<![A-Za-z])\\?sqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}"),  # sqrt(2)
    (r"(?:\\sqrt|√)\s*([0-9])(?![0-9])", r"\\sqrt{\1}"),
    (r"(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree|°)(?=\s*(?:[,)]|$))", ""),  # 90^\circ is compared as 90
    (r"(?<![0-9.])\.(?=[0-9])", "0."),  # .5
    (r"(?:\\?\$|[€£¥])\s*(?=[-+]?\s*[0-9])", ""),
    (r"\\pi\s*\(", r"\\pi \\cdot ("),  # a function to the library
    (r"(?<!\\)%", r"\\%"),
    (r"(?<=[0-9])_\{([0-9]+)\}", r"_\1"),  # 52_{8}
    (r"(?<![0-9.,])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.,])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\s*(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])(?:\s*\})?\s*", ", "),  # 3 and 5
)]


def rewrite(text: str) -> str:
    text = SEPARATOR.sub(",", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def squeeze(text: str) -> str:
    """Without white space, but `5 6` is not 56."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


# ---- what can be read ----------------------------------------------------------------------------
SIGNS = "pm|mp"
OPERATORS = "cdot times div cup cap in leq le geq ge neq ne".replace(" ", "|")
SYMBOLS = "pi infty emptyset theta alpha beta gamma lambda omega phi".replace(" ", "|")
FUNCTIONS = "frac sqrt sin cos tan cot sec csc arcsin arccos arctan log ln binom".replace(" ", "|")
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*?)\\end\{\1\}", re.DOTALL)
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?"
TOKEN = re.compile(
    rf"\s*({NUMBER}|[A-Za-z](?:_[0-9A-Za-z]|_\{{[0-9]+\}})?|\\log_(?:[0-9]|\{{[0-9]+\}})"
    rf"|\\(?:{SIGNS}|{OPERATORS}|{SYMBOLS}|{FUNCTIONS})(?![A-Za-z])|\\[{{}}]|[-+*/^=<>()\[\]{{}},|!])")
# What is read, but not as it is written. Operators of LaTeX are ";" here, symbols "A", functions "\".
MISREAD = [re.compile(pattern) for pattern in (
    r"[0-9A-Za-z)}]\s*\(\s*[-+]?\s*(?:[0-9.]+|[A-Za-z])?\s*\)", r"[0-9]\s+[0-9]", r"\)\s*[0-9]",  # 2(3): 5
    r"/\s*(?:[0-9.]+|[A-Za-z])\s*[A-Za-z(\\]",  # 1/2x
    r"\^\s*(?:[0-9A-Za-z]|\{[^{}]*\})\s*\^",  # 2^3^2
    r"^[*/^=<>,;]", r"[-+*/^=<>,;]$", r"[-+]\s*[-+*/^=<>,;]", r"[*/^=<>,;]\s*[*/^=<>,;]",  # 5+
    r"[({\[]\s*[*/^=<>,;)}\]]", r"[-+*/^=<>,;]\s*[)}\]]",
)]


def unreadable(text: str) -> str:
    """Why the library would not read a rewritten answer whole, or ""."""
    partly = "only a part of it could be read"
    flat = MATRIX.sub(lambda match: "(" + re.sub(r"\\\\|&", ",", match[2]) + ")", text)
    if TOKEN.sub("", flat).strip() or not flat:
        return partly
    plain = re.sub(rf"\\(?:{SIGNS})(?![A-Za-z])", "-", flat)
    plain = re.sub(rf"\\(?:{OPERATORS})(?![A-Za-z])", ";", plain)
    plain = re.sub(rf"\\(?:{SYMBOLS})(?![A-Za-z])", "A", plain)
    plain = re.sub(r"\\[A-Za-z]+(?:_(?:[0-9]|\{[0-9]+\}))?", r"\\", plain)
    if not balanced(flat) or flat.count("|") % 2 or any(pattern.search(plain) for pattern in MISREAD):
        return partly
    return too_large(flat)


def balanced(text: str) -> bool:
    """Whether brackets close in order. (3, 4] is an interval."""
    opened = []
    for character in text:
        if character in "([{":
            opened.append(character)
        elif character in ")]}" and (not opened or (opened.pop() == "{") != (character == "}")):
            return False
    return not opened


LARGEST_POWER = 10_000  # exponents in it, those of brackets multiplied


def too_large(text: str) -> str:
    """Why sympy might compute for hours, or "": the library's own time limit does not stop a C function."""
    reason = "too large to compute"
    rest = re.sub(r"(?<![0-9A-Za-z^])(?:[0-9]{1,2}|[A-Za-z])!(?!\s*!)", "", text)
    rest = re.sub(r"\\binom\s*\{\s*\w{1,2}\s*\}\s*\{\s*\w{1,2}\s*\}", "", rest)
    rest = re.sub(r"[A-Za-z]\s*\^\s*(?:[0-9]|\{[0-9]\})", "", rest)  # x^2, in an exponent too
    if "!" in rest or "\\binom" in rest or re.search(r"\^\s*\{[^{}]*\^", rest) or rest.count("^") > 20:
        return reason
    product = 1
    largest = 1
    for base, exponent in re.findall(r"(\S)\s*\^\s*(\{[^{}]*\}|[0-9])", rest):
        power = max([1, *(float(number) for number in re.findall(r"[0-9]+", exponent))])
        largest = max(largest, power)
        product *= power if base in ")}]" else 1
    return reason if largest * product > LARGEST_POWER else ""


def letters(text: str) -> set[str]:
    """The letters of a rewritten text that stand for something: variables, and those of words."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+(?:\{[pb]matrix\})?", " ", text)))


# ---- the comparison ------------------------------------------------------------------------------
WORDS = re.compile(r"\([A-Za-z]\)|[A-Za-z][A-Za-z .,'-]*[A-Za-z]{2}[A-Za-z .,'-]*")
BASE = re.compile(r"[0-9A-F]+_[0-9]+")
NAMED = re.compile(r"([A-Za-z](?:_\w)?(?:\([A-Za-z]\))?)\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
MEASURES = re.compile(  # units that an answer may leave out, since the question asks for so many of them
    r"(?:square|cubic)?(?:degrees?|units?|inch(?:es)?|feet|foot|ft|yards?|miles?|[ckm]?m|(?:centi|kilo)?met(?:er|re)s?"
    r"|cents?|dollars?|seconds?|minutes?|hours?|days?)(?:\^\{?[23]\}?)?")
NOT_EQUAL = "is not equal to the right answer"


def flaw_of_gold(gold: str) -> str:
    """Why a right answer cannot be compared with others, or ""."""
    gold = rewrite(unwrap(gold))
    if WORDS.fullmatch(gold) or BASE.fullmatch(squeeze(gold)):
        return ""
    value, _ = split_unit(gold)
    return unreadable(value.removesuffix("\\%"))


@lru_cache(maxsize=100_000)
def difference(answer: str, gold: str) -> str:
    """Why a bare answer is not the bare right one, or ""."""
    if len(answer) > max(LONGEST, 2 * len(gold)):
        return f"longer than {LONGEST} characters"
    answer, gold = rewrite(answer), rewrite(gold)
    if squeeze(answer) == squeeze(gold):
        return ""
    if WORDS.fullmatch(gold):
        return "" if answer.strip("()").lower() == gold.strip("()").lower() else NOT_EQUAL
    if BASE.fullmatch(squeeze(gold)):
        return NOT_EQUAL
    gold, unit = split_unit(gold)
    answer, answered_unit = split_unit(answer, unit)
    if answered_unit != unit and not (answered_unit == "" and MEASURES.fullmatch(unit)):
        return f"has not the unit of the right answer, {unit}"
    name, gold = split_name(gold)
    answered_name, answer = split_name(answer)
    if name and answered_name not in ("", name):
        return NOT_EQUAL
    if letters(answer) - letters(gold):
        return "holds a letter that the right answer has not"
    if "," in answer and ((gold[0] in "([") > (answer[0] in "([") or not re.search(r",|\\pm", gold)):
        return NOT_EQUAL  # the library takes `1, -2` for a set, whatever it is compared with
    percents = (gold.endswith("\\%"), answer.endswith("\\%"))
    gold, answer = gold.removesuffix("\\%"), answer.removesuffix("\\%")
    links = [answer] if "=" in gold else answer.split("=")  # 2 + 3 = 5: each must be it
    for link in links:
        why = unreadable(link.strip()) or ("" if equal(gold, link, *percents) else NOT_EQUAL)
        if why:
            return why
    return ""


def split_unit(text: str, unit: str | None = None) -> tuple[str, str]:
    r"""`5 \text{ cm}^2` -> ("5", "cm^2"). A unit that is looked for need not be in \text."""
    match = re.fullmatch(rf"(.*?)\s*{UNIT}\s*(\^\s*\{{?[23]\}}?)?", text, re.DOTALL)
    if match and match[1]:
        return match[1], squeeze(match[2] + (match[3] or ""))
    if unit:
        at_end = r"\s*".join(map(re.escape, unit))
        match = re.fullmatch(rf"(.*[^A-Za-z])\s*{at_end}", text, re.DOTALL)
        if match:
            return match[1].strip(), unit
    return text, ""


def split_name(text: str) -> tuple[str, str]:
    """`x = 5` -> ("x", "5");  `x = 5, x = 6` -> ("x", "5, 6")"""
    whole = NAMED.fullmatch(text)
    matches = [whole] if whole else [NAMED.fullmatch(part.strip()) for part in text.split(",")]
    names = {squeeze(match[1]) if match else "" for match in matches}
    if len(names) > 1 or "" in names:
        return "", text
    return names.pop(), ", ".join(match[2] for match in matches)


def equal(gold: str, answer: str, gold_percent: bool, answer_percent: bool) -> bool:
    r"""What the library says of two readable texts. Where 15% is right, 15 and 0.15 are too."""
    if gold_percent and not answer_percent:
        return _verified(gold, answer) or _verified(rf"\frac{{{gold}}}{{100}}", answer)
    if answer_percent and not gold_percent:
        answer = rf"\frac{{{answer}}}{{100}}"
    return _verified(gold, answer)


def _verified(gold, answer):
    # Its default compares 6 decimals: 0.000067 would be 0.0000672.
    return load_math_verify().verify(_parsed(gold), _parsed(answer), float_rounding=12)


@lru_cache(maxsize=10_000)
def _parsed(text):
    return load_math_verify().parse(f"${text}$")
