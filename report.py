"""What an evaluation tells: tables, and a page, one HTML file with no script that loads nothing.

A leaf: `evaluate.py` imports it where it writes its results, and nothing else does.
"""
import html
import json
from pathlib import Path

import numpy as np

Interval = tuple[float, float]



# ---- tables --------------------------------------------------------------------------------------
def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def bounds(ends: Interval) -> str:
    low, high = ends
    return f"[{percent(low)}, {percent(high)}]"


def change(x: float, ends: Interval) -> str:
    return f"{100 * x:+.1f} {bounds(ends)}"


def two_places(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def table_row(cell: dict, ks: list[int]) -> dict[str, str]:
    """{heading: text}, the row of a cell in a table with these pass@k."""
    row = {
        "model": cell["model"],
        "task": cell["task"],
        "n x k": f"{cell['questions']} x {cell['samples']}",
        "accuracy %": f"{percent(cell['accuracy'])} {bounds(cell['interval'])}",
        "against the first": "",
        "lenient": percent(cell["lenient"]),
        "no answer": percent(cell["no_answer"]),
        "only form wrong": percent(cell["wrong_form"]),
    }
    if "difference" in cell:
        row["against the first"] = change(cell["difference"], cell["difference_interval"])
    for k in ks:
        row[f"pass@{k}"] = percent(cell["pass"][k]) if k in cell["pass"] else ""
    row["cut off"] = percent(cell["truncated"])
    row["tokens"] = f"{cell['tokens']:.0f}"
    row["answers"] = two_places(cell["answers"])
    row["reflects"] = two_places(cell["reflections"])
    row["first / any right"] = f"{percent(cell['first_attempt'])} / {percent(cell['any_attempt'])}"
    row["F1 right/wrong"] = f"{two_places(cell['f1_correct'])} / {two_places(cell['f1_incorrect'])}"
    if "forced" in cell:
        gain = change(cell["forced_difference"], cell["forced_difference_interval"])
        row["forced to go on"] = f"{percent(cell['forced'])} ({gain})"
    return row


def by_task(cells: list[dict]) -> list[dict]:
    """The models of one task together."""
    names = list(dict.fromkeys(cell["task"] for cell in cells))
    return sorted(cells, key=lambda cell: names.index(cell["task"]))


def table_of(cells: list[dict]) -> list[list[str]]:
    """Headings, then a row for each cell. Sets of different sizes may have different pass@k."""
    ks = sorted({k for cell in cells for k in cell["pass"] if k > 1})
    rows = [table_row(cell, ks) for cell in cells]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def paper_table(names: set[str]) -> list[list[str]]:
    """The paper's figures for the tasks of `names`, [] if it has none.

    They are of Qwen2.5-1.5B-Instruct trained on Countdown-3, accuracy in %, single runs.
    """
    paper = json.loads((Path(__file__).resolve().parent / "paper.json").read_text())
    common = [name for name in paper["tasks"] if name in names]
    if not common:
        return []
    rows = [["paper, 1.5B", *common]]
    for arm, figures in paper["arms"].items():
        figure_of = dict(zip(paper["tasks"], figures, strict=True))
        rows.append([arm, *(f"{figure_of[name]:.1f}" for name in common)])
    return rows


def text_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def tables(cells: list[dict]) -> str:
    """The table of an evaluation and, for the tasks that it has, the paper's."""
    paper = paper_table({cell["task"] for cell in cells})
    return "\n\n".join(text_table(table) for table in (table_of(by_task(cells)), paper) if table)


# ---- the page ------------------------------------------------------------------------------------
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 84rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
pre { background: #f6f6f4; padding: 1rem; white-space: pre-wrap }
.wide { overflow-x: auto }
.right { color: #197a3e }
.wrong { color: #b3261e }
svg text { font: 12px system-ui, sans-serif }
summary { cursor: pointer }
"""
PALETTE = ("#9aa5b1", "#d08c3c", "#5b8bd0", "#3b9c6b", "#a05195", "#c0504d")


def page(command_line: str, cells: list[dict], results: dict) -> str:
    """report.html. `cells` are evaluate.py's, `results` the rows by (model, task)."""
    cells = by_task(cells)
    paper = paper_table({cell["task"] for cell in cells})
    body = [
        f"<h1>SkillFactory: evaluation</h1><p><code>{html.escape(command_line)}</code></p>",
        accuracy_bars(cells),
        "<p>Bars: strict accuracy in %, line: 95% interval.</p>",
        html_table(table_of(cells)),
    ]
    if paper:
        body += ["<h2>The paper's figures</h2>", html_table(paper)]
    for cell in cells:
        rows = results[cell["model"], cell["task"]]
        body.append(f"<h2>{html.escape(cell['model'])} on {html.escape(cell['task'])}</h2>")
        body.append(length_histogram([row["tokens"] for row in rows]))
        for wanted in (True, False):
            example = next((row for row in rows if row["correct"] == wanted), None)
            if example:
                body.append(details(example))
    title = "SkillFactory: evaluation"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(body)}</html>\n'


def html_table(rows: list[list[str]]) -> str:
    """The first row holds the headings."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def details(row: dict) -> str:
    """A question and its response, folded up."""
    kind, grade = ("right", "correct") if row["correct"] else ("wrong", row["reason"])
    return (f'<details><summary class="{kind}">{html.escape(row["id"])}: {html.escape(grade)}</summary>'
            f"<pre>{html.escape(row['question'])}</pre><pre>{html.escape(row['response'])}</pre></details>")


def accuracy_bars(cells: list[dict]) -> str:
    """Accuracy of every model on every task, with its interval, as an SVG."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    colours = {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}
    top = max(0.05, max(cell["interval"][1] for cell in cells))
    parts = []
    x = 40
    for task in tasks:
        start = x
        for cell in cells:
            if cell["task"] == task:
                parts.append(bar(x, cell, colours[cell["model"]], scale=180 / top))
                x += 40
        middle = (start + x) / 2 - 3
        parts.append(svg_text(middle, 228, task, "middle"))
        x += max(30, 7 * len(task) - (x - start))
    for i, model in enumerate(models):  # the legend
        at = 40 + 190 * i
        parts.append(f'<rect x="{at}" y="240" width="12" height="12" fill="{colours[model]}"/>')
        parts.append(svg_text(at + 17, 250, model))
    width = max(x, 60 + 190 * len(models))
    axis = f'<path d="M34 210H{x}" stroke="#999"/>'
    return svg(width, 262, "accuracy in percent", axis + "".join(parts))


def bar(x: float, cell: dict, colour: str, scale: float) -> str:
    height = scale * cell["accuracy"]
    low, high = (scale * bound for bound in cell["interval"])
    return (f'<rect x="{x}" y="{210 - height:.1f}" width="34" height="{height:.1f}" fill="{colour}"/>'
            f'<path d="M{x + 17} {210 - low:.1f}V{210 - high:.1f}" stroke="#222"/>'
            + svg_text(x + 17, f"{205 - high:.1f}", f"{100 * cell['accuracy']:.0f}", "middle"))


def length_histogram(tokens: list[int]) -> str:
    """Distribution of the response lengths of one cell as an SVG of 40 bins."""
    counts, edges = np.histogram(tokens, bins=40)
    scale = 56 / max(counts.max(), 1)
    bins = []
    for i, count in enumerate(counts):
        height = scale * count
        y = 60 - height
        bins.append(f'<rect x="{9 * i}" y="{y:.1f}" width="8" height="{height:.1f}" fill="#5b8bd0"/>')
    ends = svg_text(0, 75, f"{edges[0]:.0f}") + svg_text(360, 75, f"{edges[-1]:.0f} tokens", "end")
    return svg(370, 78, "tokens of a response", "".join(bins) + ends)


def svg(width: float, height: float, label: str, content: str) -> str:
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{content}</svg>'


def svg_text(x: float, y: float | str, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
