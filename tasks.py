"""Problems and prompts. Pure Python.

    task = find("countdown-3")
    problem = task.problems("test", 1, seed=0)[0]
    task.prompt(problem, "plan")                                        # messages for a chat model
    task.grade(problem, "... <answer>(2 + 3) * 20</answer>")            # Grade(correct, answer, reason)

Which split a problem belongs to is decided by a hash of its content, so no seed, no number of questions and
no order of a file's rows can put a problem that was trained on into a test. To add a task of your own, write
a class like `Multiply` and name it in GENERATED; a file of questions needs no code (file:PATH).

Left out: downloading data sets (they are read from --data-dir; `convert.py` brings published ones in shape).
"""
import json
import math
import os
import random
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase

from grading.answers import Check, attempts_in, extract_answer, thoughts_in, unwrap
from grading.checkers import (
    OPERATORS, check_choice, check_countdown, check_exact, check_integer, check_word, dictionary, integer_of,
)
from grading.math import check_math, flaw_of_gold
from run.command import UserError, location, natural, refuse_repeated, say, split_list
from run.files import fingerprint, read_jsonl


@dataclass(frozen=True)
class Problem:
    id: str
    task: str
    question: str
    truth: dict  # what the checker needs, and "answer", one right answer as text ("" if none is known)


@dataclass(frozen=True)
class Grade:
    correct: bool
    answer: str | None
    reason: str  # "" if correct


# ---- wording -------------------------------------------------------------------------------------
MUST_ANSWER = ("However you work, your reply must end with a final answer between <answer> and </answer>. "
               "A reply without it is worth nothing.")
ENDING = "Put your final answer between <answer> and </answer>."
INSTRUCT = ("Work inside <think> and </think>. "
            "There, write an attempt between <sample> and </sample> with an <answer>, "
            "then check it between <reflect> and </reflect> and end the check with "
            "<verdict>Correct</verdict> or <verdict>Incorrect</verdict>. "
            "Add further attempts and checks until you are sure. After </think>: ")
REPHRASE = "Restate the question first, keeping only what is needed, then solve it. "
ALTERNATIVES = 'Propose several candidates, open each new one with "Alternatively,", weigh them and choose. '
STYLES = {  # name: (system turn or None, instruction after the question)
    "plain": (None, "Think step by step. " + ENDING),
    "plan": (MUST_ANSWER, "Write a short plan first, then carry it out. " + ENDING),
    "alternatives": (MUST_ANSWER, ALTERNATIVES + ENDING),
    "rephrase": (MUST_ANSWER, REPHRASE + ENDING),
    # The arm without training: the prompt explains the tags of the traces instead (an ablation of the paper).
    "instruct": (MUST_ANSWER, INSTRUCT + ENDING),
}
HINT = ("Hint: the answer is {answer}. "
        "Show the steps that lead there as your own work, and do not mention this hint.")
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

