"""The page: figures, curves, and traces that one can read, in one file that loads nothing from anywhere.

    python report.py out/evaluate                    # renews out/evaluate/report.html; evaluate.py does too
    python report.py out/grpo                        # of a run, also while it trains (a checkpoint does too)
    python report.py out/grpo --megabytes 100        # with more of its rollouts

What is drawn and how it answers is in `report.js`, how it looks in `report.css`; here is what they are given.
A leaf: `evaluate.py` and `run.py` import it where they write the page, and nothing else does.

Left out: several runs in one page; runs that log elsewhere than in their folder.
"""
import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError, bare_parser, check_types, command, number, read_json, row_of, write_whole
from grading import attempts_in, extract_answer, verdict
from screen import printable
from summary import ROW, by_task, check_row, tables, tables_of
from tokenizer import Tokenizer

MEGABYTES = 20.0  # of traces in a page, unless told otherwise


# ---- a response in its parts ---------------------------------------------------------------------
TAG = re.compile(r"(</?(?:think|sample|reflect|answer|verdict)>\n?)")
GRADED = {True: "correct", False: "incorrect", None: "attempt"}


def parts_of(response: str, grades: list[bool]) -> list[tuple[str, str]]:
    """[(kind, text)] of a response; the texts, joined, are the response.

    `grades` are those of its attempts or, where it has no <sample>, the one of the whole. Kinds of text:
    correct, incorrect, attempt (one without a grade); reflection; agrees, contradicts, verdict (one without
    an attempt); answer (the final one); phrase (what stands between). Kinds of tags: "open correct" and its
    like, before what <sample> and <reflect> hold; close; tag. A line break after a tag goes with it.

    parts_of("<sample>5</sample>", [True])
    ->  [("open correct", "<sample>"), ("correct", "5"), ("close", "</sample>")]
    """
    attempts = attempts_in(response)
    grade_at = {attempt.at: grade for attempt, grade in zip(attempts, grades, strict=False)}
    outside = "phrase" if attempts or not grades else GRADED[grades[0]]
    block = outside
    inner = ""  # the tag that is open in the block: verdict or answer
    grade = None  # of the last attempt
    parts = []
    at = 0
    for text in TAG.split(response):
        tag = text.rstrip("\n")
        if not TAG.fullmatch(text):
            kind = block
            if inner == "verdict":
                kind = kind_of_verdict(text, grade)
            elif inner == "answer" and block == outside:
                kind = "answer"
        elif tag in ("<verdict>", "<answer>", "</verdict>", "</answer>"):
            inner = tag.strip("<>") if tag[1] != "/" else ""
            kind = "tag"
        else:
            inner = ""
            block = outside
            if tag == "<sample>":
                grade = grade_at.get(at)
                block = GRADED[grade]
            elif tag == "<reflect>":
                block = "reflection"
            kind = "close" if block == outside else f"open {block}"
        parts.append((kind, text))
        at += len(text)
    return [(kind, text) for kind, text in parts if text]


def kind_of_verdict(text: str, grade: bool | None) -> str:
    said = verdict(f"<verdict>{text}</verdict>")
    if said is None or grade is None:
        return "verdict"
    return "agrees" if said == grade else "contradicts"


MOST_TOKENS_OF_A_CHARACTER = 8  # its four bytes, and as many before them that begin none


def pieces_of(tokenizer: Tokenizer, ids: list[int], text: str) -> list[str]:
    """What each token adds to a text; [] if that cannot be told. A character comes with its last token.

    Each is decoded alone; where that does not add up to the text, with those before it, on which some
    decoders depend.
    """
    pieces = [tokenizer.decode([token]) for token in ids]
    if "".join(pieces) == text:
        return pieces
    pieces = []
    context = 0
    known = 0  # ids[context:known] have their pieces
    for i in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[context:known])
        piece = tokenizer.decode(ids[context:i])[len(before):]
        within_a_character = piece.endswith("\ufffd") and i - known < MOST_TOKENS_OF_A_CHARACTER
        if within_a_character and i < len(ids):
            pieces.append("")
        else:
            pieces.append(piece)
            context = known
            known = i
    return pieces if "".join(pieces) == text else []


