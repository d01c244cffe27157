"""The figures of an evaluation: from graded responses to accuracies, pass@k and use of skills, with tables.

    summarise(rows, baseline, samples=4, ks=[1, 4])   # the rows of a model on a task -> {name: figure}
    interval([[1, 1, 0, 1], [0, 0, 0, 1]])            # 95%, of two questions with four samples each

All intervals are at 95%. Left out: corrections for looking at many cells at once.
"""
import math
from itertools import pairwise

import numpy as np

from run.command import UserError

Interval = tuple[float, float]


# ---- intervals -----------------------------------------------------------------------------------
def wilson(right: float, n: float, z: float = 1.96) -> Interval:
    """95% interval of a proportion (Wilson 1927); it stays within 0..1 and is sane at 0 and n."""
    p = right / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


LEAST_CORRELATION = 0.1  # of the samples of a question


def interval(right) -> Interval:
    """95% interval of the accuracy. right: (questions, samples) of 0 and 1.

    Wilson's interval for an effective number of answers, accuracy (1 - accuracy) / variance of the mean over
    questions, with Student's quantile for the number of questions. Where few answers are right, the observed
    variance is often too small, so a question's samples count as correlated by at least 0.1. A test simulates
    how often it contains the truth.
    """
    right = np.asarray(right, dtype=float)
    n, k = right.shape
    accuracy = right.mean()
    variance = right.mean(1).var(ddof=1) / n if n > 1 else 0.0
    if k == 1 or variance == 0:
        return wilson(accuracy * n, n)
    most = n * k / (1 + (k - 1) * LEAST_CORRELATION)
    worth = min(accuracy * (1 - accuracy) / variance, most)
    return wilson(accuracy * worth, worth, student(n - 1))


# The 97.5% quantile of Student's t, by degrees of freedom: tables have no more digits.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, math.inf: 1.960}


def student(df: int) -> float:
    """That quantile, interpolated linearly in 1 / df."""
    inverse = [1 / n for n in STUDENT]
    return float(np.interp(1 / df, inverse[::-1], list(STUDENT.values())[::-1]))