Now check the attempt above: work it out again, take nothing on trust, and compare. \
Be brief. Your reply must end with one of these two lines:
<verdict>Incorrect</verdict>
<verdict>Correct</verdict>"""
# Words of the prompt's worked example: a reflection that holds one was copied from it.
REFLECT_LEAKS = ("Canberra", "Sydney")


def reflection_prompt(question: str, attempt: str) -> list[dict]:
    """Chat messages that ask to check an attempt."""
    return [{"role": "user", "content": REFLECT.format(question=question, attempt=attempt.strip())}]


# ---- what all tasks share ------------------------------------------------------------------------
class Task:
    """A task has a name, `problems(split, n, seed)` and `check(answer, truth)` -> "" if right, or why not."""
    name: str
    check: Check

    @staticmethod
    def prompt(problem: Problem, style: str = "plain", hint: bool = False) -> list[dict]:
        """Chat messages that ask the problem in one of the STYLES.

        `hint` tells the right answer (rationalisation).
        """
        system, instruction = STYLES[style]
        content = f"{problem.question}\n\n{instruction}"
        if hint and not problem.truth["answer"]:
            raise UserError(f"--hint: the rows of {problem.task} have no right answer to tell")
        if hint:
            content += "\n" + HINT.format(answer=problem.truth["answer"])
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def grade(self, problem: Problem, text: str, lenient: bool = False) -> Grade:
        answer, why_none = extract_answer(text, lenient)
        if answer is None:
            return Grade(correct=False, answer=None, reason=why_none)
        why_wrong = self.check(answer, problem.truth)
        return Grade(correct=not why_wrong, answer=answer, reason=why_wrong)

    def shown(self, problem: Problem, text: str, tokens: int, finish: str) -> dict:
        """What is written down of a response: its text, grade and skills."""
        grade = self.grade(problem, text)
        return {"response": text, "tokens": tokens, "finish": finish, "answer": grade.answer,
                "correct": grade.correct, "reason": grade.reason, **self.skills(problem, text)}

    def skills(self, problem: Problem, response: str) -> dict:
        """What a response shows of the skills: answers, reflections, the grade of each attempt, and each
        verdict with the grade that it judged.

        The answers are those inside <think> (outside is only the final one); without <think>, all.
        Reflections are counted in the whole text. A response without a closed <sample> is one attempt.
        """
        attempts = []
        verdicts = []  # (said, actual)
        for attempt in attempts_in(response):
            correct = self.grade(problem, attempt.text).correct
            attempts.append(correct)
            if attempt.said is not None:
                verdicts.append((attempt.said, correct))
        return {
            "answers": sum(thought.count("</answer>") for _, thought in thoughts_in(response)),
            "reflections": response.count("<reflect>"),
            "attempts": attempts or [self.grade(problem, response).correct],
            "verdicts": verdicts,
        }

    def _check_split(self, split, known):
        if split not in known:
            raise UserError(f"{self.name} has no split {split!r}; it has {', '.join(known)}")


# Hundredths of the hash space. `pretrain` is what the miniature's base was trained on: no other split can
# meet it.
SPLITS = {
    "pretrain": range(0, 40),
    "sft": range(40, 60),
    "rl": range(60, 80),
    "val": range(80, 85),
    "test": range(85, 100),
}


def hundredth(identity: str) -> int:
    """The hash of a problem's identity, 0..99, which decides its split."""
    return int(fingerprint(identity), 16) % 100


# ---- tasks that make their problems --------------------------------------------------------------
class Generated(Task):
    """A task that makes its problems: `make(rng)` -> (identity, question, truth), or None for a bad draw.

    The identity is what makes two problems the same one, whatever their wording. `kind` and the sizes give
    the names: countdown-2, ... A small variant (countdown-2-small) is in the miniature's range.
    """
    kind: str
    sizes: tuple[int, ...]
    small_sizes: tuple[int, ...] = ()

    def __init__(self, size: int, small: bool = False):
        self.size = size
        self.small = small
        self.name = f"{self.kind}-{size}" + ("-small" if small else "")

    def problems(self, split: str, n: int, seed: int = 0) -> list[Problem]:
        """n different problems of a split; the same for the same seed."""
        self._check_split(split, SPLITS)
        if n < 1:
            raise UserError(f"{self.name} makes its questions, so there is no \"all\" of them; "
                            "ask for at least 1")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found = {}
        idle = 0  # draws since the last new problem
        while len(found) < n:
            idle += 1
            if idle > 20_001:
                raise UserError(f"{self.name} has only about {len(found)} different problems in the split "
                                f"{split}, {n} were asked for; ask for fewer")
            made = self.make(rng)
            if made is None:
                continue
            identity, question, truth = made
            if identity not in found and hundredth(identity) in SPLITS[split]:
                found[identity] = Problem(f"{self.name}/{identity}", self.name, question, truth)
                idle = 0
        return list(found.values())


