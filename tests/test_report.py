"""The page tells what the files tell: responses in their parts, figures of all rows, whole groups."""
import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import conftest
import pytest
from conftest import CHAT, MINI, ROOT, read_rows, refused, write_jsonl
from test_evaluate import TRACE

import evaluate
import grpo
import report.page as report
import sft
import tasks
from report.figures import summarise
from report.page import parts_of
from run.command import CONTROL, printable

HOSTILE = ("</script><script>alert(1)</script><img src=x onerror=alert(1)> & \"'`${x} <!-- ]]> \\u003c "
           + "".join(map(chr, CONTROL)) + "\U0001f600 é 中 \u202e")
TASK = tasks.find("multiply-2")


def result(model="base", number=0, index=0, response=TRACE, **change):
    """A row of results.jsonl."""
    problem = tasks.Problem(f"q{number}", TASK.name, f"question {number}", {"answer": "6"})
    grade = TASK.grade(problem, response)
    return {
        "model": model, "task": TASK.name, "id": problem.id, "index": index, "question": problem.question,
        "reference": "6", "response": response, "tokens": len(response), "finish": "stop",
        "answer": grade.answer, "correct": grade.correct, "reason": grade.reason, "lenient": grade.correct,
        **TASK.skills(problem, response), **change,
    }


def evaluation(out, rows, samples=1):
    """A folder as evaluate.py leaves it. Returns (cells, rows)."""
    results = {}
    for row in rows:
        results.setdefault((row["model"], row["task"]), {})[row["id"], row["index"]] = row
    first = next(iter(results.values()))
    cells = [summarise([of[name] for name in sorted(of)], [first[name] for name in sorted(first)],
                       samples, [samples]) for of in results.values()]
    out.mkdir(exist_ok=True)
    write_jsonl(out / "results.jsonl", rows)
    (out / "summary.json").write_text(json.dumps(cells))
    (out / "run.json").write_text(json.dumps({"command": ["evaluate.py", HOSTILE], "flags": {"x": HOSTILE}}))
    return json.loads(json.dumps(cells)), rows


def responses(n, seed=0):
    """Traces with attempts that are right and wrong in many orders."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        blocks = []
        for _ in range(rng.randint(0, 4)):
            said = rng.choice(["Correct", "Incorrect", "unsure"])
            blocks.append(f"<sample>\n<answer>{rng.choice([6, 7])}</answer>\n</sample>\n"
                          f"<reflect>\n<verdict>{said}</verdict>\n</reflect>\n")
        answer = rng.choice(["<answer>6</answer>", "<answer>8</answer>", "none"])
        made.append(f"<think>\n{''.join(blocks)}</think>\n{answer}")
    return made


class Page(HTMLParser):
    """What a browser finds in a page: its tags and texts, its policy, the responses by their addresses."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self.scripts = {}
        self.groups = []  # [{address: text of the response}]
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        assert "src" not in attributes and attributes.get("href", "#")[0] == "#"
        if tag not in ("meta", "input"):
            self.open.append((tag, attributes.get("class", "")))
        if attributes.get("class") == "group":
            self.groups.append({})
        if attributes.get("class", "").startswith("response"):
            self.address = unquote(attributes["id"])
            self.groups[-1][self.address] = ""
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, text):
        if self.open and self.open[-1][0] in ("script", "style"):
            self.scripts[self.open[-1][0]] = text
            return
        self.texts.append(text)
        if any(kind == "text" for _, kind in self.open):
            self.groups[-1][self.address] += text

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag


# ---- a response in its parts -----------------------------------------------------------------------
def test_the_parts_of_a_trace():
    """Each attempt by its grade, each verdict by whether it agrees with it."""
    parts = parts_of(TRACE, [False, True])
    assert "".join(text for _, text in parts) == TRACE
    told = [(kind, text.strip()) for kind, text in parts if text.strip() and kind not in ("tag", "close")]
    assert told == [
        ("open incorrect", "<sample>"), ("incorrect", "a"), ("incorrect", "7"),
        ("open reflection", "<reflect>"), ("reflection", "no"), ("agrees", "Incorrect"), ("phrase", "Again."),
        ("open correct", "<sample>"), ("correct", "6"),
        ("open reflection", "<reflect>"), ("reflection", "no"), ("contradicts", "Incorrect"),
        ("phrase", "So"), ("answer", "6")]


