"""Attempts and reflections become <sample>/<reflect> traces. Text in, text out.

    python rearrange.py                                   # samples.jsonl -> silver.jsonl, the paper's recipe
    python rearrange.py --show 2                          # print two traces as they are built, write nothing
    python rearrange.py --data a.jsonl,b.jsonl --recipe star --out star.jsonl

The model wrote every attempt and every reflection; only the order, the tags and the phrases between are ours.
A trace reads like the work of a solver who verifies: attempts, each with its check, until the last one is
right.

The order of the input rows does not matter: rows are sorted and each question has its own random numbers.

Left out: judging traces by a model, and rewriting what the model wrote.
"""
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import tasks
from grading.answers import TRACE_TAGS, malformed
from run.command import UserError, command, natural, parser, positive, printable, printing, say, split_list
from run.files import check_row, read_jsonl, refuse_existing, to_json, write_whole


# What stands between two pairs, by the grade of the first, and what announces the final answer.
PHRASES = {
    "correct": (
        "That seems right, but it costs little to make sure.",
        "This holds up so far. I will confirm it once more.",
        "I believe this one. A second look will not hurt.",
        "The check agrees with me; let me see whether I get there again.",
        "Good, that works out. I would still like to verify it from the start.",
        "It looks correct. To be safe, I will redo it.",
        "No mistake found. I will go over it again to be certain.",
        "That passes my check. Let me convince myself fully.",
        "So this answer stands, yet I want to be sure of it.",
        "I am fairly confident now. One more pass to settle it.",
        "The result fits. I will try it once more before I commit.",
        "That appears to be it, but I should not rush.",
    ),
    "incorrect": (
        "That was wrong, so I will try again.",
        "This does not work. I need another way.",
        "The check failed; back to the question.",
        "So that is not the answer. Let me look for a different one.",
        "I made a mistake there. I will start over.",
        "Not right. What else could I do?",
        "That attempt fails, and I should change my approach.",
        "It does not fit the question. Another attempt, then.",
        "I have to discard this one and think anew.",
        "No, that misses. I will go at it differently.",
        "The error is clear now. Let me do better.",
        "That cannot be the answer. I will have another go.",
    ),
    "neutral": (
        "Let me look at the question again.",
        "I will work through it once more.",
        "Here is a fresh attempt.",
        "Going back to the beginning.",
        "Let me take it from the top.",
        "I will give it another try.",
        "Time for one more pass.",
        "Let me think about this anew.",
        "Once more, with care.",
        "I will approach it again.",
        "Let me do this another time.",
        "Another round, to see what comes out.",
    ),
    "closing": (
        "My work above leads to this answer.",
    ),
    "confirming": (
        "Two separate attempts agree, so I can rely on it.",
    ),
    "returning": (
        "I had it right before this; I go back to my earlier answer.",
    ),
}


@dataclass(frozen=True)
class Pair:
    """One attempt and one reflection whose verdict agrees with the grade ("" where a recipe needs none)."""
    attempt: str
    reflection: str
    answer: str | None
    correct: bool
    style: str
    index: int


Trace = list[Pair]


# ---- from rows to pairs --------------------------------------------------------------------------
def flaw(row: dict) -> str:
    """Why an attempt cannot be part of a trace, or ""."""
    if row["finish"] != "stop":
        return "cut off at the budget"
    if row["solution"].lstrip().startswith("<think>"):
        return ("opens with <think>: the model thinks before it answers; if its chat template can switch "
                "that off, sample with --chat-template-kwargs '{\"enable_thinking\": false}'")
    if holds_a_tag(row["solution"]):
        return "holds a tag of the traces"
    if row["style"].endswith("-hint") and "hint" in row["solution"].lower():  # `sample.py --hint` names it so
        return "mentions the hint"
    why_malformed = malformed(row["solution"])  # perhaps right, perhaps wrong: no check of it can be trusted
    return f"malformed: {why_malformed}" if why_malformed else ""


def holds_a_tag(text: str) -> bool:
    return any(tag in text for tag in TRACE_TAGS)


def leaks(reflection: dict, row: dict) -> bool:
    """Whether a reflection holds a word of its prompt's worked example that question and attempt do not."""
    prompt = row["question"] + row["solution"]
    return any(word in reflection["text"] and word not in prompt for word in tasks.REFLECT_LEAKS)


