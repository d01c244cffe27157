"""The page of an evaluation: its size, the time to make it and the time to open it.

    python benchmarks/page.py                            # of 100, 1,000 and 10,000 responses
    python benchmarks/page.py --traces 100 --words 1000

The responses are made up: attempts of dictionary words, with checks and verdicts, about 2,000 characters, of
two models, five each to a question. A page is open when its script has run and the browser has drawn it; for
that playwright and a Chromium must be installed, else it is not measured.
"""
import math
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from common import write  # first of ours: it sets the path

import report
import tasks
from cli import command, parser, positive, split_list
from files import to_json
from grading import dictionary
from summary import summarise

MODELS = ("base", "sft+grpo")
SAMPLES = 5


def response(rng: random.Random, words: int) -> str:
    """About so many words in one to four attempts."""
    known = list(dictionary())
    attempts = rng.randint(1, 4)
    text = "<think>\n"
    for _ in range(attempts):
        said = " ".join(rng.choices(known, k=words // attempts))
        verdict = rng.choice(["Correct", "Incorrect"])
        text += (f"<sample>\n{said}\n<answer>{rng.randint(6, 7)}</answer>\n</sample>\n"
                 f"<reflect>\nLet me see.\n<verdict>{verdict}</verdict>\n</reflect>\n")
    return f"{text}</think>\n\n<answer>\n{rng.randint(6, 7)}\n</answer>"


def made_up(traces: int, words: int, seed: int) -> tuple[list[dict], dict]:
    """(cells, results) as `report.of_evaluation` takes them."""
    rng = random.Random(f"{seed}/{traces}")
    task = tasks.find("multiply-2")
    results = {}
    for number in range(math.ceil(traces / (len(MODELS) * SAMPLES))):
        problem = tasks.Problem(f"{task.name}/{number}", task.name, "What is 2 * 3?", {"answer": "6"})
        for model in MODELS:
            for index in range(SAMPLES):
                text = response(rng, words)
                grade = task.grade(problem, text)
                results.setdefault((model, task.name), {})[problem.id, index] = {
                    "model": model, "task": task.name, "id": problem.id, "index": index,
                    "question": problem.question, "reference": "6", "response": text,
                    "tokens": len(text) // 4, "finish": "stop", "answer": grade.answer,
                    "correct": grade.correct, "reason": grade.reason, "lenient": grade.correct,
                    "wrong_form": False, **task.skills(problem, text),
                }
    rows = {name: list(of_cell.values()) for name, of_cell in results.items()}
    first = next(iter(rows.values()))
    return [summarise(of_cell, first, SAMPLES, [SAMPLES]) for of_cell in rows.values()], results


def seconds_to_open(path: Path, repeats: int) -> list[float]:
    """[] without a browser."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("playwright or a Chromium is missing: not opened")
        return []
    seconds = []
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            tab = browser.new_page()
            started = time.perf_counter()
            tab.goto(path.as_uri())
            tab.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))")
            seconds.append(time.perf_counter() - started)
            tab.close()
        browser.close()
    return seconds


def main():
    p = parser(__doc__, out=None, model=None)
    p.add_argument("--traces", default="100,1000,10000", help="how many responses, with commas between")
    p.add_argument("--words", type=positive, default=250, help="of a response, about")
    p.add_argument("--repeats", type=positive, default=5)
    args = p.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "run.json").write_text(to_json({"command": ["evaluate.py"], "flags": {}}))
        for traces in map(int, split_list(args.traces, "--traces")):
            cells, results = made_up(traces, args.words, args.seed)
            making = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                text = report.of_evaluation(out, cells, results, megabytes=1000)
                making.append(time.perf_counter() - started)
            (out / "report.html").write_text(text)
            opening = seconds_to_open(out / "report.html", args.repeats)
            row = {"traces": sum(map(len, results.values())), "megabytes": round(len(text) / 1e6, 2),
                   "seconds_to_make": round(statistics.median(making), 3)}
            if opening:
                row["seconds_to_open"] = round(statistics.median(opening), 3)
                row["slowest"] = round(max(opening), 3)
            print(row)
            found.append(row)
    write("page", args, rows=found)


if __name__ == "__main__":
    command(main)