def tokens_of(rollout: dict, tokenizer: Tokenizer) -> dict:
    """The tokens of a rollout, {} where they cannot be told apart: ids, how much of the text each is, and
    minus their log-probabilities in thousandths of a nat.

    Text is measured as JavaScript does, where characters beyond the first 65,536 count as two.
    """
    ids = rollout["ids"]
    stopped = rollout["finish"] == "stop"
    sampled = ids[:-1] if stopped else ids
    text = tokenizer.decode(sampled)
    pieces = pieces_of(tokenizer, sampled, text)
    if tokenizer.opening + text != rollout["response"] or (text and not pieces):
        return {}

    def width(piece):
        return len(printable(piece).encode("utf-16-le")) // 2

    def surprise(logprobs):
        return logprobs and [round(-1000 * logp) for logp in logprobs]

    return {
        "ids": ids,
        "opening": width(tokenizer.opening),  # of the prompt's
        "widths": [*map(width, pieces), *[0] * stopped],
        "end": tokenizer.decode(ids[-1:]) if stopped else "",
        "sampler": surprise(rollout["sampler_logprobs"]),
        "trainer": surprise(rollout["trainer_logprobs"]),
    }


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
def of_evaluation(out: Path, cells: list[dict], results: dict, megabytes: float = MEGABYTES) -> str:
    """The page of an evaluation: `cells` are those of summary.json, `results` as of `read_results`."""
    cells = by_task(cells)
    arms = list(dict.fromkeys(cell["model"] for cell in cells))
    if any("forced" in cell for cell in cells):
        arms += [f"{arm}{FORCED_TO_GO_ON}" for arm in arms]
    results = {(cell["model"], cell["task"]): results[cell["model"], cell["task"]] for cell in cells}
    asked = {}  # {task: {id: rows}}, the models in their order
    for cell in cells:
        rows_of = asked.setdefault(cell["task"], {})
        for (identity, _), row in sorted(results[cell["model"], cell["task"]].items()):
            rows_of.setdefault(identity, []).append(row)
    questions = [(task, identity) for task, rows_of in asked.items() for identity in sorted(rows_of)]
    return page(
        title="SkillFactory: evaluation",
        head={
            **origin_of(out),
            "cells": cells,
            "arms": arms,
            "lengths": [lengths_of(name, arms, results) for name in asked],
            "tables": tables_of(cells),
        },
        groups=[partial(asked_group, task, asked[task][identity], arms) for task, identity in questions],
        megabytes=megabytes,
        plain=tables(cells),
    )


FORCED_TO_GO_ON = ", forced to go on"


def asked_group(task: str, rows: list[dict], arms: list[str]) -> dict:
    """A question with the responses of all models."""
    traces = []
    for row in rows:
        traces.append(trace_of(row, arm=arms.index(row["model"]), index=row["index"]))
    for row in rows:
        if "forced" in row:
            answer, _ = extract_answer(row["forced"]["response"])
            longer = {**row, **row["forced"], "answer": answer, "reason": "", "attempts": [], "verdicts": []}
            arm = arms.index(row["model"] + FORCED_TO_GO_ON)
            traces.append(trace_of(longer, arm=arm, index=row["index"]))
    first = rows[0]
    return {
        "task": task,
        "id": first["id"],
        "question": first["question"],
        "reference": first.get("reference") or "",
        "traces": traces,
    }