def valid(reflection: dict, row: dict) -> bool:
    """Whether a reflection counts: whole, its verdict equal to the grade, no tag or worked example copied."""
    whole = reflection["finish"] == "stop"
    return (whole and reflection["verdict"] is row["correct"]
            and not holds_a_tag(reflection["text"]) and not leaks(reflection, row))


def pairs_of(
    rows: list[dict], rng: random.Random, dropped: Counter, needs_reflection: bool = True,
) -> list[Pair]:
    """The pairs of one question: each usable attempt with one of its valid reflections.

    Counts the others in `dropped`.
    """
    pairs = []
    for row in rows:
        reflections = [r for r in row["reflections"] if valid(r, row)]
        reason = flaw(row)
        if not reason and needs_reflection and not reflections:
            reason = "no valid reflection"
            if any(leaks(r, row) for r in row["reflections"]):
                reason += " (one leaked the prompt's example)"
            elif any(holds_a_tag(r["text"]) for r in row["reflections"]):
                reason += " (one holds a tag of the traces)"
        if reason:
            dropped[reason] += 1
            continue
        reflection = rng.choice(reflections)["text"].strip() if reflections else ""
        attempt = row["solution"].strip()
        pairs.append(Pair(attempt, reflection, row["answer"], row["correct"], row["style"], row["index"]))
    return pairs


