"""The miniature's base has never seen what SkillFactory teaches: no document retries or chains anything."""
import importlib.util
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import MINI, ROOT

import tasks
from checkpoint import load
from grading.answers import TRACE_TAGS
from rearrange import PHRASES

spec = importlib.util.spec_from_file_location("pretrain", ROOT / "mini" / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
sys.modules["pretrain"] = pretrain  # its dataclasses look themselves up there
spec.loader.exec_module(pretrain)

# What happens in a document, in order. A `chain` is a block of lines that compute; `copy` is the last answer
# once more, in lines of its own.
EVENT = re.compile(
    r"Numbers: (?P<numbers>[\d ]+)\nTarget: (?P<target>\d+)"
    r"|What is (?P<expression>[\d ()*+-]+)\?"
    r"|As one expression:\n(?P<lines>(?:\d+ [*+-] \d+ = \d+\n)+)"
    r"|(?P<chain>(?:^\d+ [*+-] \d+ = \d+.*\n)+)"
    r"|<answer>(?P<answer>[^\n<]+)</answer>"
    r"|<verdict>(?P<verdict>\w+)</verdict>"
    r"|<answer>\n(?P<copy>[^\n]+)\n</answer>", re.MULTILINE)
QUESTIONS = ("target", "expression", "lines")


def story(messages, response):
    """The whole document, without the examples in the check's prompt and the tags that prompts explain."""
    told = "\n".join(message["content"] for message in messages).partition("\n\nTwo examples of a check")[0]
    return told.replace("between <answer> and </answer>", "") + "\n" + response


def numbers_in(text):
    """Those of a question, an expression or a block of lines, sorted; without what a line has computed."""
    text = text.partition("\nTarget")[0]
    text = re.sub(r", (left [\d ]+|none left)", "", text)
    return tuple(sorted(map(int, re.findall(r"\d+", re.sub(r"= \d+(\n\d+ |\n?$)", "", text)))))


def slip(numbers, open_questions):
    """Whether they are the waiting question's with one exchanged, by chance for those of another question."""
    return bool(open_questions) and (Counter(open_questions[-1]) - Counter(numbers)).total() == 1


def breach(text):
    """What in a document goes beyond single attempts and single checks; "" if nothing does."""
    events = [(match.lastgroup, match[0]) for match in EVENT.finditer(text)]
    kinds = [kind for kind, _ in events]
    open_questions = []  # the numbers of each question that is not answered yet; other exercises come between
    asked = []
    answered = set()
    for i, (kind, found) in enumerate(events):
        after = kinds[i + 1] if i + 1 < len(kinds) else None
        numbers = numbers_in(found)
        if kind in QUESTIONS:
            asked.append(numbers)
            open_questions.append(numbers)
        elif kind == "chain":
            if after not in ("answer", "verdict"):
                return "lines that lead to no answer and no verdict"
            if after == "answer" and numbers in answered and not slip(numbers, open_questions):
                return "attempted again"
        elif kind == "answer":
            if not open_questions:
                return "an answer without a question"
            if numbers in set(asked) - {open_questions[-1]} and not slip(numbers, open_questions):
                return "an answer to another question"
            answered.add(open_questions.pop())
        elif kind == "verdict":
            if kinds[max(0, i - 2):i] != ["answer", "chain"]:
                return "a verdict on nothing"
        elif kind == "copy" and after:
            return "something after the copy"
    if open_questions:
        return "a question without an answer"
    return "" if len(set(asked)) == len(asked) >= 1 else "the same numbers asked about twice"


QUESTION = "Numbers: 3 4\nTarget: 12\n\n"
LINES = "3 * 4 = 12, none left\n"
ATTEMPT = LINES + "<answer>3 * 4</answer>\n"
CHECK = "3 * 4 = 12\n<verdict>Correct</verdict>\n"


@pytest.mark.parametrize("text, found", [
    (QUESTION + ATTEMPT + CHECK, ""),
    (QUESTION + ATTEMPT + ATTEMPT, "attempted again"),
    (QUESTION + ATTEMPT + "What is 5 * 6?\n<answer>3 * 4</answer>\n", "an answer to another question"),
    (QUESTION + ATTEMPT + LINES, "lines that lead to no answer and no verdict"),
    (QUESTION + ATTEMPT + CHECK + CHECK, "a verdict on nothing"),
    (QUESTION + ATTEMPT + "<answer>7</answer>\n", "an answer without a question"),
    (QUESTION + ATTEMPT + "What is 4 * 3?\n<answer>12</answer>\n", "the same numbers asked about twice"),
    (QUESTION, "a question without an answer"),
    (QUESTION + ATTEMPT + "<answer>\n3 * 4\n</answer>\n" + CHECK, "something after the copy"),
])
def test_a_breach_is_found(text, found):
    """Each way to go beyond single attempts, so that the search of the documents means something."""
    assert breach(text) == found


GLUE = [text for texts in PHRASES.values() for text in texts]


def test_no_document_holds_what_the_method_teaches():
    """In 20,000 documents: an answer belongs to the question that waits for it, a verdict to the answer just
    before it, nothing is computed but for these, no numbers are asked about twice, and neither tags nor
    phrases of traces occur. No problem is one that other commands train or test on."""
    author = pretrain.Author(seed=1)
    elsewhere = set()
    for name in ("countdown-3-small", "countdown-4-small"):
        for split in ("sft", "rl", "val", "test"):
            for problem in tasks.find(name).problems(split, 100):
                elsewhere.add((numbers_in(problem.question), problem.truth["target"]))
    taught = re.compile("|".join(map(re.escape, [*TRACE_TAGS, *GLUE])))
    sheets = 0
    for _ in range(20_000):
        messages, response = author.document()
        text = story(messages, response.replace(pretrain.GAP, ""))
        assert not taught.search(text), text
        assert not breach(text), (breach(text), text)
        for numbers, target in re.findall(r"Numbers: ([\d ]+)\nTarget: (\d+)", text):
            assert (tuple(sorted(map(int, numbers.split()))), int(target)) not in elsewhere
        sheets += any(sheet in text for sheet in pretrain.SHEETS)
    assert 9_000 < sheets < 11_000


def test_the_tags_are_told_apart():
    """Tokens that no document holds once were one vector (cosine 1.00), and fine-tuning mixed up the tags."""
    model, tokenizer = load(MINI)
    between, announcing = pretrain.trace_lines()
    tags = [i for line in between for i in tokenizer.encode(line)]
    assert len(tags) == len(between) and len(tokenizer.encode("".join(announcing))) == len(announcing)
    vectors = torch.nn.functional.normalize(model.model.embed_tokens.weight[tags], dim=1)
    assert (vectors @ vectors.T - torch.eye(len(tags))).max() < 0.9
