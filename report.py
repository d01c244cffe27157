"""The page: figures, curves, and traces that one can read, in one file that loads nothing from anywhere.

    python report.py out/evaluate                    # renews out/evaluate/report.html; evaluate.py does too
    python report.py out/grpo                        # of a run, also while it trains (a checkpoint does too)

How it is drawn and answers is in `report.js`, how it looks in `report.css`; here is what they are given.
A leaf: `evaluate.py` and `run.py` import it where they write the page, and nothing else does.

Left out: several runs in one page; runs that log elsewhere than in their folder.
"""
import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError, bare_parser, command, printable, say
from files import check_row, parsed, read_json, write_whole
from grading import attempts_in
from summary import (
    ROW, all_figures, bounds, by_task, change, check_result, percent, printed_table, tasks_of, two_places,
    with_headings,
)

MEGABYTES = 20.0  # of traces in a page


# ---- tables --------------------------------------------------------------------------------------
def accuracy_table(cells: list[dict]) -> list[list[str]]:
    """A row for each model, a column for each task."""
    names = tasks_of(cells)
    rows = {}
    for cell in cells:
        row = rows.setdefault(cell["model"], {"model": cell["model"], **dict.fromkeys(names, "")})
        row[cell["task"]] = f"{percent(cell['accuracy'])} {bounds(cell['interval'])}"
        if "difference" in cell:
            difference = change(cell["difference"], cell["difference_interval"])
            row[cell["task"]] += f"\n{difference} vs {cells[0]['model']}"
        row[cell["task"]] += f"\nno answer: {percent(cell['no_answer'])}"
    return with_headings(list(rows.values()))


def verdict_row(cell: dict) -> dict[str, str]:
    """Use of the skills, as in the paper's Table 4, and what each kind of attempt was called."""
    return {
        "model": cell["model"],
        "task": cell["task"],
        "answers": two_places(cell["answers"]),
        "reflections": two_places(cell["reflections"]),
        "F1 right / wrong": f"{two_places(cell['f1_correct'])} / {two_places(cell['f1_incorrect'])}",
        **{name: str(count) for name, count in cell["confusion"].items()},
    }


def retry_row(cell: dict) -> dict[str, str]:
    """What further attempts did, and what they are worth."""
    return {
        "model": cell["model"],
        "task": cell["task"],
        "responses with a retry %": percent(cell["retried"]),
        **{name: str(count) for name, count in cell["retries"].items()},
        "first attempt %": percent(cell["first_attempt"]),
        "final answer %": percent(cell["accuracy"]),
        "gain": change(cell["gain"], cell["gain_interval"]) if cell["retried"] else "-",
    }


def page_tables(cells: list[dict]) -> dict[str, list[list[str]]]:
    """Those of an evaluation, by what they tell."""
    return {
        "accuracy": accuracy_table(cells),
        "verdicts": with_headings([verdict_row(cell) for cell in cells]),
        "retries": with_headings([retry_row(cell) for cell in cells]),
        "all": all_figures(cells),
    }


# ---- a response in its parts ---------------------------------------------------------------------
TAG = re.compile(r"(</?(?:think|sample|reflect|answer|(?i:verdict))>\n?)")
GRADED = {True: "correct", False: "incorrect", None: "attempt"}


def parts_of(response: str, grades: list[bool]) -> list[tuple[str, str]]:
    """[(kind, text)] of a response; the texts, joined, are the response.

    `grades` are those of its attempts or, where it has no <sample>, the one of the whole. Kinds of text:
    correct, incorrect, attempt (one without a grade); reflection; agrees, contradicts (a verdict by the grade
    of its attempt), verdict (one that does not count); answer (the final one); phrase (what stands between).
    Kinds of tags: "open correct" and its like, before what <sample> and <reflect> hold; close; tag. A line
    break after a tag goes with it.

    parts_of("<sample>5</sample>", [True])
    ->  [("open correct", "<sample>"), ("correct", "5"), ("close", "</sample>")]
    """
    attempts = attempts_in(response)
    grade_at = {}  # by where an attempt begins
    verdict_at = {}  # agrees or contradicts, by where it begins
    for attempt, grade in zip(attempts, grades, strict=False):
        grade_at[attempt.at] = grade
        if attempt.said is not None:
            verdict_at[attempt.said_at] = "agrees" if attempt.said == grade else "contradicts"
    outside = "phrase" if attempts or not grades else GRADED[grades[0]]
    block = outside
    inner = ""  # what is open in the block: an answer, or a kind of verdict
    parts = []
    at = 0
    for text in TAG.split(response):
        tag = text.rstrip("\n").lower()
        if not TAG.fullmatch(text):
            kind = inner or block
            if inner == "answer" and block != outside:  # an attempt's own
                kind = block
        elif tag in ("<answer>", "<verdict>", "</answer>", "</verdict>"):
            inner = {"<answer>": "answer", "<verdict>": verdict_at.get(at, "verdict")}.get(tag, "")
            kind = "tag"
        else:
            inner = ""
            block = {"<sample>": GRADED[grade_at.get(at)], "<reflect>": "reflection"}.get(tag, outside)
            kind = "close" if block == outside else f"open {block}"
        parts.append((kind, text))
        at += len(text)
    return [(kind, text) for kind, text in parts if text]


