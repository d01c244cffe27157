"""The page: figures, curves, and responses that one can read, in one file that loads nothing from anywhere.

    python -m report out/evaluate                    # renews out/evaluate/report.html; evaluate.py does too
    python -m report out/grpo                        # of a run, even while it trains (checkpoints renew it)

A *group* is a question with its responses: those of all models, or the rollouts of a step. `page.js`
filters them and follows links, `page.css` says how all looks.
Left out: several runs in one page; runs that log elsewhere than in their folder.
"""
import base64
import hashlib
import html
import math
import re
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import numpy as np

from grading.answers import attempts_in
from report.figures import all_figures, by_task, change, percent, tasks_of, with_headings
from run.command import UserError, bare_parser, printable, say
from run.files import parsed, read_json, whole_lines, write_whole

MEGABYTES = 10  # of responses in a page, about


# ---- markup --------------------------------------------------------------------------------------
def escaped(content) -> str:
    """A text as markup, its control characters spelled out."""
    return html.escape(printable(str(content)))


def el(name: str, *children: str, **attributes) -> str:
    """An element of some markup. el("p", "x", class_="note") -> <p class="note">x</p>"""
    opening = name
    for key, value in attributes.items():
        opening += f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
    return f"<{opening}>{''.join(children)}</{name}>"


def table(caption: str, rows: list[list[str]]) -> str:
    """A table of headings and rows. One that is wider than the screen scrolls, by keys too."""
    lines = []
    for i, row in enumerate(rows):
        lines.append(el("tr", *(el("td" if i else "th", escaped(cell)) for cell in row)))
    box = el("div", el("table", *lines), class_="scrolls", tabindex=0, role="region", aria_label=caption)
    return el("p", escaped(caption), class_="note") + box


def section(title: str, *children: str) -> str:
    return el("section", el("h2", escaped(title)), *children)


# ---- figures of an evaluation --------------------------------------------------------------------
def skill_row(cell: dict) -> dict[str, str]:
    """What further attempts did, and what each kind of attempt was called."""
    gain = change(cell["gain"], cell["gain_interval"])
    return {
        "model": cell["model"],
        "task": cell["task"],
        "responses with a retry %": percent(cell["retried"]),
        **{name: str(count) for name, count in cell["retries"].items()},
        "gain over the first attempt": gain if cell["retried"] else "-",
        **{name: str(count) for name, count in cell["confusion"].items()},
    }


def length_row(cell: dict) -> dict[str, str]:
    """Quantiles of the lengths of responses, in tokens."""
    quantiles = {f"{q}%": f"{tokens:.0f}" for q, tokens in cell["token_quantiles"].items()}
    return {"model": cell["model"], "task": cell["task"], **quantiles}


def figures_section(cells: list[dict]) -> str:
    skills = with_headings([skill_row(cell) for cell in cells])
    lengths = with_headings([length_row(cell) for cell in cells])
    return section(
        "Figures",
        table("All figures, in % [95%]; against the first: the paired difference", all_figures(cells)),
        table("Retries, by the grades of both attempts; verdicts, by the grade of the attempt", skills),
        table("Lengths in tokens: this share of the responses is at most so long", lengths))


# ---- curves of a run -----------------------------------------------------------------------------
def curves_section(rows: list[dict]) -> str:
    """A curve for each metric of metrics.jsonl, without what was not measured."""
    points = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((row["step"], value))
    curves = [curve(name, of_name) for name, of_name in points.items()]
    return section("Curves", el("div", *curves, class_="panels"))


def curve(name: str, points: list[tuple[int, float]]) -> str:
    """[(step, value)] as a line. Its caption says what it is drawn from: 0, if values come near it."""
    steps = np.array([step for step, _ in points])
    values = np.array([value for _, value in points])
    low, high = values.min(), values.max()
    if 0 <= low < high / 2 or low == high:
        low, high = min(low, 0), max(high, 0)
    x = 1000 * (steps - steps[0]) / (np.ptp(steps) or 1)
    y = 290 - 280 * (values - low) / (high - low or 1)
    corners = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    about = f" {values[-1]:.3g} at last; drawn from {low:.3g} to {high:.3g}, step {steps[0]} to {steps[-1]}"
    title = el("figcaption", escaped(name), el("small", about))
    line = el("path", d=f"M{corners}h0")
    picture = el("svg", line, viewBox="0 0 1000 300", preserveAspectRatio="none")
    return el("figure", title, picture)


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