def paired(differences) -> Interval:
    """95% interval of a mean difference over questions (Student's).

    If every question has the same difference, the margin is the upper end of Wilson's interval of 0 out of n.
    """
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    mean = differences.mean()
    _, margin = wilson(0, n)
    if n > 1 and differences.std() > 0:
        margin = student(n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return max(-1.0, float(mean - margin)), min(1.0, float(mean + margin))


def pass_at(k: int, n: int, c: int) -> float:
    """Chance that at least one of k samples is right, when c of n are (Chen et al. 2021).

    1 - C(n-c, k) / C(n, k)
    """
    if k > n:
        raise UserError(f"--k: pass@{k} needs at least {k} samples of a question, there are {n}; "
                        "raise --samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def f1(verdicts: list[tuple[bool, bool]], label: bool) -> float | None:
    """F1 of the verdicts [(said, actual)] for one class; None if the class never occurs on either side."""
    hits = sum(said == label and actual == label for said, actual in verdicts)
    misses = sum((said == label) != (actual == label) for said, actual in verdicts)
    if not hits and not misses:
        return None
    return 2 * hits / (2 * hits + misses)


# ---- what a retry did ----------------------------------------------------------------------------
def retries_of(rows: list[dict]) -> dict[str, int]:
    """How often an attempt after another one was right or wrong, by what the one before it was."""
    words = {True: "right", False: "wrong"}
    counts = {"wrong to right": 0, "right to right": 0, "wrong to wrong": 0, "right to wrong": 0}
    for row in rows:
        for before, after in pairwise(row["attempts"]):
            counts[f"{words[before]} to {words[after]}"] += 1
    return counts


def checked_by_number(rows: list[dict]) -> list[dict[str, float]]:
    """How many first, second, ... attempts there are, and the share of them that a <reflect> follows at once.

    Where the share falls with the number, a model has not learned the form of a trace but that of its first
    pairs. An attempt with which a response was cut off is not counted.
    """
    counts = []  # [attempts, checked ones]
    for row in rows:
        _, *after_each = row["response"].split("</sample>")
        if after_each and row["finish"] == "length" and "<reflect>".startswith(after_each[-1].lstrip()):
            after_each.pop()
        for number, after in enumerate(after_each):
            if number == len(counts):
                counts.append([0, 0])
            counts[number][0] += 1
            counts[number][1] += after.lstrip().startswith("<reflect>")
    return [{"attempts": n, "checked": checked / n} for n, checked in counts]


# ---- a cell: one model on one task ---------------------------------------------------------------
def average(values) -> float:
    return float(np.mean(list(values)))


def mean_of(rows: list[dict], name: str) -> float:
    return average(row[name] for row in rows)


def by_question(values, samples: int) -> np.ndarray:
    """(questions, samples) of values that come question by question."""
    return np.array(list(values), dtype=float).reshape(-1, samples)


def summarise(rows: list[dict], baseline: list[dict], samples: int, ks: list[int]) -> dict:
    """The figures of a cell: one model on one task, each question asked `samples` times, pass@k for `ks`.

    `rows` are in the order of the questions; `baseline` are the first model's.
    """
    right = by_question((row["correct"] for row in rows), samples)
    first = by_question((row["attempts"][0] for row in rows), samples)
    quantiles = (5, 25, 50, 75, 95)
    lengths = np.percentile([row["tokens"] for row in rows], quantiles).tolist()
    verdicts = [tuple(pair) for row in rows for pair in row["verdicts"]]
    cell = {
        "model": rows[0]["model"],
        "task": rows[0]["task"],
        "questions": len(right),
        "samples": samples,
        "accuracy": right.mean(),
        "interval": interval(right),
        "lenient": mean_of(rows, "lenient"),
        "no_answer": average(row["answer"] is None for row in rows),
        "pass": {str(k): average(pass_at(k, samples, int(c)) for c in right.sum(1)) for k in ks},
        "truncated": average(row["finish"] == "length" for row in rows),
        "tokens": mean_of(rows, "tokens"),
        "token_quantiles": dict(zip(quantiles, lengths, strict=True)),
        "answers": mean_of(rows, "answers"),
        "reflections": mean_of(rows, "reflections"),
        "first_attempt": first.mean(),
        "any_attempt": average(any(row["attempts"]) for row in rows),
        "retried": average(len(row["attempts"]) > 1 for row in rows),
        "retries": retries_of(rows),
        "checked": checked_by_number(rows),
        "gain": (right - first).mean(),  # over the first attempt
        "gain_interval": paired((right - first).mean(1)),
        **verdict_figures(verdicts),
    }
    if rows[0]["model"] != baseline[0]["model"]:
        difference = right - by_question((row["correct"] for row in baseline), samples)
        cell["difference"] = difference.mean()
        cell["difference_interval"] = paired(difference.mean(1))
    if "forced" in rows[0]:
        longer = [row["forced"] for row in rows]
        forced = by_question((row["correct"] for row in longer), samples)
        cell["forced"] = forced.mean()
        cell["forced_interval"] = interval(forced)
        cell["forced_tokens"] = mean_of(longer, "tokens")
        cell["forced_difference"] = (forced - right).mean()
        cell["forced_difference_interval"] = paired((forced - right).mean(1))
    return cell


def verdict_figures(verdicts: list[tuple[bool, bool]]) -> dict:
    """What the verdicts [(said, actual)] of a cell come to."""
    return {
        "f1_correct": f1(verdicts, True),
        "f1_incorrect": f1(verdicts, False),
        "verdicts": len(verdicts),
        "confusion": {
            "right called correct": verdicts.count((True, True)),
            "right called incorrect": verdicts.count((False, True)),
            "wrong called correct": verdicts.count((True, False)),
            "wrong called incorrect": verdicts.count((False, False)),
        },
    }


# ---- tables --------------------------------------------------------------------------------------
def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def with_bounds(text: str, ends: Interval) -> str:
    low, high = ends
    return f"{text} [{percent(low)}, {percent(high)}]"


def change(x: float, ends: Interval) -> str:
    return with_bounds(f"{100 * x:+.1f}", ends)


def two_places(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def with_headings(rows: list[dict[str, str]]) -> list[list[str]]:
    """The names of the first row, then the values of each, "" where it has none."""
    table = [list(rows[0])]
    for row in rows:
        table.append([row.get(name, "") for name in rows[0]])
    return table


def figures_row(cell: dict, ks: list[str]) -> dict[str, str]:
    """{heading: text}, the row of a cell in a table with these pass@k."""
    row = {
        "model": cell["model"],
        "task": cell["task"],
        "n x k": f"{cell['questions']} x {cell['samples']}",
        "accuracy %": with_bounds(percent(cell["accuracy"]), cell["interval"]),
        "against the first": "",
        "lenient": percent(cell["lenient"]),
        "no answer": percent(cell["no_answer"]),
    }
    if "difference" in cell:
        row["against the first"] = change(cell["difference"], cell["difference_interval"])
    for k in ks:
        row[f"pass@{k}"] = percent(cell["pass"][k]) if k in cell["pass"] else ""
    row["cut off"] = percent(cell["truncated"])
    row["tokens"] = f"{cell['tokens']:.0f}"
    row["answers"] = two_places(cell["answers"])
    row["reflects"] = two_places(cell["reflections"])
    shares = [percent(x["checked"]).removesuffix(".0") for x in cell["checked"][:5]]
    row["checked, by attempt"] = " ".join(shares)
    row["first / any right"] = f"{percent(cell['first_attempt'])} / {percent(cell['any_attempt'])}"
    row["F1 right"] = two_places(cell["f1_correct"])
    row["F1 wrong"] = two_places(cell["f1_incorrect"])
    if "forced" in cell:
        gain = change(cell["forced_difference"], cell["forced_difference_interval"])
        row["forced to go on"] = f"{percent(cell['forced'])} ({gain})"
    return row


def tasks_of(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(cell["task"] for cell in cells))


def by_task(cells: list[dict]) -> list[dict]:
    """The models of one task together."""
    names = tasks_of(cells)
    return sorted(cells, key=lambda cell: names.index(cell["task"]))


def all_figures(cells: list[dict]) -> list[list[str]]:
    """Headings, then a row for each cell. Sets of different sizes may have different pass@k."""
    ks = sorted({k for cell in cells for k in cell["pass"] if k != "1"}, key=int)
    return with_headings([figures_row(cell, ks) for cell in cells])


def text_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def printed_table(cells: list[dict]) -> str:
    """The table of an evaluation."""
    return text_table(all_figures(by_task(cells)))