def lengths_of(task: str, arms: list[str], results: dict) -> dict:
    """Histograms of the lengths of right and wrong responses, in the same bins for all models."""
    lengths = {}
    for arm in arms:
        for row in results.get((arm, task), {}).values():
            lengths.setdefault(arm, {True: [], False: []})[row["correct"]].append(row["tokens"])
    most = max(max(of_arm[True] + of_arm[False]) for of_arm in lengths.values())
    edges = np.linspace(0, most + 1, BINS + 1)
    bars = []
    for arm, of_arm in lengths.items():
        bars.append({
            "arm": arms.index(arm),
            "right": np.histogram(of_arm[True], edges)[0].tolist(),
            "wrong": np.histogram(of_arm[False], edges)[0].tolist(),
            "median": float(np.median(of_arm[True] + of_arm[False])),
        })
    return {"task": task, "most": most, "bars": bars}


BINS = 40

# Types of what `tables` and the page read of a cell. Others, such as pass@k, may be there or not.
def read_evaluation(out: Path) -> tuple[list[dict], dict]:
    """(cells, results) of a folder of `evaluate.py`, which may be at work."""
    path = out / "summary.json"
    try:
        cells = json.loads(path.read_bytes())
        for cell in cells:
            cell["pass"] = {int(k): share for k, share in cell["pass"].items()}
        tables_of(cells)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path}: damaged, or of another version; evaluate.py --resume makes it anew") from e
    results = {}
    for where, row in whole_rows(out / "results.jsonl", ROW):
        check_row(row, where, forced=False)
        results.setdefault((row["model"], row["task"]), {})[row["id"], row["index"]] = row
    for cell in cells:
        if len(results.get((cell["model"], cell["task"]), {})) != cell["questions"] * cell["samples"]:
            raise UserError(f"{out}/results.jsonl: rows of {cell['model']} on {cell['task']} are missing; "
                            "evaluate.py --resume asks again")
    return cells, results


# ---- a run of training ---------------------------------------------------------------------------
def of_run(out: Path, megabytes: float = MEGABYTES) -> str:
    """The page of a folder of `sft.py` or `grpo.py`, which may be at work."""
    rows = [row for _, row in whole_rows(out / "metrics.jsonl", {"step": int})]
    path = out / "rollouts.jsonl"
    starts = starts_of_lines(path) if path.exists() else []
    tokenizer = Tokenizer(out) if starts else None
    groups = [partial(rolled_group, path, number, start, tokenizer) for number, start in enumerate(starts)]
    origin = origin_of(out)
    return page(
        title=f"SkillFactory: {origin['command'].partition('.py')[0]}",
        head={**origin, "arms": [], "curves": curves_of(rows)},
        groups=groups,
        megabytes=megabytes,
        plain="The curves and the rollouts of this page need JavaScript.",
    )


GROUP = {"step": int, "task": str, "id": str, "question": str, "reference": str, "rollouts": list}
ROLLOUT = {
    "response": str, "answer": str | None, "correct": bool, "reason": str, "reward": float | int,
    "advantage": float | int, "finish": str, "tokens": int, "attempts": list, "verdicts": list, "ids": list,
    "sampler_logprobs": list, "trainer_logprobs": list | None,
}


def rolled_group(path: Path, number: int, start: int, tokenizer: Tokenizer) -> dict:
    """A question of a step with its rollouts, from the line of this number that begins at byte `start`."""
    where = f"{path}:{number + 1}"
    with open(path, "rb") as f:
        f.seek(start)
        row = row_of(f.readline(), where, GROUP)
    traces = []
    for i, rollout in enumerate(row["rollouts"]):
        try:
            check_types(rollout, ROLLOUT, where)
            trace = trace_of(rollout, index=i, reward=rollout["reward"], advantage=rollout["advantage"])
            traces.append({**trace, **tokens_of(rollout, tokenizer)})
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise UserError(f"{where}: rollout {i + 1} is damaged; remove this line") from e
    return {
        "step": row["step"],
        "task": row["task"],
        "id": row["id"],
        "question": row["question"],
        "reference": row["reference"],
        "traces": traces,
    }


