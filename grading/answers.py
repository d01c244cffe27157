"""What a text says: its tags, the answer and the attempts in it, the verdict of a check. Pure Python.

    extract_answer("<think>...</think> <answer> 2 </answer>")           # ("2", "")
    unwrap("**5.**")                                                    # "5"

`Task.grade` in tasks.py puts an answer and a checker together.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

# The tags of a trace. An attempt or a reflection that holds one of them would break the trace it is put into.
TRACE_TAGS = ("<think>", "</think>", "<sample>", "</sample>", "<reflect>", "</reflect>")


# ---- what a text says ----------------------------------------------------------------------------
NO_ANSWER = "no <answer>"
CLOSED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def extract_answer(text: str, lenient: bool = False) -> tuple[str | None, str]:
    """(answer or None, the reason why there is none).

    Strict: the last <answer> after the last </think>, none if a <think> is open. An unclosed <answer> earlier
    in the text is taken for a mention ("I end with the <answer> tag"); nested tags are refused. Lenient: the
    strict answer, else the last closed pair anywhere.

    extract_answer("<think><answer>1</answer></think><answer> 2 </answer>")  ->  ("2", "")
    """
    answer, why_none = _strict_answer(text)
    if answer is None and lenient:
        closed = CLOSED.findall(text)
        if closed:
            return closed[-1].strip(), ""
    return answer, why_none


def _strict_answer(text):
    after_thought = text.rpartition("</think>")[2]
    if "<think>" in after_thought:
        return None, "the <think> is never closed"
    before, opening, rest = after_thought.rpartition("<answer>")
    if not opening:
        return None, NO_ANSWER
    answer, closing, after = rest.partition("</answer>")
    if not closing:
        return None, "the <answer> is never closed"
    depth = 0  # of the tags that are open before it
    for tag in re.findall("</?answer>", before):
        depth = depth + 1 if tag == "<answer>" else max(depth - 1, 0)
    if before.rstrip().endswith("<answer>") or (depth and "</answer>" in after):
        return None, "nested <answer> tags"
    return answer.strip(), ""


def malformed(text: str) -> str:
    """Why one cannot tell what the answer of a text is, or "". A text without <answer> is not malformed."""
    _, why_none = extract_answer(text)
    return "" if why_none == NO_ANSWER else why_none


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, braces in it included; None if there is none that closes."""
    _, opening, rest = text.rpartition("\\boxed{")
    if not opening:
        return None
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at].strip()
    return None


def verdict(text: str) -> bool | None:
    """True or False for the last <verdict> of a reflection, None if it has none that can be read."""
    _, opening, rest = text.lower().rpartition("<verdict>")
    said, closing, _ = rest.partition("</verdict>")
    if not opening or not closing:
        return None
    return {"correct": True, "incorrect": False}.get(said.strip(" \n\t.!*_`"))


THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def thoughts_in(response: str) -> list[tuple[int, str]]:
    """(start, text) of each <think> of a response that is not empty, or of all of it if there is none."""
    thoughts = [(match.start(1), match[1]) for match in THOUGHT.finditer(response) if match[1]]
    return thoughts or [(0, response)]


@dataclass(frozen=True)
class Attempt:
    """A closed <sample> of a thought, and the verdict on it."""
    at: int  # where in the response its tag begins
    text: str
    said: bool | None  # None: there is no verdict that can be read
    said_at: int  # where the tag of the verdict begins, -1 if there is none


def attempts_in(response: str) -> list[Attempt]:
    """The attempts of a response, in their order.

    The verdict on an attempt is the last one in the reflections between it and the next <sample>.
    """
    attempts = []
    for begin, thought in thoughts_in(response):
        before, *blocks = thought.split("<sample>")
        at = begin + len(before)
        for block in blocks:
            end = at + len("<sample>") + len(block)
            text, closing, after = block.partition("</sample>")
            _, _, reflections = after.partition("<reflect>")
            tags = [match.start() for match in re.finditer("<verdict>", reflections, re.IGNORECASE)]
            said_at = end - len(reflections) + tags[-1] if tags else -1
            if closing:
                attempts.append(Attempt(at, text, verdict(reflections), said_at))
            at = end
    return attempts


# ---- the bare answer -----------------------------------------------------------------------------
WRAPPERS = (("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"), ("**", "**"), ("`", "`"),
            ("\\boxed{", "}"), ("\\text{", "}"), ("\\textbf{", "}"), ("\\mathrm{", "}"))
# Unicode has ASCII's "!" to "~" a second time, as wide as a Chinese character.
FULL_WIDTH = {code + 0xFEE0: code for code in range(ord("!"), ord("~") + 1)} | {ord("。"): "."}


def unwrap(answer: str) -> str:
    """An answer without what people write around one: brackets of math, bold, code, one final full stop.

    unwrap("**\\\\(\\\\boxed{5}\\\\).**")  ->  "5"
    """
    bare = answer.translate(FULL_WIDTH).strip()
    may_stop = True
    for _ in range(8):  # more wrappers than anybody writes
        before = bare
        if may_stop and bare.endswith("."):
            bare = bare[:-1].rstrip()
            may_stop = False
        for opening, closing in WRAPPERS:
            if bare.startswith(opening) and bare[len(opening):].endswith(closing):
                inner = bare[len(opening):-len(closing)]
                if _is_one(inner, opening, closing):
                    bare = inner.strip()
        if bare == before:
            break
    return bare


def _is_one(inner, opening, closing):
    """Whether what is inside a wrapper is one text: `$5$ or $6$` is two."""
    if closing == "}":
        depth = 0
        for character in inner:
            depth += (character == "{") - (character == "}")
            if depth < 0:
                return False
        return True
    inner = inner.replace("\\$", "")  # a dollar, not a bracket
    if opening == closing:
        inner = inner.strip(closing)
    return closing not in inner


Check = Callable[[str, dict], str]


def of_bare_answers(check: Check) -> Check:
    """Makes a checker of bare answers accept answers as people write them."""
    @wraps(check)
    def checked(answer, truth):
        return check(unwrap(answer), truth)
    return checked