def marked_up(response: str, grades: list[bool]) -> str:
    """The parts of a response in their colours; what a <sample> or <reflect> holds is a block."""
    pieces = []
    in_block = False
    for kind, text in parts_of(response, grades):
        what, _, content = kind.partition(" ")  # "open correct"
        if in_block and what in ("open", "close"):
            pieces.append("</div>")
            in_block = False
        pieces.append(el("span", escaped(text), class_=what))
        if what == "open":
            pieces.append(f'<div class="block {content}">')
            in_block = True
    return "".join(pieces) + ("</div>" if in_block else "")


# ---- groups of responses -------------------------------------------------------------------------
OUTCOMES = (
    "right", "wrong", "no readable answer", "cut off", "first attempt wrong, answer right",
    "first attempt right, answer wrong", "a verdict contradicts the grade",
)
UNLIKE = ("right, unlike the first model", "wrong, unlike the first model")
LEGEND = {"correct": "right attempt", "incorrect": "wrong attempt", "reflection": "check",
          "phrase": "between", "contradicts": "verdict against the grade"}


def outcomes_of(row: dict, first: dict) -> list[str]:
    """Which outcomes a response has. `first`: that of the first model with the same index."""
    words = {True: "right", False: "wrong"}
    answer = words[row["correct"]]
    before = words[row["attempts"][0]]
    outcomes = {
        answer: True,
        "no readable answer": row["answer"] is None,
        "cut off": row["finish"] == "length",
        f"first attempt {before}, answer {answer}": before != answer,
        "a verdict contradicts the grade": any(said != actual for said, actual in row["verdicts"]),
        f"{answer}, unlike the first model": row["correct"] != first["correct"],
    }
    return [name for name, holds in outcomes.items() if holds]


def response_of(row: dict, first: dict, name: list[str]) -> str:
    """A response: a line with its grade and a link to itself (`name`), which opens to show the text."""
    address = "/".join(quote(part, safe="") for part in name)
    facts = [name[-1], "right" if row["correct"] else f"wrong: {row['reason']}", f"{row['tokens']} tokens"]
    if row["finish"] == "length":
        facts.append("cut off")
    facts.append("attempts " + "".join("✓" if right else "✗" for right in row["attempts"]))
    if "reward" in row:
        facts.append(f"reward {row['reward']:.3g}, advantage {row['advantage']:+.2f}")
    line = el("summary", escaped(" · ".join(facts)), " ", el("a", "link", href=f"#{address}"))
    text = el("div", marked_up(row["response"], row["attempts"]), class_="text")
    kind = "is-right" if row["correct"] else "is-wrong"
    return el("details", line, text, id=address, class_=f"response {kind}", data_model=row.get("model", ""),
              data_outcome="|".join(outcomes_of(row, first)))


def group_of(row: dict, name: str, counts: str, responses: list[str]) -> str:
    """A question with its responses. `row` is a line of rollouts.jsonl, or one of results.jsonl."""
    line = el("summary", el("span", escaped(name), class_="asked"), escaped(counts))
    question = el("div", escaped(row["question"]), class_="asked question")
    answer = el("code", escaped(row["reference"] or "not known"), class_="asked")
    reference = el("p", "Reference answer: ", answer)
    return el("details", line, question, reference, *responses,
              class_="group", data_task=row["task"], data_step=row.get("step", ""))


def how_many_right(rows: list[dict]) -> str:
    return f"{sum(row['correct'] for row in rows)} of {len(rows)} right"


def responses_section(title: str, groups: list[str], in_all: int, choices: dict[str, list]) -> str:
    """Some of all groups, with filters: for each of the `choices` a list of values."""
    note = f"The page has room for {len(groups)} of {in_all} questions." if len(groups) < in_all else ""
    legend = [el("span", text, class_=kind) for kind, text in LEGEND.items()]
    controls = [choice(name, values) for name, values in choices.items() if len(values) > 1]
    controls.append('<label>text<input type="search" id="text"></label>')
    controls.append('<button type="button" id="clear">clear</button>')
    return section(
        title,
        el("p", *legend, class_="legend"),
        el("div", *controls, class_="controls", role="search"),
        el("p", class_="note", id="count", role="status"),
        el("p", note, class_="note"),
        *groups)