@pytest.mark.parametrize("text, grades, kinds", [
    ("5 <answer>6</answer>", [True], ["correct", "tag", "answer", "tag"]),
    ("<sample>5", [False], ["open attempt", "attempt"]),  # never closed: no attempt of its own
    # Verdicts that do not count: outside a check, in an attempt, not the last one, unreadable.
    ("<sample>5</sample><verdict>Correct</verdict>", [False],
     ["open incorrect", "incorrect", "close", "tag", "verdict", "tag"]),
    ("<sample><verdict>Correct</verdict></sample>", [False],
     ["open incorrect", "tag", "verdict", "tag", "close"]),
    ("<sample>5</sample><reflect><verdict>Incorrect</verdict><verdict>Correct</verdict>", [False],
     ["open incorrect", "incorrect", "close", "open reflection",
      "tag", "verdict", "tag", "tag", "contradicts", "tag"]),
    ("<sample>5</sample><reflect><VERDICT>correct</VERDICT>", [True],
     ["open correct", "correct", "close", "open reflection", "tag", "agrees", "tag"]),
    # Only the second is in a thought.
    ("<sample>5</sample><think><sample>6</sample>", [True],
     ["open attempt", "attempt", "close", "close", "open correct", "correct", "close"]),
])
def test_the_parts_of_what_is_no_whole_trace(text, grades, kinds):
    parts = parts_of(text, grades)
    assert [kind for kind, _ in parts] == kinds and "".join(part for _, part in parts) == text


# ---- the page --------------------------------------------------------------------------------------
def test_text_is_never_markup(tmp_path):
    """Whatever is in any field: the page has the same tags, and no control character reaches it."""
    rows = [result(model, 0, response=HOSTILE + TRACE, question=HOSTILE, task=HOSTILE, id=HOSTILE,
                   reference=HOSTILE, answer=HOSTILE, reason=HOSTILE) for model in ("base", HOSTILE)]
    plain = [result(model, 0, response="x" + TRACE) for model in ("base", "other")]
    pages = []
    for of in (rows, plain):
        text = report.of_evaluation(tmp_path, *evaluation(tmp_path, of))
        assert not set(text) & set(map(chr, CONTROL))
        pages.append(Page(text))
    hostile, harmless = pages
    assert hostile.tags == harmless.tags and hostile.tags.count("script") == 1 and not hostile.open
    assert "".join(hostile.texts).count(printable(HOSTILE)) >= 10
    group, = hostile.groups
    assert list(group.values()) == [printable(HOSTILE + TRACE)] * 2


def test_the_page_may_load_nothing(tmp_path):
    """Its policy names this script and this style by their hashes, and nothing else."""
    page = Page(report.of_evaluation(tmp_path, *evaluation(tmp_path, [result()])))
    hashes = [base64.b64encode(hashlib.sha256(page.scripts[name].encode()).digest()).decode()
              for name in ("script", "style")]
    script, style = hashes
    assert page.policy == f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    for name in ("page.js", "page.css"):
        source = (ROOT / "report" / name).read_text()
        assert not re.search(r"</s|https?://(?!www.w3.org)|innerHTML|eval\(|@import|url\(", source)


def test_same_data_same_bytes(tmp_path):
    """In whatever order several processes wrote it."""
    rows = [result(model, number, index, text) for model in ("a", "b") for number in range(3)
            for index, text in enumerate(responses(2))]
    first = report.of_evaluation(tmp_path, *evaluation(tmp_path, rows, samples=2))
    again = sorted(rows, key=lambda row: (row["model"], row["index"], -ord(row["id"][1])))
    assert report.of_evaluation(tmp_path, *evaluation(tmp_path, again, samples=2)) == first
    report.renew(tmp_path)
    assert (tmp_path / "report.html").read_text() == first


def test_figures_are_of_all_rows_and_groups_are_whole(tmp_path, monkeypatch):
    """However few of the responses a page has room for."""
    rows = [result(model, number, index, text) for model in ("a", "b") for number in range(40)
            for index, text in enumerate(responses(2, seed=number))]
    made = evaluation(tmp_path, rows, samples=2)
    whole = Page(report.of_evaluation(tmp_path, *made))
    monkeypatch.setattr(report, "MEGABYTES", 0.01)
    small = Page(report.of_evaluation(tmp_path, *made))
    assert len(whole.groups) == 40 and 3 < len(small.groups) < 20
    assert all(group in whole.groups and len(group) == 4 for group in small.groups)
    assert f"The page has room for {len(small.groups)} of 40 questions." in small.texts
    assert whole.texts[:whole.texts.index("Responses")] == small.texts[:small.texts.index("Responses")]