class Countdown(Generated):
    kind = "countdown"
    sizes = small_sizes = (2, 3, 4, 5, 6)
    check = staticmethod(check_countdown)

    def make(self, rng):
        largest, targets = (12, range(10, 61)) if self.small else (100, range(100, 1000))
        numbers = [rng.randint(1, largest) for _ in range(self.size)]
        solved = self.solve_at_random(numbers, rng)
        if solved is None:
            return None
        target, solution = solved
        if target not in targets:
            return None
        rng.shuffle(numbers)
        return *self.wording(numbers, target), {"answer": solution, "numbers": numbers, "target": target}

    @staticmethod
    def wording(numbers, target):
        """(identity, question)"""
        identity = f"{','.join(map(str, sorted(numbers)))}={target}"
        question = (f"Numbers: {' '.join(map(str, numbers))}\nTarget: {target}\n"
                    "Reach the target with + - * / and parentheses, using every number exactly once. "
                    "Work by hand, without code. The answer is one expression.")
        return identity, question

    @classmethod
    def from_row(cls, fields, where):
        """(identity, question, truth) of a file's row {nums, target}, as of the published Countdown sets."""
        numbers = fields.get("nums", fields.get("numbers"))
        target = fields.get("target")
        whole = [target, *numbers] if isinstance(numbers, list) and numbers else [None]
        if not all(type(number) is int and number >= 0 for number in whole):
            raise UserError(f"{where}: expected nums, a list of whole numbers, and target, a whole number")
        truth = {"answer": str(fields.get("answer") or ""), "numbers": numbers, "target": target}
        if truth["answer"] and check_countdown(truth["answer"], truth):
            raise UserError(f"{where}: the answer {truth['answer']!r} is wrong; fix it or leave it out")
        return *cls.wording(numbers, target), truth

    def solve_at_random(self, numbers, rng):
        """(value, expression) of the numbers joined at random, which makes that value a solvable target."""
        pool = [(value, str(value)) for value in numbers]
        while len(pool) > 1:
            # The miniature's problems are chains: each step goes on from the last result. The others may join
            # any two.
            a, a_text = pool.pop() if self.small else pool.pop(rng.randrange(len(pool)))
            b, b_text = pool.pop(rng.randrange(len(pool)))
            symbol = rng.choice("+-*" if self.small else "+-*/")
            if symbol == "/" and (b == 0 or a % b):
                return None
            value = int(OPERATORS[symbol](a, b))  # exact: no division leaves a remainder
            if value < 0 or (self.small and value > 60):
                return None
            pool.append((value, f"({a_text} {symbol} {b_text})"))
        value, expression = pool[0]
        return value, expression[1:-1]  # without the outer parentheses


class Letters(Generated):
    kind = "letters"
    sizes = (4, 5)
    check = staticmethod(check_word)

    def make(self, rng):
        hidden = rng.choice(common_words(self.size))
        distractors = [rng.choice(ascii_lowercase) for _ in range(rng.randint(0, 4))]
        letters = [*hidden, *distractors]
        rng.shuffle(letters)
        question = (f"Letters: {' '.join(letters)}\n"
                    f"Make an English word of {self.size} to 8 letters out of these, "
                    "using each letter at most as often as it is given.")
        truth = {"answer": hidden, "letters": "".join(letters), "least": self.size, "ordered": False}
        return "".join(sorted(letters)), question, truth


class Acronym(Generated):
    kind = "acronym"
    sizes = (4, 5)
    check = staticmethod(check_word)

    def make(self, rng):
        hidden = rng.choice(common_words(self.size))
        initials = list(hidden)
        for _ in range(rng.randint(0, 8 - self.size)):
            initials.insert(rng.randint(0, len(initials)), rng.choice("abcdefghijklmnoprstw"))
        words = []
        for letter in initials:
            if not words_by_initial()[letter]:
                return None
            words.append(rng.choice(words_by_initial()[letter]))
        question = (f"Words: {' '.join(words)}\n"
                    "Take first letters of these words, in order and leaving out as many words as you like, "
                    f"so that they spell an English word of at least {self.size} letters. "
                    "The answer is that word.")
        truth = {"answer": hidden, "letters": "".join(initials), "least": self.size, "ordered": True}
        return " ".join(words), question, truth


@lru_cache
def common_words(length: int | None) -> list[str]:
    """The dictionary's common words of one length (None: of all)."""
    words = [word for word, common in dictionary().items() if common]
    if length is None:
        return words
    return [word for word in words if len(word) == length]


@lru_cache
def words_by_initial() -> dict[str, list[str]]:
    words = {initial: [] for initial in ascii_lowercase}
    for word in common_words(None):
        words[word[0]].append(word)
    return words


class Multiply(Generated):
    kind = "multiply"
    sizes = (2, 3, 4, 5)
    small_sizes = (2,)
    check = staticmethod(check_integer)

    def make(self, rng):
        low, high = (2, 12) if self.small else (10 ** (self.size - 1), 10**self.size - 1)
        a, b = rng.randint(low, high), rng.randint(low, high)
        identity = f"{min(a, b)}*{max(a, b)}"
        return identity, f"What is {a} * {b}?", {"answer": str(a * b)}


GENERATED = (Countdown, Letters, Acronym, Multiply)


# ---- a row of a file of questions ----------------------------------------------------------------
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
                        f"{', '.join(fields)}); python convert.py FILE converts published data")
    if choices or check is check_choice:
        well_formed = isinstance(choices, dict) and all(isinstance(text, str) for text in choices.values())
        if not well_formed or "" in choices:
            raise UserError(f"{where}: choices must be an object of texts, such as {{\"A\": \"mall\"}}")
        if answer not in choices:
            raise UserError(f"{where}: the answer {answer[:40]!r} is none of the choices "
                            f"{', '.join(choices)}")
        listed = "".join(f"\n{label}. {text}" for label, text in choices.items())
        with_choices = f"{question}{listed}\nThe answer is the letter of the best choice."
        return identity_of(fields), with_choices, {"answer": answer, "choices": choices}
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
        return "has GSM8K's #### in it; python convert.py FILE converts it"
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


