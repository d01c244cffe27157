"""Problems and prompts. Pure Python.

    task = find("countdown-3")
    problem = task.problems("test", 1, seed=0)[0]
    task.prompt(problem, "plan")                                        # messages for a chat model
    task.grade(problem, "... <answer>(2 + 3) * 20</answer>")            # Grade(correct, answer, reason)

Which split a generated problem belongs to is decided by a hash of its content, so no seed and no number of
questions can put a problem that was trained on into a test. To add a task of your own, write a class like
`Multiply` and name it in GENERATED; a file of questions needs no code (file:PATH).

Left out: downloading data sets (they are read from --data-dir), GPQA's choice shuffling.
"""
import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase

from cli import UserError, read_jsonl
from grading import (
    OPERATORS, check_choice, check_countdown, check_exact, check_integer, check_math, check_word,
    dictionary, extract_answer, integer_of, load_math_verify,
)


@dataclass(frozen=True)
class Problem:
    id: str
    task: str
    question: str
    truth: dict  # what the checker needs; always holds "answer", one right answer as text


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
    check: Callable[[str, dict], str]

    @staticmethod
    def prompt(problem: Problem, style: str = "plain", hint: bool = False) -> list[dict]:
        """Chat messages that ask the problem in one of the STYLES.

        `hint` tells the right answer (rationalisation).
        """
        system, instruction = STYLES[style]
        content = f"{problem.question}\n\n{instruction}"
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
    """Where in the hash space (0..99) the identity of a problem falls."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") % 100


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
        identity = f"{','.join(map(str, sorted(numbers)))}={target}"
        question = (f"Numbers: {' '.join(map(str, numbers))}\nTarget: {target}\n"
                    "Reach the target with + - * / and parentheses, using every number exactly once. "
                    "Work by hand, without code. The answer is one expression.")
        return identity, question, {"answer": solution, "numbers": numbers, "target": target}

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
            value = int(OPERATORS[symbol](a, b))  # exact: a division with a rest was refused
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


# ---- tasks that are files ------------------------------------------------------------------------
class FromFile(Task):
    """A set that is a JSONL file of {id, question, answer}, with `choices` for multiple choice.

    `files` names the file of each split, `hundredths` the part of it (by a hash of the row's id) that a split
    takes: a set with one training file divides it between sft, rl and val. `source` says where to get it.
    """

    def __init__(self, name, check, files, hundredths, data_dir, source=""):
        self.name = name
        self.check = check
        self.files = files
        self.hundredths = hundredths
        self.data_dir = Path(data_dir)
        self.source = source

    def problems(self, split: str, n: int, seed: int = 0) -> list[Problem]:
        """n problems of a split (0: all of them); the same for the same seed."""
        self._check_split(split, self.files)
        path = self.data_dir / self.files[split]
        if not path.is_file():
            where = f": {self.source}, or point --data-dir at it" if self.source else ""
            raise UserError(f"{path}: no such file; {self.name} is not downloaded for you{where}")
        if self.check is check_math:
            load_math_verify()  # now, not after an hour of sampling
        rows = self._read(path)
        if split in self.hundredths:
            taken = self.hundredths[split]
            rows = {identity: row for identity, row in rows.items() if hundredth(identity) in taken}
        if n > len(rows):
            raise UserError(f"{self.name} has {len(rows)} questions in the split {split}, "
                            f"{n} were asked for; ask for fewer (0 takes all)")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        chosen = rng.sample(sorted(rows), n or len(rows))
        return [self._problem(identity, rows[identity]) for identity in chosen]

    def _read(self, path):
        """{id: row}, each row checked: a set that cannot be graded is refused with file and row."""
        rows = {}
        for number, row in enumerate(read_jsonl(path, ("question", "answer")), 1):
            where = f"{path}: row {number}"
            question, answer, choices = row["question"], row["answer"], row.get("choices") or {}
            identity = str(row.get("id", number))
            if not isinstance(question, str) or not isinstance(answer, (str, int)):
                raise UserError(f"{where}: question must be text, and answer text or an integer")
            if not isinstance(choices, dict) or not all(isinstance(text, str) for text in choices.values()):
                raise UserError(f"{where}: choices must be an object of texts, such as {{\"A\": \"mall\"}}")
            answer = str(answer)
            if self.check is check_integer and integer_of(answer) is None:
                raise UserError(f"{where}: the answer {answer[:40]!r} is not an integer; "
                                "grade with file:PATH:exact or :math")
            if choices and answer not in choices:
                raise UserError(f"{where}: the answer {answer[:40]!r} is none of the choices "
                                f"{', '.join(choices)}")
            if identity in rows:
                raise UserError(f"{where}: the id {identity!r} is there twice")
            rows[identity] = {"question": question, "answer": answer, "choices": choices}
        return rows

    def _problem(self, identity, row):
        question = row["question"]
        truth = {"answer": row["answer"]}
        if row["choices"]:
            listed = "".join(f"\n{letter}. {text}" for letter, text in row["choices"].items())
            question += f"{listed}\nThe answer is the letter of the best choice."
            truth["choices"] = row["choices"]
        return Problem(f"{self.name}/{identity}", self.name, question, truth)


TRAIN = {"sft": "train.jsonl", "rl": "train.jsonl", "val": "train.jsonl"}
TRAIN_HUNDREDTHS = {"sft": range(0, 45), "rl": range(45, 90), "val": range(90, 100)}
# The same for file:PATH, which also has a split `all`, the whole file.
OWN_HUNDREDTHS = {"sft": range(0, 40), "rl": range(40, 80), "val": range(80, 85), "test": range(85, 100)}
NOT_OPEN = "its text is not openly licensed; bring your own rows {id, question, answer}"
FILES = {  # name: (checker, {split: file}, where to get it)
    "gsm8k": (check_integer, {**TRAIN, "test": "test.jsonl"},
              "github.com/openai/grade-school-math, as rows {id, question, answer} with the final integer as "
              "answer"),
    "csqa": (check_choice, {**TRAIN, "test": "dev.jsonl"},
             "CommonsenseQA 1.11, as rows {id, question, choices, answer}; test is its dev file"),
    "math500": (check_math, {"test": "test.jsonl"},
                "github.com/openai/prm800k, math_splits/test, as rows {id, question, answer}"),
    "aime": (check_integer, {"test": "test.jsonl"}, NOT_OPEN),
    "amc": (check_integer, {"test": "test.jsonl"}, NOT_OPEN),
    "gpqa": (check_choice, {"test": "test.jsonl"},
             "its licence asks not to publish it; bring your own rows {id, question, choices, answer}"),
    "openthoughts": (check_math, TRAIN, "OpenThoughts on the hub, as rows {id, question, answer}"),
}
OWN_GRADINGS = {"exact": check_exact, "integer": check_integer, "math": check_math}


# ---- names ---------------------------------------------------------------------------------------
def _sizes(sizes):
    """(2, 3, 4) -> "2..4";  (4, 5) -> "4/5"."""
    if len(sizes) > 2:
        return f"{sizes[0]}..{sizes[-1]}"
    return "/".join(map(str, sizes))


def _names():
    names = []
    for task in GENERATED:
        name = f"{task.kind}-{_sizes(task.sizes)}"
        if task.small_sizes:
            name += f" and {task.kind}-{_sizes(task.small_sizes)}-small"
        names.append(name)
    return ", ".join([*names, *FILES, f"file:PATH[{'|'.join(f':{grading}' for grading in OWN_GRADINGS)}]"])


NAMES = _names()  # for --help and for errors


def find(name: str, data_dir: str | Path = "data") -> Task:
    """The task of a name. Raises UserError that lists the names."""
    for task in GENERATED:
        for size in task.sizes:
            if name == f"{task.kind}-{size}":
                return task(size)
        for size in task.small_sizes:
            if name == f"{task.kind}-{size}-small":
                return task(size, small=True)
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
    path, _, grading = rest.rpartition(":")
    if not path or grading not in OWN_GRADINGS:
        path, grading = rest, "exact"
    files = dict.fromkeys([*OWN_HUNDREDTHS, "all"], os.path.abspath(path))
    return FromFile(name, OWN_GRADINGS[grading], files, OWN_HUNDREDTHS, data_dir="")


def find_all(names: str, data_dir: str | Path = "data") -> list[Task]:
    """The tasks of a comma-separated list."""
    return [find(name.strip(), data_dir) for name in names.split(",")]
