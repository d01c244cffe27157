"""A row of a file of questions, checked: one that can never be answered right is refused with its line."""
import math
import unicodedata
from decimal import Decimal

from cli import UserError
from files import fingerprint
from equivalence import check_math, flaw_of_gold
from grading import Check, check_choice, check_integer, integer_of, unwrap


def read_question(fields: dict, check: Check, where: str) -> tuple[str, str, dict]:
    """(identity, question, truth) of a row {question, answer}, perhaps with {choices}, graded by `check`.

    The identity is a hash of what the row asks. Raises UserError, which names `where`.
    """
    if "nums" in fields or "numbers" in fields:
        raise UserError(f"{where}: a row of numbers and a target; grade it with file:PATH:countdown")
    for name in ("context", "passage", "image", "images"):
        if fields.get(name):
            raise UserError(f"{where}: {name} is not supported; put it into the question, "
                            "or leave the row out")
    question = fields.get("question")
    answer = as_text(fields.get("answer"))
    choices = fields.get("choices")
    if not isinstance(question, str) or not question.strip() or answer is None:
        raise UserError(f"{where}: question must be text, and answer text or a number (found: "
                        f"{', '.join(fields)}); python convert.py FILE makes published data ours")
    if choices or check is check_choice:
        well_formed = isinstance(choices, dict) and all(isinstance(text, str) for text in choices.values())
        if not well_formed or "" in choices:
            raise UserError(f"{where}: choices must be an object of texts, such as {{\"A\": \"mall\"}}")
        if answer not in choices:
            raise UserError(f"{where}: the answer {answer[:40]!r} is none of the choices "
                            f"{', '.join(choices)}")
        listed = "".join(f"\n{label}. {text}" for label, text in choices.items())
        asked = f"{question}{listed}\nThe answer is the letter of the best choice."
        return identity_of(fields), asked, {"answer": answer, "choices": choices}
    flaw = flaw_of(answer, check)
    if flaw:
        raise UserError(f"{where}: the answer {answer[:40]!r} {flaw}")
    return identity_of(fields), question, {"answer": answer}


def identity_of(fields: dict) -> str:
    """A hash of what a row asks, whatever its white space, its form of Unicode, the order of its choices."""
    choices = fields.get("choices")
    texts = sorted(map(str, choices.values())) if isinstance(choices, dict) else []
    texts.insert(0, str(fields.get("question")))
    normal = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    return fingerprint("\n".join(normal))


def as_text(answer) -> str | None:
    """An answer that may be a number of JSON, as text; None for anything else."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, float):
        if not math.isfinite(answer):
            return None
        return str(int(answer)) if answer.is_integer() else f"{Decimal(repr(answer)):f}"  # not 1e-07
    return str(answer)


def flaw_of(answer: str, check: Check) -> str:
    """Why no response could be graded by this right answer, or ""."""
    if not unwrap(answer):
        return "is empty"
    if "####" in answer:
        return "has GSM8K's #### in it; python convert.py FILE makes it ours"
    if check is check_integer and integer_of(unwrap(answer), percent=True) is None:
        return "is not an integer; grade with file:PATH:math or :exact"
    if check is check_math and flaw_of_gold(answer):
        return (f"cannot be compared with others: {flaw_of_gold(answer)}; leave this row out, "
                "or all such rows: python convert.py FILE --math")
    return ""


def same_answer(check: Check, truth: dict, other: dict) -> bool:
    """Whether two rows that ask the same have the same answer, in whatever spelling."""
    if "numbers" in truth:  # countdown: there are many
        return True
    texts = [t["choices"][t["answer"]] if "choices" in t else t["answer"] for t in (truth, other)]
    return not check(texts[1], truth) or not check(texts[0], other)
