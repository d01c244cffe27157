r"""When two math answers are the same. math-verify computes; here is what it may be asked.

    check_math(r"\frac{2}{4}", {"answer": "0.5"})          # "": right
    check_math("5 trillion", {"answer": "5"})              # "has a letter that the right answer lacks"

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

from grading.answers import of_bare_answers, unwrap
from grading.checkers import LONGEST, SEPARATOR


@of_bare_answers
def check_math(answer: str, truth: dict) -> str:
    return difference(answer, truth["answer"])


# ---- spellings -----------------------------------------------------------------------------------
UNIT = r"(?:\\text|\\mbox|\\mathrm)\s*\{([^{}]*)\}"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # characters
    (r"[−–]", "-"), (r"×", r"\\times "), (r"[·⋅]", r"\\cdot "), (r"±", r"\\pm "), (r"½", r"\\frac{1}{2}"),
    (r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "), (r"∞", r"\\infty "), (r"∪", r"\\cup "), (r"∈", r"\\in "),
    (r"≤", r"\\le "), (r"≥", r"\\ge "), (r"∅|\\varnothing(?![a-z])", r"\\emptyset "),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}"),
    # LaTeX that says nothing, and LaTeX that says the same in another way
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\\\\s*\[[^\]]*\]", r"\\\\"), (r"\\\\\s*\\end", r"\\end"),
    (r"\\(?:mathrm|mathit|rm)\s*\{\s*([A-Za-z])\s*\}", r"\1"),  # \mathrm{e}
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\frac\s*([0-9])", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),  # \frac43
    (r"(?:(?<![A-Za-z])\\?sqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}"),  # sqrt(2)
    (r"(?:\\sqrt|√)\s*([0-9]+)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\\pi\s*\(", r"\\pi \\cdot ("),  # a function to the library
    (r"\^\s*-\s*([0-9]+|[A-Za-z])", r"^{-\1}"),
    (r"(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree|°)(?=\s*(?:[,)]|$))", ""),  # 90^\circ is compared as 90
    # numbers
    (r"(?<![0-9.])\.(?=[0-9])", "0."),  # .5
    (r"(?:\\?\$|[€£¥])\s*(?=[-+]?\s*[0-9])", ""),
    (r"(?<!\\)%|\s*(?:\\text\s*\{\s*)?percent(?:\s*\})?$", r"\\%"),
    (r"(?<=[0-9])_\{([0-9]+)\}", r"_\1"),  # 52_{8}
    (r"(?<![0-9.,])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.,])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    # lists
    (r"(?<!\\)\\[()]|(?<!\\)\$", ""),  # $1$ and $2$
    (r"\s*,?\s*(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])(?:\s*\})?\s*", ", "),
)]


def rewrite(text: str) -> str:
    text = SEPARATOR.sub(",", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def squeeze(text: str) -> str:
    """Without white space, but `5 6` is not 56."""
    return re.sub(r"(?<![\w.])\s+|\s+(?![\w.])", "", text)


# ---- what can be read ----------------------------------------------------------------------------
SIGNS = "pm|mp"
RELATIONS = "cdot times div cup cap in leq le geq ge neq ne".replace(" ", "|")
SYMBOLS = "pi infty emptyset theta alpha beta gamma lambda omega phi".replace(" ", "|")
FUNCTIONS = "frac sqrt sin cos tan cot sec csc arcsin arccos arctan log ln binom".replace(" ", "|")
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*?)\\end\{\1\}", re.DOTALL)
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?"
TOKEN = re.compile(
    rf"\s*({NUMBER}|[A-Za-z](?:_[0-9A-Za-z]|_\{{[0-9]+\}})?|\\log_(?:[0-9]|\{{[0-9]+\}})"
    rf"|\\(?:{SIGNS}|{RELATIONS}|{SYMBOLS}|{FUNCTIONS})(?![A-Za-z])|\\[{{}}]|[-+*/^=<>()\[\]{{}},|!])")


def skeleton(text: str) -> str:
    """A text for MISREAD: ";" for LaTeX's relations and operators, "A" for a symbol, "\\" for a function."""
    text = re.sub(rf"\\(?:{SIGNS})(?![A-Za-z])", "-", text)
    text = re.sub(rf"\\(?:{RELATIONS})(?![A-Za-z])", ";", text)
    text = re.sub(rf"\\(?:{SYMBOLS})(?![A-Za-z])", "A", text)
    return re.sub(r"\\[A-Za-z]+(?:_(?:[0-9]|\{[0-9]+\}))?", r"\\", text)