# ---- tasks that are files ------------------------------------------------------------------------
class FromFile(Task):
    """A set that is a JSONL file of {question, answer}, with `choices` for multiple choice (`read_question`).

    `files` names the file of each split, `hundredths` the part of it that a split takes: a set with one
    training file divides it between sft, rl and val. `source` says where to get it. A problem is what it
    asks: copies are left out, and nothing depends on ids, on the order of rows or on the place of the file.
    """

    def __init__(self, name, checker, files, hundredths, data_dir, source=""):
        self.name = name
        self.key = name.partition(":")[0]  # without the path
        self.checker = checker
        self.files = files
        self.hundredths = hundredths
        self.data_dir = Path(data_dir)
        self.source = source
        self.cache = {}  # path: {identity: Problem}

    def check(self, answer: str, truth: dict) -> str:
        return check_choice(answer, truth) if "choices" in truth else self.checker(answer, truth)

    def problems(self, split: str, n: int, seed: int = 0) -> list[Problem]:
        """n problems of a split (0: all of them); the same for the same seed."""
        self._check_split(split, self.files)
        if self.checker is check_math and not find_spec("math_verify"):  # now, not after an hour of sampling
            raise UserError("grading math needs the math-verify library: "
                            "pip install math-verify[antlr4_13_2]")
        found = self._problems_of(self.files[split])
        if split in self.hundredths:
            taken = self.hundredths[split]
            found = {identity: p for identity, p in found.items() if hundredth(identity) in taken}
        if split != "test" and self.source:
            in_test = test_identities(self.data_dir)
            found = {identity: p for identity, p in found.items() if identity not in in_test}
        if not found:
            raise UserError(f"{self.name} has no question in the split {split}; "
                            f"its splits are {', '.join(self.files)}")
        if n > len(found):
            raise UserError(f"{self.name} has {len(found)} questions in the split {split}, "
                            f"{n} were asked for; ask for fewer (0 takes all)")
        rng = random.Random(f"{self.key}/{split}/{seed}")
        return [found[identity] for identity in rng.sample(sorted(found), n or len(found))]

    def _problems_of(self, file):
        """{identity: Problem} of a file, without copies."""
        path = self.data_dir / file
        if path in self.cache:
            return self.cache[path]
        if self.source and not path.is_file():
            raise UserError(f"{path}: no such file; {self.name} is not downloaded for you: {self.source}, "
                            "or point --data-dir at it")
        found = self.cache[path] = {}
        copies = 0
        for where, fields in read_jsonl(path):
            if self.checker is check_countdown:
                identity, question, truth = Countdown.from_row(fields, where)
            else:
                identity, question, truth = read_question(fields, self.checker, where)
            problem = Problem(f"{self.key}/{identity}", self.name, question, truth)
            known = found.setdefault(identity, problem)
            copies += known is not problem
            if not same_answer(self.check, known.truth, truth):
                raise UserError(f"{where}: an earlier row asks the same and has another answer; remove one")
        if copies:
            say(f"{path}: left out {copies} rows that repeat a question")
        labels = [p.truth["answer"] for p in found.values() if "choices" in p.truth]
        if len(labels) > 1 and len(set(labels)) == 1:
            say(f"{path}: warning: the right choice is {labels[0]} in all rows; shuffle the choices")
        return found


TRAIN = {"sft": "train.jsonl", "rl": "train.jsonl", "val": "train.jsonl"}
TRAIN_HUNDREDTHS = {"sft": range(0, 45), "rl": range(45, 90), "val": range(90, 100)}
# The same for file:PATH, which also has a split `all`, the whole file.
OWN_HUNDREDTHS = {"sft": range(0, 40), "rl": range(40, 80), "val": range(80, 85), "test": range(85, 100)}
NOT_OPEN = "its text is not openly licensed; convert.py brings the published rows into shape"
FILES = {  # name: (checker, {split: file}, where to get it)
    "gsm8k": (check_integer, {**TRAIN, "test": "test.jsonl"},
              "github.com/openai/grade-school-math; convert.py brings it into shape"),
    "csqa": (check_choice, {**TRAIN, "test": "dev.jsonl"},
             "CommonsenseQA 1.11; convert.py brings it into shape; test is its dev file"),
    "math500": (check_math, {"test": "test.jsonl"},
                "github.com/openai/prm800k, math_splits/test; convert.py brings it into shape"),
    "aime": (check_integer, {"test": "test.jsonl"}, NOT_OPEN),
    "amc": (check_integer, {"test": "test.jsonl"}, NOT_OPEN),
    "gpqa": (check_choice, {"test": "test.jsonl"},
             "its licence asks not to publish it; convert.py brings its CSV file into shape"),
    "openthoughts": (check_math, TRAIN, "OpenThoughts on the hub; convert.py brings it into shape"),
}


