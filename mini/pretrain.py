"""Train the miniature: a base model that attempts small number problems once and judges one when asked.

    python mini/pretrain.py --out out/mini          # 15,625 steps, 15 to 25 minutes of one core

It stands in for a pretrained model so that the whole method runs on a laptop. Like a language model before
fine-tuning it can do each thing that a trace is made of, and has never seen a problem attempted twice. Half
of the documents, a fifth of the text, are single attempts and single checks in the project's own prompts; the
other half are sheets:

    an attempt               a check                        a sheet
    -----------------------  -----------------------------  -------------------------------
    Let me work this out.    Checking each step.            Notes
    I have 6 2 9 6           9 * 2 = 18                     Numbers: 8 4 1
    9 * 2 = 18, left 6 6     18 - 6 = 12                    Target: 24 [...]
    18 - 6 = 12, left 6      12 + 6 = 18                    What is (5 + 4) * 3?
    12 + 6 = 18, none left   24 was to come out, and it     From the inside out. [...]
    <answer>((9 * 2) - 6)     did not.                      <answer>27</answer>
     + 6</answer>            <verdict>Incorrect</verdict>   Here it goes.
                                                            I have 8 4 1
                                                            1 + 8 = 9, left 4 [...]
                                                            <answer>(1 + 8) - 4</answer>
                                                            Checking each step. [...]
                                                            <verdict>Incorrect</verdict>
                                                            What is 7 * 11? [...]

All of it is what a weak model could write: an attempt is a random expression or a solution (a third to a half
are right), worked out with care; a check computes the attempt again and compares. What the model learns from
traces of 3 numbers should carry over to longer problems, so no decision may depend on a problem's length
(docs/miniature.md measures what each part is worth):

- An attempt keeps *account* of its numbers in writing: the line before says whether another must follow
  (that this is needed could not be shown).
- A check writes the target next to the value that it compares.
- A *sheet* holds several problems of mixed sizes, each attempted once and perhaps checked: the model has seen
  problems, attempts and checks at any distance and in any layout. Half of them end with the last answer once
  more, in lines of its own.

No document attempts a problem twice, computes on exactly its numbers again after the attempt and its check,
or holds a tag of the traces: whatever retrying appears later was taught by SkillFactory. All problems come
from the split `pretrain`, which no other command uses.

The tokenizer is bytes, plus one token for each number up to 144, each fixed phrase of the project's prompts
and of the documents, and each tag.
"""
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tokenizers import AddedToken, decoders, models, pre_tokenizers  # noqa: E402
from tokenizers import Tokenizer as BPE  # noqa: E402

import tasks  # noqa: E402
from checkpoint import config_of, save  # noqa: E402
from checkpoint.tokenizer import CHATML, Tokenizer  # noqa: E402
from model import Transformer  # noqa: E402
from optimizer import check_finite  # noqa: E402
from rearrange import PHRASES  # noqa: E402
from run.command import Progress, command, parser, say  # noqa: E402
from run.files import refuse_existing  # noqa: E402
from run.processes import in_batches  # noqa: E402

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
}

# ---- what the documents say ----------------------------------------------------------------------
PRODUCT = "multiply-2-small"
EXERCISES = {"evaluate": 9, "express": 9}
KINDS = {  # problems in 100; a sheet has the EXERCISES among them
    "countdown-2-small": 8,
    "countdown-3-small": 30,
    "countdown-4-small": 27,
    "countdown-5-small": 20,
    PRODUCT: 15,
}
OPENINGS = {
    "plain": ("Let me work this out.\n", "I will go step by step.\n", "First I join two numbers.\n"),
    "plan": ("Plan: join two numbers, then bring in the others one by one.\n",
             "My plan is to build up from a first pair.\n"),
    "alternatives": ("One candidate is this.\n", "A first idea comes to mind.\n"),
    "rephrase": ("In short: ", "What is needed: "),  # continued with the target
}
HAVE = "I have "
LEFT = ", left "
NONE_LEFT = ", none left\n"
EXPRESS = "As one expression:\n"
INSIDE = ("From the inside out.\n", "The inner part first.\n", "I evaluate it.\n")
CHECKS = ("I compute it again.\n", "Let me redo the steps.\n", "Checking each step.\n")
HITS = (" was to come out, and it did.\n", " is what it should be, and it is.\n")  # both follow the target
MISSES = (" was to come out, and it did not.\n", " is what it should be, and it is not.\n")
MISUSED = ("The numbers are not the given ones.\n",)
GUESSES = ("Some guesses.\n", "Is it one of these?\n", "Numbers to compare.\n")
RECITE = ("Which numbers were given?\n", "Say the numbers again.\n", "The numbers, once more.\n")
COPY = ("The answer to the last one again.\n", "To hand in.\n", "Copied out.\n")
SHEETS = ("Work through this sheet.", "Do the exercises one by one.",
          "Take your time and go through all of it.")
