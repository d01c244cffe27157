"""Attempts and reflections become <sample>/<reflect> traces. Text in, text out.

    python rearrange.py                                   # samples.jsonl -> silver.jsonl, the paper's recipe
    python rearrange.py --show 2                          # print two traces as they are built, write nothing
    python rearrange.py --data a.jsonl,b.jsonl --recipe star --out star.jsonl

The model wrote every attempt and every reflection; only the order, the tags and the phrases between are ours. A trace tells
what a solver who verifies would have written: try, check, and go on until a check says that the answer is right.

The order of the input rows does not matter: rows are sorted and each question has its own random numbers.
"""
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import tasks
from cli import UserError, command, natural, parser, positive, read_jsonl, refuse_existing, to_json, write_whole


@dataclass(frozen=True)
class Pair:
    """One attempt and one reflection whose verdict agrees with the grade ("" in recipes that use none)."""
    attempt: str
    reflection: str
    answer: str | None
    correct: bool
    style: str
    index: int


TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "sample", "reflect") for slash in ("", "/"))


# ---- from rows to pairs ----------------------------------------------------------------------------------------------
def flaw(row):
    """Why an attempt cannot be part of a trace, or ""."""
    if row["finish"] != "stop":
        return "cut off at the budget"
    if any(tag in row["solution"] for tag in TAGS):
        return "holds a tag of the traces"
    if row["style"].endswith("-hint") and "hint" in row["solution"].lower():
        return "mentions the hint"
    return ""


def valid(reflection, correct):
    """A reflection counts if it is whole, its verdict equals the grade, and it copies neither tags nor the worked example."""
    text = reflection["text"]
    return (reflection["finish"] == "stop" and reflection["verdict"] is correct
            and not any(word in text for word in (*TAGS, *tasks.REFLECT_LEAKS)))


def pairs_of(rows, rng, dropped, need_reflection=True):
    """The pairs of one question: each usable attempt with one of its valid reflections. Counts the others in `dropped`."""
    pairs = []
    for row in rows:
        reflections = [r for r in row["reflections"] if valid(r, row["correct"])]
        leaks = any(word in r["text"] for r in row["reflections"] for word in tasks.REFLECT_LEAKS)
        reason = flaw(row) or ("" if reflections or not need_reflection else
                               "no valid reflection (one leaked the prompt's example)" if leaks else "no valid reflection")
        if reason:
            dropped[reason] += 1
            continue
        reflection = rng.choice(reflections)["text"].strip() if reflections else ""
        pairs.append(Pair(row["solution"].strip(), reflection, row["answer"], row["correct"], row["style"], row["index"]))
    return pairs


# ---- recipes: pairs of one question -> lists of pairs, each list one trace -------------------------------------------
def paper(pairs, rng, most):
    """Algorithm 1 of the paper. Every trace ends on a correct pair and has more correct pairs than incorrect ones."""
    right, wrong = _pools(pairs, rng)
    traces = []
    while right:
        n_right = min(rng.randint(1, most), len(right))
        n_wrong = min(rng.randint(0, n_right - 1), len(wrong))
        *others, last = _draw(right, n_right)
        others += _draw(wrong, n_wrong)
        rng.shuffle(others)
        traces.append([*others, last])
    return traces


def unordered(pairs, rng, most):
    """The paper's draws, shuffled to the end: a trace may finish wrong (the ablation `random`)."""
    traces = []
    for trace in paper(pairs, rng, most):
        rng.shuffle(trace)
        answered = [i for i, pair in enumerate(trace) if pair.answer is not None]  # a trace must close with some answer
        trace.append(trace.pop(answered[-1]))
        traces.append(trace)
    return traces


def full(pairs, rng, most):
    """For N = 1..most: N - 1 pairs of any kind, then a correct one."""
    right, traces = [p for p in pairs if p.correct], []
    for n in range(1, min(most, len(pairs)) + 1 if right else 1):
        last = rng.choice(right)
        traces.append([*rng.sample([p for p in pairs if p is not last], n - 1), last])
    return traces


def backtrack(pairs, rng, most):
    """A correct pair somewhere, an incorrect one last: the trace then returns to the correct one."""
    right, wrong = _pools(pairs, rng)
    traces = []
    while right and wrong:
        last = wrong.pop()
        others = _draw(right, min(rng.randint(1, most), len(right)))
        others += _draw(wrong, min(rng.randint(0, len(others) - 1), len(wrong)))
        rng.shuffle(others)
        traces.append([*others, last])
    return traces