def choice(name: str, values: list) -> str:
    options = [el("option", f"all {name}s", value="")]
    options += [el("option", escaped(value), value=value) for value in values]
    return el("label", name, el("select", *options, id=name))


# ---- the two kinds of page -----------------------------------------------------------------------
def of_evaluation(out: Path, cells: list[dict], rows: list[dict]) -> str:
    """The page of an evaluation: `cells` are those of summary.json, `rows` those of results.jsonl.

    A response that was forced to go on stands beside the one that it goes on from, as of another model.
    """
    cells = by_task(cells)
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    longer = [{**row, **row["forced"], "model": forced_name(row["model"])} for row in rows if "forced" in row]
    if longer:
        models += [forced_name(model) for model in models]
    order = sorted(rows + longer, key=lambda row: (row["id"], models.index(row["model"]), row["index"]))
    questions = {(task, row["id"]): [] for task in tasks_of(cells) for row in order if row["task"] == task}
    for row in order:
        questions[row["task"], row["id"]].append(row)
    stride = stride_for(sum(len(row["response"]) for row in order))
    groups = []
    for name, of_question in list(questions.items())[::stride]:
        first = {row["index"]: row for row in of_question if row["model"] == models[0]}
        responses = []
        for row in of_question:
            last = f"{row['model']}, sample {row['index']}"
            responses.append(response_of(row, first[row["index"]], [*name, last]))
        counts = ""
        for model, mine in groupby(of_question, key=lambda row: row["model"]):
            counts += f" · {model} {how_many_right(list(mine))}"
        groups.append(group_of(of_question[0], name[1], counts, responses))
    choices = {"task": tasks_of(cells), "model": models, "outcome": OUTCOMES + UNLIKE}
    return page(out, figures_section(cells) + responses_section("Responses", groups, len(questions), choices))


def forced_name(model: str) -> str:
    return f"{model}, forced to go on"


def of_run(out: Path) -> str:
    """The page of a folder of `sft.py` or `grpo.py`, which may be at work."""
    body = curves_section([parsed(line, where) for where, line in whole_lines(out / "metrics.jsonl")])
    path = out / "rollouts.jsonl"
    if not path.exists():
        return page(out, body)
    stride = stride_for(path.stat().st_size / 3)  # most of it are ids and log-probabilities
    groups = []
    in_all = 0
    choices = {"step": {}, "task": {}, "outcome": OUTCOMES}
    for in_all, (where, line) in enumerate(whole_lines(path), 1):
        if in_all % stride == 0:
            row = parsed(line, where)
            choices["step"][row["step"]] = choices["task"][row["task"]] = True
            name = [f"step {row['step']}", row["id"]]
            responses = []
            for i, rollout in enumerate(row["rollouts"]):
                responses.append(response_of(rollout, rollout, [*name, f"rollout {i}"]))
            counts = f" · {how_many_right(row['rollouts'])}"
            groups.append(group_of(row, " / ".join(name), counts, responses))
    return page(out, body + responses_section("Rollouts", groups, in_all, choices))


def stride_for(size: float) -> int:
    """n, for a page that shows every n-th question because all would take `size` bytes."""
    return math.ceil(max(1, size) / (1e6 * MEGABYTES))


def page(out: Path, body: str) -> str:
    """A whole page. Its policy lets a browser run this one script, apply this style, and load nothing."""
    made_by = " ".join(read_json(out / "run.json")["command"])
    here = Path(__file__).resolve().parent
    script = (here / "page.js").read_text(encoding="utf-8")
    style = (here / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; script-src '{hash_of(script)}'; style-src '{hash_of(style)}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SkillFactory: {escaped(made_by.partition('.py')[0])}</title>
<style>{style}</style>
</head>
<body>
<h1>SkillFactory</h1>
<p><code>{escaped(made_by)}</code></p>
{body}
<script>{script}</script>
</body>
</html>
"""


def hash_of(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- the command ---------------------------------------------------------------------------------
def renew(out: Path) -> None:
    """Make the page of a folder again. A failure is only printed: it must not end a run."""
    try:
        make(out)
    except Exception as e:
        say(f"{out}/report.html is not renewed: {e}")


def make(out: Path) -> None:
    """Make the page of a folder, whatever made the folder."""
    if (out / "summary.json").is_file():
        cells = parsed((out / "summary.json").read_bytes(), out / "summary.json")
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