@lru_cache
def test_identities(data_dir: Path) -> set[str]:
    """The questions of all test sets that are there: none is trained on, whatever set it is also in."""
    found = set()
    for name, (_, files, _) in FILES.items():
        path = data_dir / name / files.get("test", "")
        if path.is_file():
            found.update(identity_of(fields) for _, fields in read_jsonl(path))
    return found


OWN_GRADINGS = {"exact": check_exact, "integer": check_integer, "math": check_math, "choice": check_choice,
                "countdown": check_countdown}


# ---- names ---------------------------------------------------------------------------------------
def generated() -> dict[str, Task]:
    """The tasks that make their problems, by name."""
    made = []
    for kind in GENERATED:
        made += [kind(size) for size in kind.sizes] + [kind(size, small=True) for size in kind.small_sizes]
    return {task.name: task for task in made}


NAMES = ", ".join([*generated(), *FILES, f"file:PATH[:{'|:'.join(OWN_GRADINGS)}]"])  # for --help and errors


def question_flags(p, split: str, paper: int) -> None:
    """Add the flags that say what is asked, to a parser of argparse or a group of one."""
    location(p.add_argument("--task", default="countdown-3-small", help=f"with commas between: {NAMES}"))
    p.add_argument("--questions", type=natural, default=400, help=f"of each task; 0: all (paper: {paper})")
    p.add_argument("--split", default=split, help=f"{', '.join(SPLITS)}; of a file: also all")
    location(p.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/, math500/ and such lie"))


def find(name: str, data_dir: str | Path = "data") -> Task:
    """The task of a name. Raises UserError that lists the names."""
    if name in generated():
        return generated()[name]
    if name in FILES:
        check, files, source = FILES[name]
        files = {split: os.path.join(name, file) for split, file in files.items()}
        return FromFile(name, check, files, TRAIN_HUNDREDTHS, data_dir, source)
    if name.startswith("file:"):
        return _own_file(name)
    raise UserError(f"task {name}: unknown; the tasks are {NAMES}")


def _own_file(name):
    """file:PATH or file:PATH:GRADING, a user's own questions."""
    rest = name.removeprefix("file:")
    path, colon, grading = rest.rpartition(":")
    if grading not in OWN_GRADINGS:
        if colon and grading.isalpha() and not os.path.exists(rest):
            raise UserError(f"task {name}: no grading {grading!r}; there are {', '.join(OWN_GRADINGS)}")
        path, grading = rest, "exact"
    path = os.path.normpath(path)
    name = f"file:{path}" if grading == "exact" else f"file:{path}:{grading}"
    files = dict.fromkeys([*OWN_HUNDREDTHS, "all"], os.path.abspath(path))
    return FromFile(name, OWN_GRADINGS[grading], files, OWN_HUNDREDTHS, data_dir="")


def find_all(names: str, data_dir: str | Path = "data", flag: str = "--task") -> list[Task]:
    """The tasks of a comma-separated list, each once."""
    found = [find(name, data_dir) for name in split_list(names, flag)]
    refuse_repeated([task.name for task in found], f"{flag} {names}")  # two spellings of one path
    return found


def problems_of(found: list[Task], split: str, n: int, seed: int) -> list[tuple[Task, Problem]]:
    """n problems of each task, without those that an earlier task has too."""
    if split == "test":
        say("warning: these are the questions that evaluate.py asks; nothing should be trained on them")
    problems = {}
    repeated = 0
    for task in found:
        for problem in task.problems(split, n, seed):
            repeated += problem.id in problems
            problems.setdefault(problem.id, (task, problem))
    if repeated:
        say(f"left out {repeated} questions that an earlier task has too")
    return list(problems.values())


def questions_fingerprint(problems: Iterable[tuple[Task, Problem]]) -> str:
    """Of questions, how each is graded, and their order."""
    rows = []
    for task, problem in problems:
        grading = getattr(task, "checker", type(task)).__name__
        rows.append([grading, problem.id, problem.question, problem.truth])
    return fingerprint(json.dumps(rows))