# ---- recipes: how traces are drawn from the pairs of one question --------------------------------
# Each is a function of (pairs, rng, most), where `most` is --max-correct. To try an order of your own, write
# such a function and name it in RECIPES.
def paper(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """Algorithm 1 of the paper: traces end on a correct pair and have more correct pairs than incorrect.

    Each correct pair is used exactly once, over all traces; each incorrect one at most once.
    """
    right, wrong = _pools(pairs, rng)
    traces = []
    while right:
        n_right = min(rng.randint(1, most), len(right))
        n_wrong = min(rng.randint(0, n_right - 1), len(wrong))
        *others, last = _take(right, n_right)
        others += _take(wrong, n_wrong)
        rng.shuffle(others)
        traces.append([*others, last])
    return traces


def random_order(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """The paper's draws with the last pair shuffled too: a trace may end wrong."""
    traces = []
    for trace in paper(pairs, rng, most):
        rng.shuffle(trace)
        last_answered = max(i for i, pair in enumerate(trace) if pair.answer is not None)
        trace.append(trace.pop(last_answered))  # a trace must close with some answer
        traces.append(trace)
    return traces


def full(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """For N = 1..most: N - 1 pairs of any kind, then a correct one. Pairs are used again."""
    right = [p for p in pairs if p.correct]
    if not right:
        return []
    traces = []
    for n in range(1, min(most, len(pairs)) + 1):
        last = rng.choice(right)
        others = [p for p in pairs if p is not last]
        traces.append([*rng.sample(others, n - 1), last])
    return traces


def backtrack(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """Some correct pairs, fewer incorrect ones, an incorrect one last: the trace returns to a correct one."""
    right, wrong = _pools(pairs, rng)
    traces = []
    while right and wrong:
        last = wrong.pop()
        others = _take(right, min(rng.randint(1, most), len(right)))
        others += _take(wrong, min(rng.randint(0, len(others) - 1), len(wrong)))
        rng.shuffle(others)
        traces.append([*others, last])
    return traces


def confirm(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """Incorrect pairs, then two correct ones in a row."""
    right, wrong = _pools(pairs, rng)
    traces = []
    while len(right) >= 2:
        before = _take(wrong, min(rng.randint(0, most), len(wrong)))
        traces.append([*before, *_take(right, 2)])
    return traces


def star(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """Each correct attempt alone (Zelikman et al. 2022)."""
    return [[pair] for pair in pairs if pair.correct]


def unarranged(pairs: list[Pair], rng: random.Random, most: int) -> list[Trace]:
    """The pairs that `paper` draws, each alone."""
    return [[pair] for trace in paper(pairs, rng, most) for pair in trace]


def _pools(pairs, rng):
    right = [p for p in pairs if p.correct]
    wrong = [p for p in pairs if not p.correct]
    rng.shuffle(right)
    rng.shuffle(wrong)
    return right, wrong


def _take(pool, n):
    return [pool.pop() for _ in range(n)]


@dataclass(frozen=True)
class Recipe:
    draw: Callable[[list[Pair], random.Random, int], list[Trace]]
    about: str
    tagged: bool = True  # False: the attempt is the whole response
    reflections: bool = True  # False: no <reflect> blocks
    needs_reflection: bool = True  # False: an attempt without a valid reflection is used too
    closing: str = "closing"  # the kind of phrase before the final answer
    returns: bool = False  # the final answer is the last correct pair's, not the last pair's


RECIPES = {
    "paper": Recipe(paper, "Algorithm 1: ends right, correct pairs outnumber incorrect ones"),
    "full": Recipe(full, "for N = 1..--max-correct: N-1 random pairs, then a correct one"),
    "backtrack": Recipe(backtrack, "ends on an incorrect pair, then returns to an earlier correct answer",
                        closing="returning", returns=True),
    "confirm": Recipe(confirm, "ends on two correct pairs and says so", closing="confirming"),
    "random": Recipe(random_order, "ablation: the paper's draws in any order, may end wrong"),
    # Needs reflections, though it shows none: its traces are those of `paper`.
    "no-reflection": Recipe(paper, "ablation: the paper's traces without the <reflect> blocks",
                            reflections=False),
    "star": Recipe(star, "baseline: each correct attempt as it is", tagged=False, needs_reflection=False),
    # Needs reflections too: its attempts are those that `paper` draws.
    "unarranged": Recipe(unarranged, "control: the attempts that `paper` draws, right or wrong, each alone",
                         tagged=False),
}


# ---- from pairs to text --------------------------------------------------------------------------
def build(trace: Trace, recipe: Recipe, rng: random.Random) -> list[tuple[str, str]]:
    """The assistant turn of a trace, as a list of (kind, text) parts; joined, they are the text."""
    if not recipe.tagged:
        return [("attempt", trace[0].attempt)]
    parts = [("tag", "<think>\n")]
    for i, pair in enumerate(trace):
        if i > 0:
            before = "correct" if trace[i - 1].correct else "incorrect"
            phrase = rng.choice(PHRASES[before] + PHRASES["neutral"])
            parts.append(("phrase", phrase + "\n"))
        kind = "correct" if pair.correct else "incorrect"
        parts += [("tag", "<sample>\n"), (kind, pair.attempt), ("tag", "\n</sample>\n")]
        if recipe.reflections:
            parts += [("tag", "<reflect>\n"), ("reflection", pair.reflection), ("tag", "\n</reflect>\n")]
    final = trace[-1]
    if recipe.returns:
        final = next(p for p in reversed(trace) if p.correct)
    phrase = rng.choice(PHRASES[recipe.closing])
    parts += [("tag", "</think>\n\n"), ("phrase", phrase)]
    parts += [("tag", "\n\n<answer>\n"), ("answer", final.answer), ("tag", "\n</answer>")]
    return parts


COLOURS = {  # ANSI codes of the kinds of parts
    "tag": "2",
    "correct": "32",
    "incorrect": "31",
    "reflection": "36",
    "phrase": "35",
    "answer": "1;32",
    "attempt": "32",
}


def colour(kind: str, text: str) -> str:
    text = printable(text)
    return f"\033[{COLOURS[kind]}m{text}\033[0m" if sys.stdout.isatty() else text


def show(pairs: list[Pair], trace: Trace, parts: list[tuple[str, str]], question: str) -> None:
    """Print one trace the way it came to be: the pool, the draw, the text."""
    drawn = []
    for pair in trace:
        kind = "correct" if pair.correct else "incorrect"
        drawn.append(colour(kind, f"{pair.style} {pair.index} ({kind})"))
    n_correct = sum(p.correct for p in pairs)
    correct = colour("correct", f"{n_correct} correct")
    incorrect = colour("incorrect", f"{len(pairs) - n_correct} incorrect")
    with printing(sys.stdout):
        print(colour("tag", "=" * 100))
        print(f"question\n{printable(question)}\n")
        print(f"pool: {correct} and {incorrect} pairs")
        print(f"drawn, in order: {', '.join(drawn)}\n")
        print("".join(colour(kind, text) for kind, text in parts), "\n", flush=True)


# ---- the command ---------------------------------------------------------------------------------
SAMPLE = {"id": str, "task": str, "question": str, "style": str, "solution": str, "finish": str,
          "problem": dict, "index": int, "answer": str | None, "correct": bool, "reflections": list}


def read_rows(paths: str) -> list[dict]:
    """Rows of all files, sorted. (id, style, index) is unique in a file; files may have other seeds."""
    rows = {}
    for path in split_list(paths, "--data"):
        mine = {}
        for where, row in read_jsonl(path, SAMPLE):
            for reflection in row["reflections"]:
                check_row(reflection, {"text": str, "verdict": bool | None, "finish": str}, where)
            if row["correct"] and row["answer"] is None:
                raise UserError(f"{where}: an attempt without an answer cannot be correct")
            identity = (row["id"], row["style"], row["index"])
            if mine.setdefault(identity, row) != row:
                raise UserError(f"{where}: attempt {identity} is there twice, with different content")
            rows[*identity, to_json(row)] = row
    return [rows[identity] for identity in sorted(rows)]


def silver_row(problem: tasks.Problem, recipe: str, trace: Trace, text: str) -> dict:
    """A line of silver.jsonl.

    Whatever styles the attempts came from, the trained model meets the plain prompt only.
    """
    return {
        "messages": [*tasks.Task.prompt(problem), {"role": "assistant", "content": text}],
        "id": problem.id,
        "task": problem.task,
        "recipe": recipe,
        "pairs": [{"style": pair.style, "index": pair.index, "correct": pair.correct} for pair in trace],
    }


def arguments():
    recipes = "; ".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items())
    p = parser(__doc__, out="silver.jsonl", model=None)
    p.add_argument("--data", default="samples.jsonl",
                   help="what sample.py wrote; several files, of several seeds too, with commas")
    p.add_argument("--recipe", default="paper", choices=list(RECIPES), help=recipes)
    p.add_argument("--max-correct", type=positive, default=5,
                   help="the paper's 5: most correct pairs of a trace (for full: most pairs; "
                        "for confirm: most incorrect ones)")
    p.add_argument("--traces-per-question", type=natural, default=0,
                   help="keep at most this many of a question's traces; 0 keeps all")
    p.add_argument("--show", type=natural, default=0, metavar="K",
                   help="print K traces as the method builds them, and write nothing")
    return p.parse_args()


def main():
    args = arguments()
    rows = read_rows(args.data)
    if not args.show:
        refuse_existing(args.out)
    recipe = RECIPES[args.recipe]

    silver = []
    dropped = Counter()
    for identity, group in groupby(rows, key=lambda row: row["id"]):
        group = list(group)
        rng = random.Random(f"{args.seed}/{identity}")
        pairs = pairs_of(group, rng, dropped, recipe.needs_reflection)
        traces = recipe.draw(pairs, rng, args.max_correct)
        if args.traces_per_question:
            traces = traces[:args.traces_per_question]
        first = group[0]
        problem = tasks.Problem(identity, first["task"], first["question"], truth=first["problem"])
        for trace in traces:
            parts = build(trace, recipe, rng)
            if len(silver) < args.show:
                show(pairs, trace, parts, problem.question)
            silver.append(silver_row(problem, args.recipe, trace, "".join(text for _, text in parts)))

    if dropped:
        counts = ", ".join(f"{n} ({reason})" for reason, n in sorted(dropped.items()))
        say(f"dropped {counts} of {len(rows)} attempts")
    n_correct = sum(row["correct"] for row in rows)
    if not n_correct:
        raise UserError(f"--data {args.data}: none of the {len(rows)} sampled attempts is correct; sample "
                        "more (--n), an easier --task or a stronger --model, or see what was dropped above")
    if not silver:
        raise UserError(f"--data {args.data}: {n_correct} of {len(rows)} attempts are correct, "
                        "but no trace can be made (see the dropped ones above); "
                        "sample more --n or --reflections")
    if args.show:
        return
    write_whole(args.out, "".join(to_json(row) + "\n" for row in silver))
    lengths = Counter(len(row["pairs"]) for row in silver)
    say(f"wrote {args.out}: {len(silver)} traces of {len({row['id'] for row in silver})} questions "
        f"from {len(rows)} attempts ({n_correct} correct); "
        "pairs in a trace: " + ", ".join(f"{n}: {count}" for n, count in sorted(lengths.items())))


if __name__ == "__main__":
    command(main)