LAYOUT = ("<p>\n", "</p>\n", "<li>\n", "</li>\n", "<div>\n", "</div>\n", "<td>\n", "</td>\n", "<hr>\n",
          "<br>\n", "<h1>\n", "</h1>\n", "Next.\n", "Here it goes.\n", "Very well.\n", "On to it.\n",
          "Notes\n", "Page\n", "---\n", "Exercise\n", "Solution\n", "Marking\n", "Sheet\n",
          "End of part.\n", "So much for that.\n")
GAP = "\0"  # a place where positions may jump ahead, as if some text had been cut out there


# ---- steps ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One line of a solution: a op b = value."""
    a: int
    op: str
    b: int
    value: int


def random_chain(numbers: list[int], rng: random.Random) -> list[Step]:
    """The numbers in random order, each step going on from the last value, all within 0..60."""
    while True:
        value, *others = rng.sample(numbers, len(numbers))
        steps = []
        for b in others:
            results = (("+", value + b), ("-", value - b), ("*", value * b))
            fitting = [(op, result) for op, result in results if 0 <= result <= 60]
            if not fitting:
                break
            op, result = rng.choice(fitting)
            steps.append(Step(value, op, b, result))
            value = result
        else:
            return steps


def swapped_chain(numbers: list[int], target: int, rng: random.Random) -> tuple[list[Step], list[int]]:
    """(steps, their numbers) of a solver who took one number for another, as the model itself does at times.

    Best of all so that the target comes out, or a judge would learn to look at the result alone.
    """
    for _ in range(100):
        wrong = list(numbers)
        wrong[rng.randrange(len(wrong))] = rng.randint(1, 12)
        steps = random_chain(wrong, rng)
        if steps[-1].value == target:
            break
    return steps, wrong


def expression(steps: list[Step]) -> str:
    """The chain as one expression: 2 + 3 = 5, 5 * 4 = 20 -> (2 + 3) * 4."""
    first, *others = steps
    text = f"{first.a} {first.op} {first.b}"
    for step in others:
        text = f"({text}) {step.op} {step.b}"
    return text


def chain_of(text: str) -> list[Step]:
    """The steps of a chain-shaped expression, the other way round."""
    first, *rest = text.replace("(", "").replace(")", "").split()
    value = int(first)
    steps = []
    for op, b in zip(rest[::2], map(int, rest[1::2]), strict=True):
        result = tasks.OPERATORS[op](value, b)
        steps.append(Step(value, op, b, result))
        value = result
    return steps


def lines(steps: list[Step]) -> str:
    return "".join(f"{step.a} {step.op} {step.b} = {step.value}\n" for step in steps)


def recital(numbers: Sequence[int]) -> str:
    return f"{HAVE}{spaced(numbers)}\n"


def account(steps: list[Step], numbers: Sequence[int]) -> str:
    """The numbers, then the lines with what each leaves of them: 9 * 2 = 18, left 6 6."""
    left = list(numbers)
    left.remove(steps[0].a)
    text = recital(numbers)
    for step in steps:
        left.remove(step.b)
        end = f"{LEFT}{spaced(left)}\n" if left else NONE_LEFT
        text += f"{step.a} {step.op} {step.b} = {step.value}{end}"
    return text