def test_what_retries_and_verdicts_did():
    """By a second way of counting, from the text."""
    rows = [result("a", number, 0, text) for number, text in enumerate(responses(200))]
    cell = summarise(rows, rows, 1, [1])
    said, steps, gained = [], [], 0
    for row in rows:
        attempts = [answer == "6" for answer in re.findall(r"<sample>\n<answer>(\d)", row["response"])]
        for right, verdict in zip(attempts, re.findall(r"<verdict>(\w+)", row["response"]), strict=True):
            said.append((right, verdict))
        steps += pairwise(attempts)
        final = row["response"].endswith("<answer>6</answer>")
        gained += final - (attempts[0] if attempts else final)
    name = {True: "right", False: "wrong"}
    for before in (True, False):
        for after in (True, False):
            count = cell["retries"][f"{name[before]} to {name[after]}"]
            assert count == steps.count((before, after)) > 0
        for verdict in ("Correct", "Incorrect"):
            count = cell["confusion"][f"{name[before]} called {verdict.lower()}"]
            assert count == said.count((before, verdict)) > 0
    assert cell["gain"] == pytest.approx(gained / 200)
    assert cell["accuracy"] - cell["first_attempt"] == pytest.approx(cell["gain"])
    low, high = cell["gain_interval"]
    assert low < cell["gain"] < high


# ---- folders ---------------------------------------------------------------------------------------
GRPO = (*conftest.GRPO, "--questions", "8", "--reward", "random", "--out", "run")
EVALUATE = ("--models", f"a={MINI},b={MINI}", "--device", "cpu", "--questions", "2", "--samples", "2",
            "--tasks", "countdown-2-small,countdown-3-small", "--max-new-tokens", "60", "--budget-forcing",
            "--out", "run")


def page_of(out="run"):
    return Page(Path(out, "report.html").read_text())


def test_an_evaluation_ends_with_its_page(cmd):
    assert cmd(evaluate, *EVALUATE)[0] == 0
    before = Path("run/report.html").read_bytes()
    status, out, err = cmd(report, "run")
    assert status == 0 and "wrote run/report.html" in out, err
    assert Path("run/report.html").read_bytes() == before
    shown = {address: text for group in page_of().groups for address, text in group.items()}
    rows = read_rows("run/results.jsonl")
    assert len(shown) == 2 * len(rows)
    for row in rows:
        where = f"{row['task']}/{row['id']}/{row['model']}"
        assert row["reference"]
        assert shown[f"{where}, sample {row['index']}"] == row["response"]
        assert shown[f"{where}, forced to go on, sample {row['index']}"] == row["forced"]["response"]


def test_a_run_has_a_page_from_its_first_checkpoint_on(cmd):
    assert cmd(grpo, *GRPO, "--steps", "3", "--save-every", "1", "--keep", "2")[0] == 0
    page = page_of()
    rows = read_rows("run/metrics.jsonl")
    about = page.texts[page.texts.index("reward") + 1]
    assert about.startswith(f" {rows[-1]['reward']:.3g} at last;") and about.endswith(" step 1 to 3")
    logged = read_rows("run/rollouts.jsonl")
    assert len(page.groups) == len(logged) == 6
    for group, row in zip(page.groups, logged, strict=True):
        for i, rollout in enumerate(row["rollouts"]):
            assert group[f"step {row['step']}/{row['id']}/rollout {i}"] == rollout["response"]
            assert any(f"advantage {rollout['advantage']:+.2f}" in text for text in page.texts)
    assert not list(Path("run/checkpoints").rglob("report.html"))  # it is no part of a model
    before = Path("run/report.html").read_bytes()
    with open("run/rollouts.jsonl", "a") as f, open("run/metrics.jsonl", "a") as g:  # being written
        f.write('{"step": 4, "ta')
        g.write('{"step": 4, "re')
    assert cmd(report, "run")[0] == 0
    assert Path("run/report.html").read_bytes() == before


def test_a_page_that_cannot_be_made_ends_no_run(cmd, monkeypatch):
    write_jsonl("chat.jsonl", CHAT[:4])
    assert cmd(sft, *conftest.SFT, "--epochs", "2", "--out", "run")[0] == 0
    assert {"loss", "lr", "grad_norm"} <= set(page_of().texts) and page_of().groups == []

    def fail(out):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(report, "make", fail)
    status, out, err = cmd(sft, *conftest.SFT, "--epochs", "2", "--out", "other")
    assert status == 0 and "report.html is not renewed: [Errno 28]" in out, err


def test_folders_without_a_page(cmd):
    Path("run").mkdir()
    refused(cmd, report, ("run",), "run: not a folder of evaluate.py, sft.py or grpo.py")
    Path("run/run.json").write_text('{"command": [], "flags": {}}')
    refused(cmd, report, ("run",), "run: nothing to show yet, neither metrics.jsonl nor summary.json")
    Path("run/metrics.jsonl").write_text("[1\n")
    refused(cmd, report, ("run",), "run/metrics.jsonl:1: not valid JSON")