def trace_of(row: dict, **more) -> dict:
    """What the page shows of a response: of a row of results.jsonl, or of a rollout."""
    return {
        "parts": parts_of(row["response"], row["attempts"]),
        "length": row["tokens"],
        "finish": row["finish"],
        "correct": row["correct"],
        "answer": row["answer"],
        "reason": row["reason"],
        "attempts": row["attempts"],
        "contradicted": sum(said != actual for said, actual in row["verdicts"]),
        **more,
    }


# ---- an evaluation -------------------------------------------------------------------------------
FORCED_TO_GO_ON = ", forced to go on"
BINS = 40


def of_evaluation(out: Path, cells: list[dict], results: dict) -> str:
    """The page of an evaluation: `cells` are those of summary.json, `results` as of `evaluate.read_results`.

    A response that was forced to go on stands beside the one that it goes on from, as of another model.
    """
    cells = by_task(cells)
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    arms = list(models)
    if any("forced" in cell for cell in cells):
        arms += [f"{model}{FORCED_TO_GO_ON}" for model in models]
    lengths = {}  # of right and wrong responses, by task and model
    asked = {}  # the rows of a question, by task and id
    for cell in cells:
        task = cell["task"]
        rows = [row for _, row in sorted(results[cell["model"], task].items())]
        lengths.setdefault(task, {})[cell["model"]] = rows
        for row in rows:
            asked.setdefault((task, row["id"]), []).append(row)
    return page(
        title="SkillFactory: evaluation",
        head={
            **origin_of(out),
            "cells": cells,
            "arms": arms,
            "lengths": {task: lengths_of(of_task) for task, of_task in lengths.items()},
            "tables": page_tables(cells),
        },
        groups=[partial(asked_group, rows, arms) for rows in asked.values()],
        plain=printed_table(cells),
    )


def asked_group(rows: list[dict], arms: list[str]) -> dict:
    """A question with the responses of all models."""
    traces = [trace_of(row, arm=arms.index(row["model"]), index=row["index"]) for row in rows]
    for row in rows:
        if "forced" in row:
            longer = {"answer": None, "reason": "", "attempts": [], "verdicts": [], **row["forced"]}
            arm = arms.index(row["model"] + FORCED_TO_GO_ON)
            traces.append(trace_of(longer, arm=arm, index=row["index"]))
    first = rows[0]
    return {
        "task": first["task"],
        "id": first["id"],
        "question": first["question"],
        "reference": first["reference"] or "",
        "traces": traces,
    }


def lengths_of(rows: dict[str, list[dict]]) -> dict:
    """Histograms of the lengths of right and wrong responses of each model, in the same bins for all."""
    longest = max(row["tokens"] for of_model in rows.values() for row in of_model)
    edges = np.linspace(0, longest + 1, BINS + 1)

    def histogram(of_model, correct):
        lengths = [row["tokens"] for row in of_model if row["correct"] == correct]
        return np.histogram(lengths, edges)[0].tolist()

    bars = []
    for model, of_model in rows.items():
        bars.append({
            "model": model,
            "right": histogram(of_model, True),
            "wrong": histogram(of_model, False),
            "median": float(np.median([row["tokens"] for row in of_model])),
        })
    return {"longest": longest, "bars": bars}


def read_evaluation(out: Path) -> tuple[list[dict], dict]:
    """(cells, results) of a folder of `evaluate.py`, which may be at work."""
    path = out / "summary.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes when the first model is through with a task")
    cells = parsed(path.read_bytes(), path)
    for cell in cells:
        cell["pass"] = {int(k): share for k, share in cell["pass"].items()}
    results = {}
    for where, row in whole_rows(out / "results.jsonl", ROW):
        check_result(row, where, forced=False)
        results.setdefault((row["model"], row["task"]), {})[row["id"], row["index"]] = row
    return cells, results


# ---- a run of training ---------------------------------------------------------------------------
def of_run(out: Path) -> str:
    """The page of a folder of `sft.py` or `grpo.py`, which may be at work."""
    rows = [row for _, row in whole_rows(out / "metrics.jsonl", {"step": int})]
    path = out / "rollouts.jsonl"
    starts = starts_of_lines(path) if path.exists() else []
    origin = origin_of(out)
    return page(
        title=f"SkillFactory: {origin['command'].partition('.py')[0]}",
        head={**origin, "arms": [], "curves": curves_of(rows)},
        groups=[partial(rolled_group, path, line, start) for line, start in enumerate(starts, 1)],
        plain="The curves and the rollouts of this page need JavaScript.",
    )


GROUP = {"step": int, "task": str, "id": str, "question": str, "reference": str, "rollouts": list}
ROLLOUT = {
    "response": str, "answer": str | None, "correct": bool, "reason": str, "reward": float | int,
    "advantage": float | int, "finish": str, "tokens": int, "attempts": list, "verdicts": list,
}