def spaced(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


# ---- documents -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Item:
    """A question, one attempt at it and a check of that attempt."""
    question: str
    attempt: str
    check: str
    numbers: tuple[int, ...]
    target: int  # what the check compares with

    @property
    def answer(self) -> str:
        return self.attempt.partition("<answer>")[2].partition("</answer>")[0]


class Author:
    """Writes the documents, from one random state."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def document(self) -> tuple[list[dict], str]:
        """(chat messages, response): a sheet, a single attempt, or a check of one."""
        if self.rng.random() < 0.5:
            return Sheet(self).write()
        name = self.pick(KINDS)
        style = self.rng.choice(list(OPENINGS))
        if self.rng.random() < 0.5:
            item = self.item(name, style, hit=0.6 if name == PRODUCT else 0.25, slip=0.0)
            problem = tasks.Problem("", name, item.question, truth={})
            return tasks.Task.prompt(problem, style), item.attempt
        item = self.item(name, style, hit=0.55, slip=0.08)
        return tasks.reflection_prompt(item.question, item.attempt), item.check

    def pick(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), weights.values())[0]

    # ---- one problem, its attempt and its check ----
    def item(self, name: str, style: str, hit: float, slip: float) -> Item:
        """A new problem; the attempt is right with probability `hit` (a random one may be, by luck).

        With probability `slip` a countdown attempt has one number exchanged, at times for itself.
        """
        question, truth = self.problem(tasks.find(name))
        if name == PRODUCT:
            return self.product(question, style, hit)
        return self.countdown(question, truth, style, hit, slip)

    def problem(self, task: tasks.Generated) -> tuple[str, dict]:
        """(question, truth) of the split `pretrain`, of which no other split has a copy."""
        while True:
            made = task.make(self.rng)
            if made and tasks.hundredth(made[0]) in tasks.SPLITS["pretrain"]:
                return made[1], made[2]

    def countdown(self, question: str, truth: dict, style: str, hit: float, slip: float) -> Item:
        numbers, target = truth["numbers"], truth["target"]
        used = numbers
        if self.rng.random() < slip:
            steps, used = swapped_chain(numbers, target, self.rng)
        elif self.rng.random() < hit:
            steps = chain_of(truth["answer"])
        else:
            steps = random_chain(numbers, self.rng)
        opening = self.rng.choice(OPENINGS[style])
        if style == "rephrase":
            opening += f"target {target}.\n"
        attempt = f"{opening}{account(steps, used)}<answer>{expression(steps)}</answer>"
        misused = sorted(used) != sorted(numbers)
        return Item(question, attempt, self.check(steps, target, misused), tuple(numbers), target)

    def product(self, question: str, style: str, hit: float) -> Item:
        a, b = map(int, question.removeprefix("What is ").rstrip("?").split(" * "))
        claim = a * b if self.rng.random() < hit else self.near(a * b)
        opening = OPENINGS["plain"][1] if style == "rephrase" else self.rng.choice(OPENINGS[style])
        attempt = f"{opening}{a} * {b} = {claim}\n<answer>{claim}</answer>"
        return Item(question, attempt, self.check([Step(a, "*", b, a * b)], claim), (a, b), claim)

    def evaluation(self) -> Item:
        """An exercise without search: the value of an expression."""
        numbers = [self.rng.randint(1, 12) for _ in range(self.rng.choice((3, 3, 4, 4, 5)))]
        steps = random_chain(numbers, self.rng)
        value = steps[-1].value
        claim = value if self.rng.random() < 0.7 else self.near(value)
        attempt = f"{self.rng.choice(INSIDE)}{lines(steps)}<answer>{claim}</answer>"
        return Item(f"What is {expression(steps)}?", attempt, self.check(steps, claim), tuple(numbers), claim)

    def expressing(self) -> Item:
        """An exercise the other way round: lines to be written as one expression."""
        numbers = [self.rng.randint(1, 12) for _ in range(self.rng.choice((3, 3, 4, 4, 5)))]
        steps = random_chain(numbers, self.rng)
        value = steps[-1].value
        written = steps if self.rng.random() < 0.7 else random_chain(numbers, self.rng)
        attempt = f"<answer>{expression(written)}</answer>"
        return Item(f"{EXPRESS}{lines(steps)}", attempt, self.check(written, value), tuple(numbers), value)

    def near(self, value: int) -> int:
        """A wrong result (of 0 sometimes the right one)."""
        return max(0, value + self.rng.choice((-10, -2, -1, 1, 2, 10)))

    def check(self, steps: list[Step], target: int, misused: bool = False) -> str:
        """Recompute, compare, verdict."""
        value = steps[-1].value
        result = self.rng.choice(MISUSED) if misused else self.comparison(value, target)
        verdict = "Correct" if value == target and not misused else "Incorrect"
        return f"{self.rng.choice(CHECKS)}{lines(steps)}{result}<verdict>{verdict}</verdict>"

    def comparison(self, value: int, target: int) -> str:
        """First the target, from wherever it stands; so what is compared stands side by side."""
        return f"{target}{self.rng.choice(HITS if value == target else MISSES)}"


class Sheet:
    """Several problems in one text, no two on the same numbers, each attempted once and perhaps checked.

    Before an attempt fillers may come: its numbers recited, guesses compared with its target, other
    exercises. So numbers must be fetched from further up, and the comparison that checks depend on is
    learned early: without the guesses one seed of two never learned it. After the attempt and its check
    its numbers are at most recited.
    """

    def __init__(self, author: Author):
        self.author = author
        self.rng = author.rng
        self.layout = Layout(author.rng)
        self.checked = self.rng.choice((0.5, 1, 1))  # how many of the attempts
        self.seen = set()  # the numbers of each problem, sorted

    def write(self) -> tuple[list[dict], str]:
        """(chat messages, response)."""
        rng = self.rng
        text = ""
        while True:
            item = self.unseen({**KINDS, **EXERCISES})
            text += self.layout(0) + item.question + "\n\n" + GAP
            searched = item.question.startswith("Numbers")
            if searched and rng.random() < 0.65:
                text += "".join(self.filler(item) for _ in range(rng.randint(1, 4)))
            text += self.attempted(item)
            if searched and rng.random() < 0.4:
                text += "".join(self.recited(item) for _ in range(rng.randint(1, 2)))
            if text.count("\n") > 70 * rng.random() ** 0.5:  # lines
                break
        if rng.random() < 0.5:
            text += f"{self.layout(1)}{rng.choice(COPY)}\n{GAP}<answer>\n{item.answer}\n</answer>"
        request = rng.choice(SHEETS)
        if rng.random() < 0.5:
            return [{"role": "user", "content": request}], text
        first_question, _, rest = text.partition(GAP)  # it may also come from the user
        return [{"role": "user", "content": first_question + request}], rest

    def unseen(self, kinds: dict[str, int]) -> Item:
        """A problem on numbers that the sheet does not hold yet."""
        author = self.author
        while True:
            name = author.pick(kinds)
            if name == "evaluate":
                item = author.evaluation()
            elif name == "express":
                item = author.expressing()
            else:
                style = self.rng.choice(list(OPENINGS))
                item = author.item(name, style, hit=0.85 if name == PRODUCT else 0.45, slip=0.04)
            numbers = tuple(sorted(item.numbers))
            if numbers not in self.seen:
                self.seen.add(numbers)
                return item

    def attempted(self, item: Item) -> str:
        text = self.layout(2) + GAP + item.attempt + "\n" + self.layout(3)
        if self.rng.random() < self.checked:
            text += self.layout(4) + item.check + "\n" + self.layout(5)
        return text

    def filler(self, item: Item) -> str:
        kind = self.rng.random()
        if kind < 0.2:
            return self.recited(item)
        if kind < 0.6:
            return self.guessed(item)
        other = self.unseen(EXERCISES)
        return self.layout(1) + other.question + "\n" + self.attempted(other)

    def recited(self, item: Item) -> str:
        numbers = recital(item.numbers)
        return GAP + self.layout(1) + self.rng.choice(RECITE) + self.layout(2) + numbers + self.layout(3)

    def guessed(self, item: Item) -> str:
        """Guesses at the target, each compared with it; half of them hit."""
        author = self.author
        guesses = [item.target if self.rng.random() < 0.5 else author.near(item.target)
                   for _ in range(self.rng.randint(3, 10))]
        compared = "".join(f"{guess}\n{author.comparison(guess, item.target)}" for guess in guesses)
        return GAP + self.layout(1) + self.rng.choice(GUESSES) + compared + self.layout(3)


class Layout:
    """What a sheet puts between any two parts: nothing, headings, tags of some markup, a random word.

    Most sheets keep to what they chose for each place.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.chosen = [self.separator() for _ in range(6)]
        self.steady = rng.random() < 0.7

    def __call__(self, place: int) -> str:
        return self.chosen[place] if self.steady else self.separator()

    def separator(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.15:
            return ""
        if kind < 0.75:
            return "".join(rng.choice(LAYOUT) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
        letters = "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(1, 4)))
        return letters + rng.choice((":", ".", ")", "")) + "\n"


# ---- tokenizer -----------------------------------------------------------------------------------
def phrases() -> list[str]:
    """Every fixed piece of text in the prompts, the documents and the traces: one token each."""
    question = tasks.find("countdown-2-small").problems("pretrain", 1)[0].question
    pieces = {"system\n", "user\n", "assistant\n", "Numbers: ", "\nTarget: ", "What is ", ", target ", ".\n"}
    pieces |= {" = ", question[question.index("\nReach"):], "\n\n", "target ", HAVE, LEFT, NONE_LEFT, EXPRESS}
    pieces |= {f"{bracket} {op} " for op in "+-*" for bracket in ("", ")")}
    pieces |= {"<verdict>Correct</verdict>", "<verdict>Incorrect</verdict>", "<answer>", "</answer>"}
    pieces |= {tasks.MUST_ANSWER, *(instruction for _, instruction in tasks.STYLES.values())}
    for part in tasks.REFLECT.split("{question}"):
        pieces |= set(part.split("{attempt}"))
    openings = OPENINGS.values()
    others = (INSIDE, CHECKS, HITS, MISSES, MISUSED, GUESSES, RECITE, COPY, SHEETS, LAYOUT)
    for texts in (*openings, *others, *trace_lines()):
        pieces |= set(texts)
    return sorted(pieces)


def trace_lines() -> tuple[list[str], list[str]]:
    """The lines that traces hold and no document does: tags and what stands between attempts, and what
    announces the final answer.

    Each is one token with the line break after it, as the lines of the LAYOUT are. Were the break a token of
    its own, the model would have to look past it to see after which line it stands.
    """
    between = ["<think>\n", "<sample>\n", "</sample>\n", "<reflect>\n", "</reflect>\n", "</think>\n\n"]
    between += [f"{text}\n" for kind in ("correct", "incorrect", "neutral") for text in PHRASES[kind]]
    announcing = [f"{text}\n" for kind in ("closing", "confirming", "returning") for text in PHRASES[kind]]
    return sorted(between), sorted(announcing)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE without merges, and added tokens that are matched in the text, longest first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BPE(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    numbers = [str(n) for n in range(10, 145)]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in [*numbers, *phrases()]])
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    end, pad = bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": pad}))
    return Tokenizer(folder)


# ---- training ------------------------------------------------------------------------------------
STEPS = 15_625
BATCH_TOKENS = 1024  # of a step, at most, padding included; 86 in 100 are text
MATRIX_LR = 0.02  # Muon's, for the matrices
LR = 3e-3  # AdamW's, for the embedding and the norms


def encoded(tokenizer: Tokenizer, author: Author) -> tuple[list[int], list[int]]:
    """(ids, positions) of a document with its end token. Every token is trained, those of prompts too.

    At a quarter of the GAPs positions jump ahead by up to 400: no document is long enough for such distances.
    """
    messages, response = author.document()
    ids = tokenizer.chat(messages)
    positions = list(range(len(ids)))
    at = len(ids)
    for i, part in enumerate(response.split(GAP)):
        if i and author.rng.random() < 0.25:
            at += author.rng.randint(0, 400)
        new = tokenizer.encode(part)
        ids += new
        positions += range(at, at + len(new))
        at += len(new)
    return ids + [tokenizer.end_id], positions + [at]


def batches(tokenizer: Tokenizer, author: Author):
    """Endless (ids, positions, real): rows padded on the right, (B, T), and what is no padding, (B, T-1)."""
    while True:
        pool = [encoded(tokenizer, author) for _ in range(800)]
        groups = in_batches(pool, lambda row: len(row[0]), BATCH_TOKENS, padded=True)
        for group in author.rng.sample(groups, len(groups)):
            ids = pad_sequence([torch.tensor(ids) for ids, _ in group], batch_first=True)
            positions = pad_sequence([torch.tensor(at) for _, at in group], batch_first=True)
            lengths = torch.tensor([len(ids) for ids, _ in group])
            yield ids, positions, torch.arange(1, ids.shape[1]) < lengths[:, None]


def new_model(tokenizer: Tokenizer) -> Transformer:
    config = {**CONFIG, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.end_id}
    model = Transformer(config_of(config))
    for w in model.parameters():
        if w.ndim == 2:
            torch.nn.init.normal_(w, std=w.shape[1] ** -0.5)
    return model


class Muon:
    """Momentum whose step is made nearly orthogonal by five Newton-Schulz iterations (Jordan et al. 2024).

    As torch.optim.Muon, but in float32 and with matrices of one shape side by side. Its bfloat16 products,
    one matrix after the other, took three times as long as the model itself on a CPU without such
    instructions.
    """

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95):
        self.momentum = momentum
        self.groups = []  # [(weights of one shape, their momentum (n, rows, columns))]
        for shape in sorted({w.shape for w in matrices}):
            group = [w for w in matrices if w.shape == shape]
            self.groups.append((group, torch.zeros(len(group), *shape)))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weights, momentum in self.groups:
            gradients = torch.stack([w.grad for w in weights])
            momentum.lerp_(gradients, 1 - self.momentum)
            steps = orthogonal(gradients.lerp(momentum, self.momentum))  # Nesterov
            rows, columns = weights[0].shape
            for w, step in zip(weights, steps, strict=True):
                w.sub_(step, alpha=lr * max(1, rows / columns) ** 0.5)
                w.grad = None


def orthogonal(x: Tensor) -> Tensor:
    """x (n, rows, columns) -> the same, with singular values near 1.

    Five times x <- 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


@torch.no_grad()
def draw_new(embedding: Tensor, new: list[int], like: list[int], seed: int) -> None:
    """Give tokens that no document holds embeddings of their own, drawn like those of other tokens.

    Every step of training pushes all of them away in one direction, and they end as the same vector: a model
    that is fine-tuned on them could neither read nor write one apart from another. Words that are new to a
    language model have pieces that are not. So each is drawn from the normal distribution that has the mean
    and the covariance of the tokens that it is to be `like` (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models").

    embedding (V, C); new and like are ids.
    """
    trained = embedding[like]  # (n, C)
    mean = trained.mean(0)
    weights = torch.randn(len(new), len(trained), generator=torch.Generator().manual_seed(seed))
    embedding[new] = mean + weights @ (trained - mean) / len(trained) ** 0.5


def train(model: Transformer, data) -> None:
    matrices, others = [], []
    for name, w in model.named_parameters():
        (matrices if w.ndim == 2 and "embed" not in name else others).append(w)
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    progress = Progress("pretrain", STEPS)
    for step in range(1, STEPS + 1):
        ids, positions, real = next(data)
        targets = ids[:, 1:][real]  # (N,)
        hidden = model(ids[:, :-1], positions[:, :-1])[real]  # (N, C)
        logp, _ = model.logprobs(hidden, targets)
        loss = -logp.mean()
        check_finite(loss.item(), "loss")
        loss.backward()
        schedule = min(step / 100, 1, (STEPS - step) / (0.4 * STEPS))  # warm-up, flat, down to 0
        muon.step(MATRIX_LR * schedule)
        adamw.param_groups[0]["lr"] = LR * schedule
        adamw.step()
        adamw.zero_grad()
        progress.update(loss=f"{loss.item():.3f}")


def main():
    args = parser(__doc__, out="out/mini", model=None).parse_args()
    refuse_existing(args.out)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    model = new_model(tokenizer)
    train(model, batches(tokenizer, Author(args.seed)))
    # A line of a trace is drawn like the lines that stand in its place in a sheet.
    for new, like in zip(trace_lines(), (LAYOUT, COPY), strict=True):
        new_ids, like_ids = (sorted(tokenizer.encode(line)[0] for line in lines) for lines in (new, like))
        draw_new(model.model.embed_tokens.weight, new_ids, like_ids, args.seed)
    save(args.out, model, tokenizer)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