def confirm(pairs, rng, most):
    """Incorrect pairs, then two correct ones in a row."""
    right, wrong = _pools(pairs, rng)
    traces = []
    while len(right) >= 2:
        traces.append([*_draw(wrong, min(rng.randint(0, most), len(wrong))), *_draw(right, 2)])
    return traces


def star(pairs, rng, most):
    """Each correct attempt alone (Zelikman et al. 2022)."""
    return [[pair] for pair in pairs if pair.correct]


def unarranged(pairs, rng, most):
    """The pairs that `paper` draws, each alone."""
    return [[pair] for trace in paper(pairs, rng, most) for pair in trace]


def _pools(pairs, rng):
    right, wrong = [p for p in pairs if p.correct], [p for p in pairs if not p.correct]
    for pool in (right, wrong):
        rng.shuffle(pool)
    return right, wrong


def _draw(pool, n):
    return [pool.pop() for _ in range(n)]


# name: (draw, what it is). `star` and `unarranged` have no tags at all: the attempt is the whole response.
RECIPES = {
    "paper": (paper, "Algorithm 1: ends right, correct pairs outnumber incorrect ones"),
    "full": (full, "for N = 1..--max-correct: N-1 random pairs, then a correct one"),
    "backtrack": (backtrack, "ends on an incorrect pair, then returns to an earlier correct answer"),
    "confirm": (confirm, "ends on two correct pairs and says so"),
    "random": (unordered, "ablation: the paper's draws in any order, may end wrong"),
    "no-reflection": (paper, "ablation: the paper's order without the <reflect> blocks"),
    "star": (star, "baseline: each correct attempt as it is"),
    "unarranged": (unarranged, "control: the attempts that `paper` draws, right or wrong, each as it is"),
}


# ---- from pairs to text ----------------------------------------------------------------------------------------------
def build(pairs, recipe, phrases, rng):
    """The assistant turn of a trace, as a list of (kind, text) parts; joined, they are the text."""
    if recipe in ("star", "unarranged"):
        return [("attempt", pairs[0].attempt)]
    parts = [("tag", "<think>\n")]
    for i, pair in enumerate(pairs):
        if i:
            before = "correct" if pairs[i - 1].correct else "incorrect"
            parts.append(("glue", rng.choice(phrases[before] + phrases["neutral"]) + "\n"))
        parts += [("tag", "<sample>\n"), ("right" if pair.correct else "wrong", pair.attempt), ("tag", "\n</sample>\n")]
        if recipe != "no-reflection":
            parts += [("tag", "<reflect>\n"), ("reflection", pair.reflection), ("tag", "\n</reflect>\n")]
    closing, final = "closing", pairs[-1]
    if recipe == "backtrack":
        closing, final = "returning", next(p for p in reversed(pairs) if p.correct)
    if recipe == "confirm":
        closing = "confirming"
    parts += [("tag", "</think>\n\n"), ("glue", rng.choice(phrases[closing]))]
    return parts + [("tag", "\n\n<answer>\n"), ("answer", final.answer), ("tag", "\n</answer>")]


def read_phrases(path):
    """The glue: {"correct": [...], "incorrect": [...], "neutral": [...], "closing", "confirming", "returning"}."""
    try:
        phrases = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--phrases {path}: no such file")
    except ValueError as e:
        raise UserError(f"--phrases {path}: not valid JSON ({e})")
    for kind in ("correct", "incorrect", "neutral", "closing", "confirming", "returning"):
        texts = phrases.get(kind) if isinstance(phrases, dict) else None
        fine = isinstance(texts, list) and texts and all(isinstance(t, str) and t and not any(tag in t for tag in TAGS) for t in texts)
        if not fine:
            raise UserError(f"--phrases {path}: {kind!r} must be a list of phrases without tags")
    return phrases


COLOURS = {"tag": "2", "right": "32", "wrong": "31", "reflection": "36", "glue": "35", "answer": "1;32", "attempt": "32"}


def show(pairs, trace, parts, question):
    """Print one trace the way it came to be: the pool, the draw, the text."""
    colour = (lambda kind, text: f"\033[{COLOURS[kind]}m{text}\033[0m") if sys.stdout.isatty() else lambda kind, text: text
    right = sum(p.correct for p in pairs)
    print(colour("tag", "=" * 100))
    print(f"question\n{question}\n")
    print(f"pool: {colour('right', f'{right} correct')} and {colour('wrong', f'{len(pairs) - right} incorrect')} pairs")
    drawn = [colour("right", f"{p.style} {p.index} (correct)") if p.correct else colour("wrong", f"{p.style} {p.index} (incorrect)") for p in trace]
    print(f"drawn, in order: {', '.join(drawn)}\n")
    print("".join(colour(kind, text) for kind, text in parts), "\n")


