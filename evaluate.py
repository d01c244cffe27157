"""Accuracy with intervals, use of the skills, budget forcing, and the page that shows it.

    python evaluate.py                                                        # the miniature on three small sizes
    python evaluate.py --models base=mini,sft=out/sft,grpo=out/grpo --tasks countdown-3-small,countdown-4-small --budget-forcing
    python evaluate.py --models Qwen/Qwen2.5-1.5B-Instruct --tasks gsm8k --data-dir data --questions 0 --max-new-tokens 4096

All models get the same questions, so the difference to the first is paired. Intervals are at 95%. An answer counts if it is
the last one after </think> (strict); the lenient figure takes the last one anywhere, which tells a wrong answer from a
response that never came to its end.

Left out: several GPUs (start one process a task), going on with an interrupted evaluation, judging by another model.
"""
import html
import json
import math
import os
import re
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tasks
from cli import UserError, command, natural, number, parser, positive, refuse_existing, run_record, to_json, write_whole
from model import Config, find, load, read_json
from sample import Completion, Params, Request, Sampler

# The paper's table (Qwen2.5-1.5B-Instruct trained on Countdown-3, accuracy in %, single runs), to print beside ours.
PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())


# ---- statistics ------------------------------------------------------------------------------------------------------
def wilson(right, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); it stays within 0..1 and is sane at 0 and n."""
    p, centre = right / n, right / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def bootstrap(means, seed=0, draws=4000):
    """95% interval of the mean over questions: the questions are drawn again, not the samples, which hang together."""
    means = np.asarray(means, dtype=float)
    rng = np.random.default_rng(seed)
    estimates = [means[rng.integers(0, len(means), len(means))].mean() for _ in range(draws)]
    return tuple(float(x) for x in np.quantile(estimates, (0.025, 0.975)))


def interval(right):
    """95% interval of the accuracy. right: (questions, samples) of 0 and 1. One sample each: Wilson; else by question. With no
    spread between questions a bootstrap collapses to a point, and Wilson over the questions is the honest one."""
    right = np.asarray(right)
    means = right.mean(1)
    if right.shape[1] == 1 or means.std() == 0:
        return wilson(means.sum(), len(means))
    return bootstrap(means)


def paired(differences):
    """95% interval of a mean difference over questions. Where all questions agree the bootstrap would claim certainty; the bound
    there is what n questions can exclude (Wilson at 0 of n)."""
    differences = np.asarray(differences, dtype=float)
    if differences.std() > 0:
        return bootstrap(differences)
    margin = wilson(0, len(differences))[1]
    return max(-1.0, differences.mean() - margin), min(1.0, differences.mean() + margin)


def pass_at(k, n, c):
    """Chance that at least one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if k > n:
        raise UserError(f"--k: pass@{k} needs at least {k} samples of a question, there are {n}; raise --samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def f1(pairs, label):
    """F1 of the verdicts for one class. pairs: [(said, true)]; None if the class never occurs on either side."""
    hit, off = sum(said == true == label for said, true in pairs), sum((said == label) != (true == label) for said, true in pairs)
    return 2 * hit / (2 * hit + off) if hit + off else None


# ---- use of the skills -----------------------------------------------------------------------------------------------
BLOCK = re.compile(r"<sample>(.*?)</sample>\s*(?:<reflect>(.*?)</reflect>)?", re.DOTALL)


def skills(task, problem, text):
    """What a response shows of the skills: explicit answers and reflections, and each verdict with the grade it judged.

    The answers are those inside <think> (outside stands only the final one); without <think>, all.
    """
    thought = text.partition("<think>")[2].partition("</think>")[0] or text
    judged = [(said, task.grade(problem, attempt, lenient=True).correct)
              for attempt, reflection in BLOCK.findall(thought) if (said := tasks.verdict(reflection)) is not None]
    return {"answers": thought.count("</answer>"), "reflections": text.count("<reflect>"), "verdicts": judged}


# ---- budget forcing --------------------------------------------------------------------------------------------------
def forced_prompt(tokenizer, completion):
    """(ids to go on from, ids kept of the response), for a response that ended within its budget.

    Cut before the last </think> (at the end, if there is none) and open a new <sample>. The ids that stay are the sampled ones
    and the new ones are appended as ids: nothing is decoded and encoded again, so no token before the cut can change.
    """
    kept = completion.tokens[:-1]  # the stop token goes in any case
    cut = tokenizer.decode(kept).rfind("</think>")
    if cut >= 0:
        low, high = 0, len(kept)  # the longest prefix of ids whose text ends at or before the tag
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(tokenizer.decode(kept[:middle])) <= cut else (low, middle - 1)
        kept = kept[:low]
    line = "" if tokenizer.decode(kept).endswith("\n") else "\n"
    kept = kept + tokenizer.encode(f"{line}<sample>\n")
    return completion.prompt + kept, kept


def force(sampler, problems, groups, params, seed, bar):
    """The responses with their thinking prolonged: each that ended by itself goes on, up to twice the budget in all."""
    out, queue = [list(group) for group in groups], deque()
    for i, group in enumerate(groups):
        for j, c in enumerate(group):
            prompt, kept = forced_prompt(sampler.tokenizer, c)
            left = 2 * params.max_new_tokens - len(kept)
            if c.finish == "stop" and left > 0 and len(prompt) < sampler.model.config.max_position_embeddings:
                queue.append(Request(prompt, [j], f"forced/{problems[i].id}", max_new_tokens=left, tag=(i, kept)))
    for request, j, c in sampler.stream(queue, params, seed):
        i, kept = request.tag
        out[i][j] = Completion(groups[i][j].prompt, kept + c.tokens, [], c.finish)
        bar.update()
    return out


# ---- one model on one task -------------------------------------------------------------------------------------------
def run_cell(name, sampler, task, problems, samples, params, args):
    """The rows of results.jsonl for one model and task, one a sample."""
    tokenizer = sampler.tokenizer
    prompts = [tokenizer.chat(task.prompt(p, args.style)) for p in problems]
    count = len(prompts) * samples * (2 if args.budget_forcing else 1)
    with tqdm(total=count, desc=f"{name} {task.name}", unit="", leave=False, disable=None) as bar:
        groups = sampler.generate(prompts, samples, params, args.seed, [p.id for p in problems], bar)
        forced = force(sampler, problems, groups, params, args.seed, bar) if args.budget_forcing else None
    rows = []
    for i, (problem, group) in enumerate(zip(problems, groups)):
        for j, c in enumerate(group):
            text = tokenizer.text(c.tokens)
            grade = task.grade(problem, text)
            row = {"model": name, "task": task.name, "id": problem.id, "index": j, "question": problem.question, "response": text,
                   "tokens": len(c.tokens), "finish": c.finish, "answer": grade.answer, "correct": grade.correct, "reason": grade.reason,
                   "lenient": task.grade(problem, text, lenient=True).correct, **skills(task, problem, text)}
            if forced:
                text = tokenizer.text(forced[i][j].tokens)
                row["forced"] = {"response": text, "tokens": len(forced[i][j].tokens), "finish": forced[i][j].finish,
                                 "correct": task.grade(problem, text).correct}
            rows.append(row)
    return rows


def summarise(rows, first, samples, ks):
    """The figures of one cell. `first`: the rows of the first model on the same task, for the paired difference."""
    by_question = lambda rows, value: np.array([value(r) for r in rows], dtype=float).reshape(-1, samples)
    right = by_question(rows, lambda r: r["correct"])
    verdicts = [v for r in rows for v in r["verdicts"]]
    cell = {"model": rows[0]["model"], "task": rows[0]["task"], "questions": len(right), "samples": samples,
            "accuracy": right.mean(), "interval": interval(right), "lenient": by_question(rows, lambda r: r["lenient"]).mean(),
            "pass": {k: float(np.mean([pass_at(k, samples, int(c)) for c in right.sum(1)])) for k in ks},
            "truncated": float(np.mean([r["finish"] == "length" for r in rows])), **{name: float(np.mean([r[name] for r in rows])) for name in ("tokens", "answers", "reflections")},
            "token_quantiles": {q: float(np.quantile([r["tokens"] for r in rows], q / 100)) for q in (5, 25, 50, 75, 95)},
            "f1_correct": f1(verdicts, True), "f1_incorrect": f1(verdicts, False), "verdicts": len(verdicts)}
    if first is not rows:
        difference = (right - by_question(first, lambda r: r["correct"])).mean(1)
        cell["difference"], cell["difference_interval"] = float(difference.mean()), paired(difference)
    if "forced" in rows[0]:
        forced = by_question(rows, lambda r: r["forced"]["correct"])
        cell |= {"forced": forced.mean(), "forced_interval": interval(forced),
                 "forced_tokens": float(np.mean([r["forced"]["tokens"] for r in rows])),
                 "forced_difference": float((forced - right).mean()), "forced_difference_interval": paired((forced - right).mean(1))}
    return cell


# ---- tables ----------------------------------------------------------------------------------------------------------
def columns(cells):
    """[(heading, function of a cell)] of the table."""
    percent = lambda x: f"{100 * x:.1f}"
    within = lambda i: f"[{100 * i[0]:.1f}, {100 * i[1]:.1f}]"
    change = lambda x, i: f"{100 * x:+.1f} {within(i)}"
    maybe = lambda x: "-" if x is None else f"{x:.2f}"
    table = [("model", lambda c: c["model"]), ("task", lambda c: c["task"]), ("n x k", lambda c: f"{c['questions']} x {c['samples']}"),
             ("accuracy %", lambda c: f"{percent(c['accuracy'])} {within(c['interval'])}"),
             ("against the first", lambda c: change(c["difference"], c["difference_interval"]) if "difference" in c else ""), ("lenient", lambda c: percent(c["lenient"])),
             *((f"pass@{k}", lambda c, k=k: percent(c["pass"][k])) for k in cells[0]["pass"] if k > 1),
             ("cut off", lambda c: percent(c["truncated"])), ("tokens", lambda c: f"{c['tokens']:.0f}"), ("answers", lambda c: maybe(c["answers"])),
             ("reflects", lambda c: maybe(c["reflections"])), ("F1 right/wrong", lambda c: f"{maybe(c['f1_correct'])} / {maybe(c['f1_incorrect'])}")]
    if "forced" in cells[0]:
        table.append(("forced to go on", lambda c: f"{percent(c['forced'])} ({change(c['forced_difference'], c['forced_difference_interval'])})"))
    return table


def text_table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def paper_rows(names):
    """The paper's table, cut down to the tasks of `names`; [] if it has none of them."""
    shared = [t for t in PAPER["tasks"] if t in names]
    rows = [[arm, *(f"{x:.1f}" for t, x in zip(PAPER["tasks"], figures) if t in names)] for arm, figures in PAPER["arms"].items()]
    return [["paper, 1.5B", *shared], *rows] if shared else []


# ---- the page --------------------------------------------------------------------------------------------------------
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222}table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}pre{background:#f6f6f4;padding:1rem;white-space:pre-wrap}
.wide{overflow-x:auto}.right{color:#197a3e}.wrong{color:#b3261e}svg text{font:12px system-ui,sans-serif}summary{cursor:pointer}"""
PALETTE = ("#9aa5b1", "#d08c3c", "#5b8bd0", "#3b9c6b", "#a05195", "#c0504d")


def bars(cells):
    """Accuracy of every model on every task, with its interval, as an SVG."""
    models, names = list(dict.fromkeys(c["model"] for c in cells)), list(dict.fromkeys(c["task"] for c in cells))
    top = max(0.05, max(c["interval"][1] for c in cells))
    parts, x = [], 40
    for task in names:
        start = x
        for c in (c for c in cells if c["task"] == task):
            colour = PALETTE[models.index(c["model"]) % len(PALETTE)]
            bar, low, high = (180 * v / top for v in (c["accuracy"], *c["interval"]))
            parts.append(f'<rect x="{x}" y="{210 - bar:.1f}" width="34" height="{bar:.1f}" fill="{colour}"/>'
                         f'<path d="M{x + 17} {210 - low:.1f}V{210 - high:.1f}" stroke="#222"/>'
                         f'<text x="{x + 17}" y="{205 - high:.1f}" text-anchor="middle">{100 * c["accuracy"]:.0f}</text>')
            x += 40
        parts.append(f'<text x="{(start + x) / 2 - 3}" y="228" text-anchor="middle">{html.escape(task)}</text>')
        x += max(30, 7 * len(task) - (x - start))
    for i, model in enumerate(models):  # the legend
        parts.append(f'<rect x="{40 + 190 * i}" y="240" width="12" height="12" fill="{PALETTE[i % len(PALETTE)]}"/>'
                     f'<text x="{57 + 190 * i}" y="250">{html.escape(model)}</text>')
    return (f'<svg width="{max(x, 60 + 190 * len(models))}" height="262" role="img" aria-label="accuracy in percent">'
            f'<path d="M34 210H{x}" stroke="#999"/>{"".join(parts)}</svg>')


def lengths(rows):
    """Distribution of the response lengths of one cell as an SVG of 40 bins."""
    counts, edges = np.histogram([r["tokens"] for r in rows], bins=40)
    top = max(counts.max(), 1)
    bins = "".join(f'<rect x="{9 * i}" y="{60 - 56 * n / top:.1f}" width="8" height="{56 * n / top:.1f}" fill="#5b8bd0"/>' for i, n in enumerate(counts))
    ends = f'<text x="0" y="75">{edges[0]:.0f}</text><text x="360" y="75" text-anchor="end">{edges[-1]:.0f} tokens</text>'
    return f'<svg width="370" height="78" role="img" aria-label="tokens of a response">{bins}{ends}</svg>'


def page(cells, results, command_line):
    """report.html: one file, no script, nothing loaded from elsewhere."""
    def table(rows):
        cells = ["".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
        return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'
    cells = sorted(cells, key=lambda c: [x["task"] for x in cells].index(c["task"]))  # the models of one task together
    shown = columns(cells)
    body = [f"<h1>SkillFactory: evaluation</h1><p><code>{html.escape(command_line)}</code></p>", bars(cells),
            "<p>Bars: strict accuracy in %, line: 95% interval.</p>", table([[h for h, _ in shown]] + [[f(c) for _, f in shown] for c in cells])]
    if paper := paper_rows({c["task"] for c in cells}):
        body += ["<h2>The paper's figures</h2>", table(paper)]
    for c in cells:
        rows = results[c["model"], c["task"]]
        examples = [r for r in (next((r for r in rows if r["correct"]), None), next((r for r in rows if not r["correct"]), None)) if r]
        body.append(f"<h2>{html.escape(c['model'])} on {html.escape(c['task'])}</h2>{lengths(rows)}" + "".join(
            f'<details><summary class="{"right" if r["correct"] else "wrong"}">{html.escape(r["id"])}: {"correct" if r["correct"] else html.escape(r["reason"])}</summary>'
            f"<pre>{html.escape(r['question'])}</pre><pre>{html.escape(r['response'])}</pre></details>" for r in examples))
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>SkillFactory: evaluation</title><style>{STYLE}</style>{"".join(body)}</html>\n'


# ---- the command -----------------------------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out="out/evaluate", model="")
    p.add_argument("--models", default="base=mini", help="name=folder or hub id, separated by commas; the first is what the others are compared with")
    p.add_argument("--tasks", default="countdown-3-small,countdown-4-small,countdown-5-small", help=f"separated by commas: {tasks.NAMES}")
    p.add_argument("--split", default="test", help=f"which problems: {', '.join(tasks.SPLITS)}")
    p.add_argument("--questions", type=natural, default=100, help="how many of each task (0: all rows of a file)")
    p.add_argument("--samples", type=natural, default=0, help="responses to each question; 0: 4, or 34 for sets of under 100 questions")
    p.add_argument("--k", default=None, help="pass@k for these k, separated by commas; if not given, for the number of samples")
    p.add_argument("--max-new-tokens", type=positive, default=512, help="budget of a response")
    p.add_argument("--budget-forcing", action="store_true", help="besides, let responses that ended go on with a new <sample>, up to twice the budget")
    p.add_argument("--style", default="plain", choices=list(tasks.STYLES), help="prompt style; `instruct` explains the tags to a model that was not trained on them")
    p.add_argument("--temperature", type=number(float, 0), default=1.0, help="0 is greedy")
    p.add_argument("--top-p", type=number(float, 0, 1, open_low=True), default=1.0, help="keep the likeliest tokens up to this mass")
    p.add_argument("--top-k", type=natural, default=0, help="keep this many of the likeliest tokens; 0 keeps all")
    p.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/, math500/ and the like lie")
    p.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: as many as fit in memory")
    args = p.parse_args()
    args.models = [tuple(m.split("=", 1)) if "=" in m else (os.path.basename(m.rstrip("/")), m) for m in args.models.split(",")]
    if len({name for name, _ in args.models}) < len(args.models):
        raise UserError("--models: two models have the same name; give them as name=folder")
    try:
        args.k = [int(k) for k in args.k.split(",")] if args.k else []
        if any(k < 1 for k in args.k):
            raise ValueError
    except ValueError:
        raise UserError(f"--k {args.k}: give whole numbers from 1 on, separated by commas, such as 1,4")
    return args


def main():
    args = arguments()
    plan = []
    for task in tasks.find_all(args.tasks, args.data_dir):
        problems = task.problems(args.split, args.questions, args.seed)
        samples = args.samples or (4 if len(problems) >= 100 else 34)
        ks = args.k or [samples]
        pass_at(max(ks), samples, 0)  # refuse before the work, not after
        plan.append((task, problems, samples, ks))
    out = Path(args.out)
    refuse_existing(out)
    for _, folder in args.models:  # the same for the models: a name mistyped at the end of the list costs no hours
        folder = find(folder)
        Config(read_json(folder / "config.json"), folder / "config.json")
    params = Params(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    cells, results = [], {}
    for name, folder in args.models:
        model, tokenizer = load(folder, args.device, args.dtype)
        sampler = Sampler(model, tokenizer, args.slots)
        if not out.exists():  # not before a model could be loaded: a mistake leaves no folder behind
            write_whole(out / "run.json", json.dumps(run_record(args), indent=2))
        for task, problems, samples, ks in plan:
            rows = results[name, task.name] = run_cell(name, sampler, task, problems, samples, params, args)
            cells.append(summarise(rows, results[args.models[0][0], task.name], samples, ks))
            with open(out / "results.jsonl", "a", encoding="utf-8") as f:
                f.writelines(to_json(row) + "\n" for row in rows)
            write_whole(out / "summary.json", json.dumps(cells, indent=2))
            write_whole(out / "report.html", page(cells, results, " ".join(run_record(args)["command"])))
            print(f"{name} on {task.name}: {100 * cells[-1]['accuracy']:.1f}%", flush=True)
        del model, sampler
    shown = columns(cells)
    print("\n" + text_table([[h for h, _ in shown]] + [[f(c) for _, f in shown] for task, *_ in plan for c in cells if c["task"] == task.name]))
    if paper := paper_rows({task.name for task, *_ in plan}):
        print("\n" + text_table(paper))
    print(f"\nwrote {out}/results.jsonl, {out}/summary.json and {out}/report.html")


if __name__ == "__main__":
    command(main)