def rolled_group(path: Path, line: int, start: int) -> dict:
    """A question of a step with its rollouts, from the line that begins at byte `start`."""
    where = f"{path}:{line}"
    with open(path, "rb") as f:
        f.seek(start)
        row = parsed(f.readline(), where)
    check_row(row, GROUP, where)
    traces = []
    for i, rollout in enumerate(row["rollouts"]):
        check_row(rollout, ROLLOUT, where)
        traces.append(trace_of(rollout, index=i, reward=rollout["reward"], advantage=rollout["advantage"]))
    return {**{name: row[name] for name in GROUP if name != "rollouts"}, "traces": traces}


MOST_POINTS = 2000  # of a curve


def curves_of(rows: list[dict]) -> list[dict]:
    """The metrics of metrics.jsonl, {"name", "points": [[step, value]]}, without what was not measured.

    Where there are more than MOST_POINTS, a point is the mean of several.
    """
    curves = []
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        each = math.ceil(len(points) / MOST_POINTS)
        means = []
        for i in range(0, len(points), max(1, each)):
            some = points[i:i + each]
            means.append([some[-1][0], float(f"{sum(value for _, value in some) / len(some):.6g}")])
        if means:
            curves.append({"name": name, "points": means})
    return curves


# ---- files that may be growing -------------------------------------------------------------------
def starts_of_lines(path: Path) -> list[int]:
    """Where the whole lines of a file begin; the last one may still be written."""
    starts = [0]
    with open(path, "rb") as f:
        for line in f:
            if line.endswith(b"\n"):
                starts.append(starts[-1] + len(line))
    return starts[:-1]


def whole_rows(path: Path, types: dict) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of the whole lines of a file."""
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            if line.endswith(b"\n"):
                row = parsed(line, f"{path}:{i}")
                check_row(row, types, f"{path}:{i}")
                yield f"{path}:{i}", row


def origin_of(out: Path) -> dict:
    """How a folder was made, by its run.json."""
    record = read_json(out / "run.json")
    check_row(record, {"command": list, "flags": dict}, out / "run.json")
    return {"command": " ".join(map(str, record["command"])), "settings": record["flags"]}


# ---- the page ------------------------------------------------------------------------------------
def page(title: str, head: dict, groups: list[Callable[[], dict]], plain: str) -> str:
    """The page: `head`, and as many of the groups as fit, from all over them, each made when it is wanted.

    All data is one block of JSON that no text in it can end (`to_data`). The policy lets the browser
    run this script, apply this style sheet, and load nothing. `plain` is shown where no script may run.
    """
    here = Path(__file__).resolve().parent
    script = (here / "report.js").read_text(encoding="utf-8")
    style = (here / "report.css").read_text(encoding="utf-8")
    shown = {}  # the JSON of a group, by its place
    size = 0
    for place in spread(len(groups)):
        text = to_data(groups[place]())
        size += len(text)
        if shown and size > 1e6 * MEGABYTES:
            break
        shown[place] = text
    settings = {name: json.dumps(value, ensure_ascii=False) for name, value in head["settings"].items()}
    head = {"title": title, **head, "settings": settings, "groups_in_all": len(groups)}
    in_order = ",\n".join(shown[place] for place in sorted(shown))
    data = f'{to_data(head)[:-1]},"groups":[\n{in_order}]}}'
    policy = f"default-src 'none'; script-src '{hash_of(script)}'; style-src '{hash_of(style)}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
<noscript><pre>{html.escape(printable(plain))}</pre></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def spread(n: int) -> list[int]:
    """0..n-1 in an order of which every beginning is spread evenly: the last, the first, and in between.

    spread(5)  ->  [4, 0, 2, 1, 3]
    """
    order = [n - 1] * (n > 0)
    stride = 2 ** n.bit_length()
    while stride:
        order += range(0, n, stride)
        stride //= 2
    return list(dict.fromkeys(order))


def to_data(value) -> str:
    """JSON in ASCII and without a "<", in which all control characters are spelled out."""
    return json.dumps(visible(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def visible(value):
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(name)): visible(of_name) for name, of_name in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    return value


def hash_of(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- the command ---------------------------------------------------------------------------------
def renew(out: Path) -> None:
    """Make the page of a folder anew, whatever made the folder."""
    if (out / "results.jsonl").is_file():
        text = of_evaluation(out, *read_evaluation(out))
    elif (out / "metrics.jsonl").is_file():
        text = of_run(out)
    else:
        raise UserError(f"{out}: nothing to show yet, neither metrics.jsonl nor results.jsonl")
    write_whole(out / "report.html", text)


def main():
    p = bare_parser(__doc__)
    p.add_argument("folder", help="of evaluate.py, sft.py or grpo.py; FOLDER/report.html is written")
    out = Path(p.parse_args().folder)
    if not (out / "run.json").is_file():
        raise UserError(f"{out}: not a folder of evaluate.py, sft.py or grpo.py (it has no run.json)")
    renew(out)
    say(f"wrote {out / 'report.html'}")


if __name__ == "__main__":
    command(main)