# ---- the command -----------------------------------------------------------------------------------------------------
def read_rows(paths):
    """Rows of all files, sorted, each (id, style, index) once."""
    rows = {}
    keys = ("id", "task", "problem", "question", "style", "index", "solution", "finish", "answer", "correct", "reflections")
    for path in paths.split(","):
        for number, row in enumerate(read_jsonl(path, keys), 1):
            texts = all(isinstance(row[key], str) for key in ("id", "task", "question", "style", "solution", "finish"))
            others = isinstance(row["index"], int) and isinstance(row["correct"], bool) and isinstance(row["answer"], str | None)
            reflections = isinstance(row["reflections"], list) and all(
                isinstance(r, dict) and isinstance(r.get("text"), str) and {"verdict", "finish"} <= r.keys() for r in row["reflections"])
            if not (texts and others and reflections):
                raise UserError(f"{path}: row {number}: not a line of sample.py (id, question, style, solution: text; index: a number; "
                                "correct: true or false; answer: text or null; reflections: a list of {text, verdict, finish})")
            if row["correct"] and row["answer"] is None:
                raise UserError(f"{path}: row {number}: an attempt without an answer cannot be correct")
            key = (row["id"], row["style"], row["index"])
            if rows.setdefault(key, row) != row:
                raise UserError(f"{path}: row {number}: attempt {key} stands in the data twice, with different content")
    return [rows[key] for key in sorted(rows)]


def main():
    p = parser(__doc__, out="silver.jsonl", model=None)
    p.add_argument("--data", default="samples.jsonl", help="what sample.py wrote; several files with commas")
    p.add_argument("--recipe", default="paper", choices=list(RECIPES), help="; ".join(f"{name}: {about}" for name, (_, about) in RECIPES.items()))
    p.add_argument("--max-correct", type=positive, default=5, help="the paper's 5: most correct pairs of a trace (for full: most pairs; for confirm: most incorrect ones)")
    p.add_argument("--traces-per-question", type=natural, default=0, help="keep at most this many of a question's traces; 0 keeps all")
    p.add_argument("--phrases", default=str(Path(__file__).parent / "phrases.json"), help="JSON file of the phrases between pairs")
    p.add_argument("--show", type=natural, default=0, metavar="K", help="print K traces as the method builds them, and write nothing")
    args = p.parse_args()

    phrases, rows = read_phrases(args.phrases), read_rows(args.data)
    if not args.show:
        refuse_existing(args.out)
    draw = RECIPES[args.recipe][0]
    dropped, lengths, silver, shown = Counter(), Counter(), [], 0
    for identity, group in groupby(rows, key=lambda row: row["id"]):
        group, rng = list(group), random.Random(f"{args.seed}/{identity}")
        pairs = pairs_of(group, rng, dropped, need_reflection=args.recipe not in ("star", "no-reflection"))
        traces = draw(pairs, rng, args.max_correct)
        problem = tasks.Problem(identity, group[0]["task"], group[0]["question"], group[0]["problem"])
        for trace in traces[:args.traces_per_question or None]:
            parts = build(trace, args.recipe, phrases, rng)
            if shown < args.show:
                show(pairs, trace, parts, problem.question)
                shown += 1
            lengths[len(trace)] += 1
            # Whatever styles the attempts came from, the trained model meets the plain prompt only.
            silver.append({"messages": [*tasks.Task.prompt(problem), {"role": "assistant", "content": "".join(text for _, text in parts)}],
                           "id": identity, "task": problem.task, "recipe": args.recipe,
                           "pairs": [{"style": pair.style, "index": pair.index, "correct": pair.correct} for pair in trace]})
    right = sum(row["correct"] for row in rows)
    if dropped:
        print("dropped " + ", ".join(f"{n} ({reason})" for reason, n in sorted(dropped.items())) + f" of {len(rows)} attempts")
    if not right:
        raise UserError(f"--data {args.data}: none of the {len(rows)} sampled attempts is correct; sample more (--n), an easier --task or a stronger --model")
    if not silver:
        raise UserError(f"--data {args.data}: {right} of {len(rows)} attempts are correct, but no trace can be made (see the dropped ones above); sample more --n or --reflections")
    if args.show:
        return
    write_whole(args.out, "".join(to_json(row) + "\n" for row in silver))
    print(f"wrote {args.out}: {len(silver)} traces of {len({row['id'] for row in silver})} questions from {len(rows)} attempts ({right} correct); "
          "pairs in a trace: " + ", ".join(f"{n}: {count}" for n, count in sorted(lengths.items())))


if __name__ == "__main__":
    command(main)