MISREAD = [re.compile(pattern) for pattern in (  # what the library reads, but not as it is written
    r"[0-9A-Za-z)}]\s*\(\s*[-+]?\s*(?:[0-9.]+|[A-Za-z])?\s*\)",  # 2(3)
    r"[0-9]\s+[0-9]", r"\)\s*[0-9]",
    r"/\s*(?:[0-9.]+|[A-Za-z])\s*[A-Za-z(\\]", r"\\\s*[0-9A-Za-z]+\s*/",  # 1/2x, \cos x/2
    r"\^\s*(?:[0-9A-Za-z]|\{[^{}]*\})\s*\^",  # 2^3^2
    r"[0-9][eE][-+]?[0-9]", r"[-/]\s*0[0-9]",  # 1e5, 2023-05-01
    r"^[*/^=<>,;]", r"[-+*/^=<>,;]$", r"[-+]\s*[-+*/^=<>,;]", r"[*/^=<>,;]\s*[*/^=<>,;]",  # 5+
    r"[({\[]\s*[*/^=<>,;)}\]]", r"[-+*/^=<>,;]\s*[)}\]]",
)]


def unreadable(text: str) -> str:
    """Why the library would not read a rewritten answer whole, or ""."""
    flat = MATRIX.sub(lambda match: "(" + re.sub(r"\\\\|&", ",", match[2]) + ")", text)
    strange = not flat or TOKEN.sub("", flat).strip() or flat.count("|") % 2 or not balanced(flat)
    if strange or any(pattern.search(skeleton(flat)) for pattern in MISREAD):
        return "only a part of it could be read"
    return ""


def balanced(text: str) -> bool:
    """Whether brackets close in order. (3, 4] is an interval."""
    opened = []
    for character in text:
        if character in "([{":
            opened.append(character)
        elif character in ")]}" and (not opened or (opened.pop() == "{") != (character == "}")):
            return False
    return not opened


LARGEST_EXPONENT = 10_000  # of a number; 99 if there is a root, a quotient or an i
LARGEST_OF_BRACKETS = 12  # the product of theirs
DEEPEST = 6  # brackets: the library's time grows by a factor with each
MOST_LOGARITHMS = 3


def too_large(text: str) -> str:
    """Why sympy might compute for long, or "": the library's own time limit does not stop a C function."""
    reason = "too large to compute"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST or len(re.findall(r"\\(?:log|ln)", text)) > MOST_LOGARITHMS or text.count("^") > 20:
        return reason
    rest = re.sub(r"(?<![0-9A-Za-z^])(?:[0-9]{1,2}|[A-Za-z])!(?!\s*!)", "", text)
    rest = re.sub(r"\\binom\s*\{\s*\w{1,2}\s*\}\s*\{\s*\w{1,2}\s*\}", "", rest)
    rest = re.sub(r"[A-Za-z]\s*\^\s*(?:[0-9]|\{[0-9]\})", "", rest)  # x^2, in an exponent too
    if "!" in rest or "\\binom" in rest or re.search(r"\^\s*\{[^{}]*\^", rest):
        return reason
    of_brackets = largest = 1
    for base, exponent in re.findall(r"(\S)\s*\^\s*(\{[^{}]*\}|[0-9])", rest):
        power = max([1, *(float(number) for number in re.findall(r"[0-9]+", exponent))])
        if base in ")}]":
            of_brackets *= power
        else:
            largest = max(largest, power)
    bound = 99 if re.search(r"\\sqrt|\\frac|/|i", text) else LARGEST_EXPONENT
    return reason if largest > bound or of_brackets > LARGEST_OF_BRACKETS else ""