# What is drawn together, (title, unit, metrics). What is in none of them gets a chart of its own.
CHARTS = (
    ("Reward", "%", ("reward", "correct", "val")),
    ("Loss", "nats", ("loss", "val_loss")),
    ("Length of a response", "tokens", ("response_tokens",)),
    ("Entropy", "nats a token", ("entropy",)),
    ("Cut off at the budget", "%", ("truncated",)),
    ("Groups whose rewards differ", "%", ("groups_with_signal",)),
    ("Tokens that were clipped", "%", ("clip_fraction",)),
    ("Gradient norm", "", ("grad_norm",)),
    ("Sampler against trainer", "nats a token", ("sampler_trainer_mean",)),
    ("Sampler against trainer, at most", "nats", ("sampler_trainer_max",)),
    ("Divergence", "nats a token", ("approx_kl", "reference_kl")),
    ("Learning rate", "", ("lr",)),
    ("Seconds of a step", "s", ("rollout_seconds", "update_seconds")),
    ("Speed", "tokens/s", ("rollout_tokens_per_second", "tokens_per_second")),
)
MOST_POINTS = 2000


def curves_of(rows: list[dict]) -> dict:
    """The charts of metrics.jsonl: steps, and for each metric its values there (None: not measured).

    Where there are more than MOST_POINTS steps, a point is the mean of several.
    """
    each = -(-len(rows) // MOST_POINTS)
    buckets = [rows[i:i + each] for i in range(0, len(rows), each or 1)]
    values = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        points = [mean_of([row.get(name) for row in bucket]) for bucket in buckets]
        if points.count(None) < len(points):
            values[name] = points
    charts = []
    for title, unit, names in CHARTS:
        found = {name: values.pop(name) for name in names if name in values}
        if found:
            charts.append({"title": title, "unit": unit, "lines": found})
    charts += [{"title": name, "unit": "", "lines": {name: points}} for name, points in values.items()]
    return {"steps": [bucket[-1]["step"] for bucket in buckets], "each": each, "charts": charts}


def mean_of(values: list) -> float | None:
    """The mean of those that are numbers, to six digits."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None


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
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with the first step")
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            if line.endswith(b"\n"):
                yield f"{path}:{i}", row_of(line, f"{path}:{i}", types)


def origin_of(out: Path) -> dict:
    """How a folder was made, by its run.json."""
    record = read_json(out / "run.json")
    return {"command": " ".join(map(str, record.get("command", ""))), "settings": record.get("flags", {})}


# ---- the page ------------------------------------------------------------------------------------
def page(title: str, head: dict, groups: list[Callable[[], dict]], megabytes: float, plain: str) -> str:
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
        if shown and size > 1e6 * megabytes:
            break
        shown[place] = text
    head = {"title": title, **head, "groups_in_all": len(groups)}
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
    return json.dumps(visible(value), separators=(",", ":")).replace("<", "\\u003c")


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
def renew(out: Path, megabytes: float = MEGABYTES) -> None:
    """Make the page of a folder anew, whatever made the folder."""
    if (out / "results.jsonl").is_file():
        text = of_evaluation(out, *read_evaluation(out), megabytes)
    else:
        text = of_run(out, megabytes)
    write_whole(out / "report.html", text)


def main():
    p = bare_parser(__doc__)
    p.add_argument("folder", help="of evaluate.py, sft.py or grpo.py; FOLDER/report.html is written")
    p.add_argument("--megabytes", type=number(float, 0, open_low=True), default=MEGABYTES,
                   help="the most that responses may take; what is left out is counted on the page, and its "
                        "figures and curves are of all")
    args = p.parse_args()
    out = Path(args.folder)
    if not (out / "run.json").is_file():
        raise UserError(f"{out}: not a folder of evaluate.py, sft.py or grpo.py (it has no run.json)")
    renew(out, args.megabytes)
    print(f"wrote {printable(str(out / 'report.html'))}")


if __name__ == "__main__":
    command(main)
