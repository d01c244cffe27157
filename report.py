"""The page: figures, curves, and traces that one can read, in one file that loads nothing from anywhere.

    python report.py out/evaluate                    # renews out/evaluate/report.html; evaluate.py does too
    python report.py out/grpo                        # of a run, also while it trains (a checkpoint does too)

How it is drawn and answers is in `report.js`, how it looks in `report.css`; here is what they are given.
Left out: several runs in one page; runs that log elsewhere than in their folder.
"""
import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from cli import UserError, bare_parser, command, printable, say
from files import parsed, read_json, write_whole
from grading import attempts_in
from summary import (
    all_figures, bounds, by_task, change, percent, printed_table, tasks_of, two_places, with_headings,
)

MEGABYTES = 20  # of responses in a page, about


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


def length_row(cell: dict) -> dict[str, str]:
    """Quantiles of the lengths of responses, in tokens."""
    quantiles = {f"{q}%": f"{tokens:.0f}" for q, tokens in cell["token_quantiles"].items()}
    return {"model": cell["model"], "task": cell["task"], **quantiles, "mean": f"{cell['tokens']:.0f}",
            "cut off %": percent(cell["truncated"])}


def page_tables(cells: list[dict]) -> dict[str, list[list[str]]]:
    """Those of an evaluation, by what they tell."""
    return {
        "accuracy": accuracy_table(cells),
        "verdicts": with_headings([verdict_row(cell) for cell in cells]),
        "retries": with_headings([retry_row(cell) for cell in cells]),
        "lengths": with_headings([length_row(cell) for cell in cells]),
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


def of_evaluation(out: Path, cells: list[dict], rows: list[dict]) -> str:
    """The page of an evaluation: `cells` are those of summary.json, `rows` those of results.jsonl.

    A response that was forced to go on stands beside the one that it goes on from, as of another model.
    """
    cells = by_task(cells)
    arms = list(dict.fromkeys(cell["model"] for cell in cells))
    if any("forced" in cell for cell in cells):
        arms += [f"{model}{FORCED_TO_GO_ON}" for model in arms]
    names = tasks_of(cells)
    rows = sorted(rows, key=lambda row: (names.index(row["task"]), row["id"], row["index"]))
    asked = {}  # the rows of a question
    for row in rows:
        asked.setdefault((row["task"], row["id"]), []).append(row)
    head = {
        "command": command_of(out),
        "title": "SkillFactory: evaluation",
        "cells": cells,
        "arms": arms,
        "tables": page_tables(cells),
        "groups_in_all": len(asked),
    }
    # In the page a response takes about twice its text.
    stride = stride_for(2 * sum(len(row["response"]) for row in rows))
    groups = [asked_group(of_question, arms) for of_question in list(asked.values())[::stride]]
    return page(head, groups, plain=printed_table(cells))


def asked_group(rows: list[dict], arms: list[str]) -> dict:
    """A question with the responses of all models."""
    traces = []
    for row in sorted(rows, key=lambda row: arms.index(row["model"])):
        traces.append(trace_of(row, arm=arms.index(row["model"]), index=row["index"]))
    for row in rows:
        if "forced" in row:
            arm = arms.index(row["model"] + FORCED_TO_GO_ON)
            traces.append(trace_of(row["forced"], arm=arm, index=row["index"]))
    asked = {name: rows[0][name] for name in ("task", "id", "question", "reference")}
    return {**asked, "traces": traces}


# ---- a run of training ---------------------------------------------------------------------------
def of_run(out: Path) -> str:
    """The page of a folder of `sft.py` or `grpo.py`, which may be at work."""
    rows = [parsed(line, where) for where, line in whole_lines(out / "metrics.jsonl")]
    path = out / "rollouts.jsonl"
    groups = []
    in_all = 0
    if path.exists():
        stride = stride_for(path.stat().st_size / 2)  # half of it are ids and log-probabilities
        for in_all, (where, line) in enumerate(whole_lines(path), 1):
            if in_all % stride == 0:
                groups.append(rolled_group(parsed(line, where)))
    made_by = command_of(out)
    title = f"SkillFactory: {made_by.partition('.py')[0]}"
    head = {"command": made_by, "title": title, "arms": [], "curves": curves_of(rows),
            "groups_in_all": in_all}
    return page(head, groups, plain="The curves and the rollouts of this page need JavaScript.")


def rolled_group(row: dict) -> dict:
    """A question of a step with its rollouts, of a line of rollouts.jsonl."""
    traces = []
    for i, rollout in enumerate(row["rollouts"]):
        traces.append(trace_of(rollout, index=i, reward=rollout["reward"], advantage=rollout["advantage"]))
    return {**{name: row[name] for name in ("step", "task", "id", "question", "reference")}, "traces": traces}


def curves_of(rows: list[dict]) -> list[dict]:
    """The metrics of metrics.jsonl, {"name", "points": [[step, value]]}, without what was not measured."""
    curves = []
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        points = [[row["step"], row[name]] for row in rows if isinstance(row.get(name), int | float)]
        if points:
            curves.append({"name": name, "points": points})
    return curves


# ---- the folder ----------------------------------------------------------------------------------
def whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", line) of a file whose last line may still be written."""
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            if line.endswith(b"\n"):
                yield f"{path}:{i}", line


def command_of(out: Path) -> str:
    """How a folder was made, by its run.json."""
    return " ".join(read_json(out / "run.json")["command"])


def stride_for(size: float) -> int:
    """Every how many-th question a page shows, if all would take `size` bytes."""
    return math.ceil(max(1, size) / (1e6 * MEGABYTES))


# ---- the page ------------------------------------------------------------------------------------
def page(head: dict, groups: list[dict], plain: str) -> str:
    """The page of some groups and what `head` says of all of them.

    All data is one block of JSON that no text in it can end (`to_data`). The policy lets the browser
    run this script, apply this style sheet, and load nothing. `plain` is shown where no script may run.
    """
    here = Path(__file__).resolve().parent
    script = (here / "report.js").read_text(encoding="utf-8")
    style = (here / "report.css").read_text(encoding="utf-8")
    data = to_data({**head, "groups": groups})
    policy = f"default-src 'none'; script-src '{hash_of(script)}'; style-src '{hash_of(style)}'"
    title = html.escape(head["title"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript><pre>{html.escape(printable(plain))}</pre></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


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
    """Make the page of a folder anew. It is no part of a run: what goes wrong with it is only said."""
    try:
        make(out)
    except Exception as e:
        say(f"{out}/report.html is not renewed: {e}")


def make(out: Path) -> None:
    """Make the page of a folder, whatever made the folder."""
    if (out / "summary.json").is_file():
        cells = parsed((out / "summary.json").read_bytes(), out / "summary.json")
        for cell in cells:
            cell["pass"] = {int(k): share for k, share in cell["pass"].items()}
        rows = [parsed(line, where) for where, line in whole_lines(out / "results.jsonl")]
        done = {(cell["model"], cell["task"]) for cell in cells}
        text = of_evaluation(out, cells, [row for row in rows if (row["model"], row["task"]) in done])
    elif (out / "metrics.jsonl").is_file():
        text = of_run(out)
    else:
        raise UserError(f"{out}: nothing to show yet, neither metrics.jsonl nor summary.json")
    write_whole(out / "report.html", text)


def main():
    p = bare_parser(__doc__)
    p.add_argument("folder", help="of evaluate.py, sft.py or grpo.py; FOLDER/report.html is written")
    out = Path(p.parse_args().folder)
    if not (out / "run.json").is_file():
        raise UserError(f"{out}: not a folder of evaluate.py, sft.py or grpo.py (it has no run.json)")
    make(out)
    say(f"wrote {out / 'report.html'}")


if __name__ == "__main__":
    command(main)