def letters(text: str) -> set[str]:
    """The letters of a rewritten text that stand for something: variables, and those of words."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+(?:\{[pb]matrix\})?", " ", text)))


# ---- the comparison ------------------------------------------------------------------------------
WORDS = re.compile(r"yes|no|true|false|[a-z .,'-]*[a-z]{4}[a-z .,'-]*", re.IGNORECASE)
BASE = re.compile(r"[0-9A-F]+_[0-9]+")
LETTER = r"(?:[A-Za-z]|\\[a-z]+)"
NAME = (rf"{LETTER}(?:_\w+|_\{{\w+\}})?(?:\(-?\w+\))?|[A-Z]{{2,3}}|\\angle\s*[A-Z]{{1,3}}"
        rf"|\({LETTER}(?:\s*,\s*{LETTER})+\)")
NAMED = re.compile(rf"({NAME})\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
THOUSANDS = re.compile(r"(?<![0-9,.(\[])(?<!\\\{)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,)\]]|\\\})")
MEASURES = re.compile(  # units that an answer may leave out, since the question asks for so many of them
    r"(?:square|cubic)?(?:degrees?|units?|inch(?:es)?|feet|foot|ft|yards?|miles?|[ckm]?m"
    r"|(?:centi|kilo)?met(?:er|re)s?|k?g|(?:kilo)?grams?|pounds?|lit(?:er|re)s?"
    r"|cents?|dollars?|seconds?|minutes?|hours?|days?)(?:\^[23])?")
NOT_EQUAL = "is not equal to the right answer"


def flaw_of_gold(gold: str) -> str:
    """Why a right answer, as a data set has it, cannot be compared with others, or ""."""
    text = rewrite(unwrap(gold))
    if BASE.fullmatch(squeeze(text)) or is_words(gold, text):
        return ""
    value, _ = split_unit(text)
    value = without_thousands(value).removesuffix("\\%")
    return unreadable(value) or too_large(value)


def is_words(gold: str, text: str) -> bool:
    r"""Whether a right answer (and what it is rewritten) is words, not math: \text{No}, east."""
    in_text = "\\text" in gold and "\\text" not in unwrap(gold)  # the whole of it
    return (in_text and not text[:1].isdigit()) or bool(WORDS.fullmatch(text))


@lru_cache(maxsize=100_000)  # attempts of a question often agree
def difference(answer: str, raw_gold: str) -> str:
    """Why a bare answer is not the right one, or "": as texts if that will do, else as math-verify finds."""
    if len(answer) > max(LONGEST, 2 * len(raw_gold)):
        return f"longer than {LONGEST} characters"
    gold, answer = rewrite(unwrap(raw_gold)), rewrite(answer)
    if ", " in gold:  # a list, of numbers that may have three digits
        answer = answer.replace(",", ", ")
    else:
        gold, answer = without_thousands(gold), without_thousands(answer)
    if squeeze(answer) == squeeze(gold):
        return ""
    if BASE.fullmatch(squeeze(gold)):
        return NOT_EQUAL
    if is_words(raw_gold, gold):
        words = re.sub(r"\\[A-Za-z]+\s*\{([^{}]*)\}", r"\1", answer)  # \textbf{(A)}
        return "" if words.strip("() ").lower() == gold.strip("() ").lower() else NOT_EQUAL
    gold, unit = split_unit(gold)
    answer, answered_unit = split_unit(answer, unit)
    if answered_unit != unit and not (answered_unit == "" and MEASURES.fullmatch(unit)):
        return f"lacks the unit of the right answer, {unit}" if unit else f"has a unit, {answered_unit}"
    name, value = split_name(gold)
    answered_name, answered_value = split_name(answer)
    if name and letters(value) and answered_name != name and "=" in answer:
        return difference_of_values(answer, gold)  # y = 2x + 3, and y - 2x = 3
    if name and answered_name not in ("", name):
        return NOT_EQUAL
    return difference_of_values(answered_value, value)


def difference_of_values(answer: str, gold: str) -> str:
    if letters(answer) - letters(gold):
        return "has a letter that the right answer lacks"
    percents = (gold.endswith("\\%"), answer.endswith("\\%"))
    gold, answer = gold.removesuffix("\\%"), answer.removesuffix("\\%")
    links = [answer] if "=" in gold else answer.split("=")  # 2 + 3 = 5: each must be it
    for link in links:
        link = link.strip()
        flaw = unreadable(link) or too_large(link)
        if flaw:
            return flaw
        if not same_kind(gold, link) or not equal(gold, link, *percents):
            return NOT_EQUAL
    return ""


def same_kind(gold: str, answer: str) -> bool:
    """Whether both are equations, or lists of one length, both in brackets or neither. The library is laxer:
    `(1, 2)`, `2, 1` and `1, 1, 2` all equal the set {1, 2} to it.
    """
    if "=" in gold and gold.count("=") != answer.count("="):
        return False
    if "," not in gold + answer:
        return True
    several = "\\pm" in gold + answer  # 1 \pm 2 is -1, 3
    sets = gold.count("\\{"), answer.count("\\{")
    return ((gold[0] in "([") == (answer[0] in "([") and (max(sets) < 2 or sets[0] == sets[1])
            and (several or gold.count(",") == answer.count(",")))


def without_thousands(text: str) -> str:
    """`10,080` -> `10080`, where it is no part of a list."""
    return THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def split_unit(text: str, unit: str | None = None) -> tuple[str, str]:
    r"""`5 \text{ cm}^2` -> ("5", "cm^2"). A unit that is looked for need not be in \text."""
    match = re.fullmatch(rf"(.*?)\s*{UNIT}\s*(\^\s*\{{?[23]\}}?)?", text, re.DOTALL)
    if match and match[1]:
        return match[1], re.sub(r"[\s{}]", "", match[2] + (match[3] or ""))
    if unit:
        at_end = r"[\s{]*".join(map(re.escape, unit)) + r"\}?"
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
    a, b = _parsed(gold), _parsed(answer)
    import math_verify  # here: it is not among the requirements
    return math_verify.verify(a, b) and close(a, b)


@lru_cache(maxsize=10_000)
def _parsed(text):
    """What the library makes of a text, with decimals as fractions, which it compares exactly, and one i."""
    import math_verify
    import sympy  # which the library brings
    exact = re.sub(r"([0-9]+)\.([0-9]+)", _as_fraction, text)
    expressions = math_verify.parse(f"${exact}$")
    for i, expression in enumerate(expressions):
        symbols = [symbol for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"]
        if symbols:
            expressions[i] = expression.subs(dict.fromkeys(symbols, sympy.I))
    return expressions


def _as_fraction(match):
    return rf"{{\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}}}"


def close(a: list, b: list) -> bool:
    """Whether two readings, where they are numbers, agree to 9 digits: to the library 10^-19 is 0."""
    try:
        first, second = complex(a[0]), complex(b[0])
    except (TypeError, ValueError, IndexError):
        return True
    return abs(first - second) <= max(1e-60, 1e-9 * max(abs(first), abs(second)))  # 2 - 2 is 10^-124 or so
