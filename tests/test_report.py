"""The page tells what the files tell: responses in their parts, figures of all rows, whole groups."""
import base64
import hashlib
import json
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import CHAT, MINI, ROOT, read_rows, refused, write_jsonl
from test_evaluate import TRACE

import evaluate
import grpo
import report
import sft
import tasks
from report import parts_of, spread
from cli import CONTROL, printable
from summary import summarise
from tokenizer import Tokenizer

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
        "wrong_form": False, **TASK.skills(problem, response), **change,
    }


def evaluation(out, rows, samples=1):
    """A folder as evaluate.py leaves it. Returns (cells, results)."""
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
    return cells, results


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
    """What a browser finds in a page: its tags, the text of its scripts and style, its policy."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.contents = {}
        self.inside = None
        self.feed(text)
        self.data = json.loads(self.contents["data"])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        assert not attributes.keys() & {"src", "href"}
        self.inside = attributes.get("id", tag)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, text):
        self.contents[self.inside] = self.contents.get(self.inside, "") + text

    def handle_endtag(self, tag):
        self.inside = None


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
    ("5", [False], ["incorrect"]),
    ("<sample>5", [False], ["open attempt", "attempt"]),  # never closed: no attempt of its own
    ("<sample>5</sample>", [], ["open attempt", "attempt", "close"]),
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
    ("<verdict>Correct</verdict>", [True], ["tag", "verdict", "tag"]),
    ("<sample>5</sample><reflect><verdict>maybe</verdict>", [True],
     ["open correct", "correct", "close", "open reflection", "tag", "verdict", "tag"]),
    # Only the second is in a thought.
    ("<sample>5</sample><think><sample>6</sample>", [True],
     ["open attempt", "attempt", "close", "close", "open correct", "correct", "close"]),
    ("", [False], []),
])
def test_the_parts_of_what_is_no_whole_trace(text, grades, kinds):
    parts = parts_of(text, grades)
    assert [kind for kind, _ in parts] == kinds and "".join(part for _, part in parts) == text


def test_tokens_lie_where_their_text_is():
    """Also where a character has several tokens, or two units of JavaScript, or is spelled out."""
    tokenizer = Tokenizer(MINI)
    for text in ("abc 12", "é中\U0001f600", "a\x1b[31m\u202e", "\ufffd", "", "\U0001f600" * 9):
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)
        if text.isascii():
            assert pieces == [tokenizer.decode([token]) for token in ids]
        for finish, sampled in (("stop", [*ids, tokenizer.end_id]), ("length", ids)):
            rollout = {"ids": sampled, "finish": finish, "response": text,
                       "sampler_logprobs": [-0.5] * len(sampled), "trainer_logprobs": None}
            found = tokens_of(rollout, tokenizer)
            assert sum(found["widths"]) == len(printable(text).encode("utf-16-le")) // 2
            assert len(found["widths"]) == len(sampled) == len(found["sampler"]) and found["trainer"] is None
            assert found["end"] == ("<|im_end|>" if finish == "stop" else "")
    assert tokens_of({**rollout, "response": "other"}, tokenizer) == {}  # of another tokenizer


def test_half_characters_have_tokens_too():
    """What a model samples need not be whole characters."""
    tokenizer = Tokenizer(MINI)
    smile = tokenizer.encode("\U0001f600")
    assert len(smile) == 4
    for ids in (smile[:2], [*smile[:3], 40], [smile[0]] * 3 + smile, smile[1:] * 3):
        text = tokenizer.decode(ids)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)


# ---- the page --------------------------------------------------------------------------------------
def test_text_is_never_markup(tmp_path):
    """Whatever is in any field: the page has the same tags, and no control character reaches it."""
    rows = [result(model, 0, response=HOSTILE + TRACE, question=HOSTILE, task=HOSTILE, id=HOSTILE,
                   reference=HOSTILE, answer=HOSTILE, reason=HOSTILE) for model in ("base", HOSTILE)]
    plain = [result(model, 0) for model in ("base", "other")]
    pages = []
    for of in (rows, plain):
        text = report.of_evaluation(tmp_path, *evaluation(tmp_path, of))
        assert not set(text) & set(map(chr, CONTROL))
        pages.append(Page(text))
    hostile, harmless = pages
    assert hostile.tags == harmless.tags and hostile.tags.count("script") == 2
    data = hostile.data
    group, = data["groups"]
    for text in (group["question"], group["id"], group["reference"], group["task"], data["arms"][1],
                 group["traces"][1]["reason"], data["tables"]["all"][1][1]):
        assert text == printable(HOSTILE)
    assert data["settings"]["x"] == printable(json.dumps(HOSTILE, ensure_ascii=False))
    assert "".join(text for _, text in group["traces"][0]["parts"]) == printable(HOSTILE + TRACE)


def test_the_page_may_load_nothing(tmp_path):
    """Its policy names this script and this style by their hashes, and nothing else."""
    page = Page(report.of_evaluation(tmp_path, *evaluation(tmp_path, [result()])))
    hashes = [base64.b64encode(hashlib.sha256(page.contents[name].encode()).digest()).decode()
              for name in ("script", "style")]
    script, style = hashes
    assert page.policy == f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    for name in ("report.js", "report.css"):
        source = (ROOT / name).read_text()
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


def test_figures_are_of_all_rows_and_groups_are_whole(tmp_path):
    """However few of the responses a page has room for."""
    rows = [result(model, number, index, text) for model in ("a", "b") for number in range(40)
            for index, text in enumerate(responses(2, seed=number))]
    made = evaluation(tmp_path, rows, samples=2)
    whole, small = (Page(report.of_evaluation(tmp_path, *made, megabytes)).data for megabytes in (20, 0.03))
    assert len(whole["groups"]) == whole["groups_in_all"] == small["groups_in_all"] == 40
    assert 3 < len(small["groups"]) < 20
    for group in small["groups"]:
        assert group in whole["groups"] and len(group["traces"]) == 4
    for end in (0, -1):
        assert small["groups"][end] == whole["groups"][end]
    for name in ("cells", "tables", "lengths"):
        assert small[name] == whole[name]
    one = Page(report.of_evaluation(tmp_path, *made, 1e-9)).data
    assert len(one["groups"]) == 1


def test_spread():
    for n in (0, 1, 2, 5, 64, 100):
        order = spread(n)
        assert sorted(order) == list(range(n)) and order[:1] == [n - 1] * (n > 0)
        for k in range(3, n):  # no gap is more than twice what it must be, and some
            assert max(b - a for a, b in pairwise(sorted(order[:k]))) <= 4 * n / k


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


def test_lengths_are_counted_in_the_same_bins():
    found = report.lengths_of({"a": [{"tokens": i, "correct": i % 3 == 0} for i in range(100)],
                               "b": [{"tokens": 1000 + i, "correct": True} for i in range(10)]})
    assert found["longest"] == 1009
    a, b = found["bars"]
    assert sum(a["right"]) == 34 and sum(a["wrong"]) == 66 and a["median"] == 49.5
    assert sum(a["right"][:4]) == 34 and sum(b["right"][39:]) == 10 and not any(b["wrong"])


def test_the_papers_figures_stand_below_ours():
    def table(task):
        row = result("a", task=task)
        return report.page_tables([summarise([row], [row], 1, [1])])
    found = table("countdown-4")
    assert found["accuracy"][0] == ["model", "countdown-4"]
    assert found["accuracy"][-1] == ["SkillFactory then GRPO (the paper, 1.5B)", "42.1"]
    assert found["verdicts"][-1][1:6] == ["countdown-4", "2.34", "7.13", "0.65 / 0.97", ""]
    found = table("countdown-4-small")  # of which the paper has nothing
    assert len(found["accuracy"]) == len(found["verdicts"]) == 2


# ---- folders ---------------------------------------------------------------------------------------
FLAGS = ("--model", MINI, "--device", "cpu")
GRPO = (*FLAGS, "--questions", "8", "--questions-per-step", "4", "--mini-batch", "2", "--rollouts", "4",
        "--max-new-tokens", "60", "--reward", "random", "--out", "run")
EVALUATE = ("--models", f"a={MINI},b={MINI}", "--device", "cpu", "--questions", "3", "--samples", "2",
            "--tasks", "countdown-2-small,countdown-3-small", "--max-new-tokens", "60", "--budget-forcing",
            "--out", "run")


def page_of(out="run"):
    return Page(Path(out, "report.html").read_text()).data


def test_an_evaluation_ends_with_its_page(cmd):
    assert cmd(evaluate, *EVALUATE)[0] == 0
    before = Path("run/report.html").read_bytes()
    status, out, err = cmd(report, "run")
    assert status == 0 and "wrote run/report.html" in out, err
    assert Path("run/report.html").read_bytes() == before
    data = page_of()
    rows = read_rows("run/results.jsonl")
    assert data["arms"] == ["a", "b", "a, forced to go on", "b, forced to go on"]
    shown = {}
    for group in data["groups"]:
        for trace in group["traces"]:
            shown[data["arms"][trace["arm"]], group["task"], group["id"], trace["index"]] = trace
    assert len(shown) == 2 * len(rows) == 48
    for row in rows:
        assert row["reference"]
        name = row["task"], row["id"], row["index"]
        trace, forced = shown[row["model"], *name], shown[f"{row['model']}, forced to go on", *name]
        assert "".join(text for _, text in trace["parts"]) == row["response"]
        assert "".join(text for _, text in forced["parts"]) == row["forced"]["response"]
        assert trace["correct"] == row["correct"] and forced["correct"] == row["forced"]["correct"]
        assert forced["attempts"] == row["forced"]["attempts"]


def test_a_run_has_a_page_from_its_first_checkpoint_on(cmd):
    assert cmd(grpo, *GRPO, "--steps", "3", "--save-every", "1", "--keep", "2")[0] == 0
    data = page_of()
    assert data["curves"]["steps"] == [1, 2, 3] and len(data["groups"]) == 6
    reward = next(chart for chart in data["curves"]["charts"] if chart["title"] == "Reward")
    rows = read_rows("run/metrics.jsonl")
    assert reward["lines"]["reward"] == pytest.approx([row["reward"] for row in rows], rel=1e-5)
    logged = read_rows("run/rollouts.jsonl")
    for group, row in zip(data["groups"], logged, strict=True):
        assert (group["step"], group["id"]) == (row["step"], row["id"])
        assert [t["reward"] for t in group["traces"]] == [r["reward"] for r in row["rollouts"]]
        assert all(sum(t["widths"]) == len("".join(text for _, text in t["parts"])) for t in group["traces"])
    assert not list(Path("run/checkpoints").rglob("report.html"))  # it is no part of a model
    before = Path("run/report.html").read_bytes()
    with open("run/rollouts.jsonl", "a") as f, open("run/metrics.jsonl", "a") as g:  # being written
        f.write('{"step": 4, "ta')
        g.write('{"step": 4, "re')
    assert cmd(report, "run")[0] == 0
    assert Path("run/report.html").read_bytes() == before


def test_a_run_has_a_page_before_its_first_checkpoint(cmd):
    """Without tokens, whose tokenizer comes with the model."""
    assert cmd(grpo, *GRPO, "--steps", "1")[0] == 0
    tokens = [trace["ids"] for group in page_of()["groups"] for trace in group["traces"]]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        Path("run", name).unlink()
    assert cmd(report, "run")[0] == 0
    found = [trace for group in page_of()["groups"] for trace in group["traces"]]
    assert len(found) == len(tokens) and all("ids" not in trace for trace in found)


def test_tokens_where_the_prompt_opens_a_thought(cmd, tmp_path):
    """By a template that is told to: what it was told is in the run's record."""
    shutil.copytree(MINI, "model")
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}"
                "{% endif %}")
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    flags = [flag if flag != MINI else "model" for flag in GRPO]
    status, _, err = cmd(grpo, *flags, "--steps", "1", "--chat-template-kwargs", '{"thinking": true}')
    assert status == 0, err
    for group in page_of()["groups"]:
        assert group["prompt"].endswith("<think>\n")
        for trace in group["traces"]:
            assert trace["opening"] == len("<think>\n") and trace["ids"]


def test_sft_has_curves(cmd):
    write_jsonl("chat.jsonl", CHAT[:4])
    assert cmd(sft, *FLAGS, "--data", "chat.jsonl", "--epochs", "2", "--out", "run")[0] == 0
    data = page_of()
    titles = [chart["title"] for chart in data["curves"]["charts"]]
    assert {"Loss", "Learning rate", "Gradient norm", "Speed"} <= set(titles) and data["groups"] == []


def test_long_runs_are_thinned():
    rows = [{"step": step, "loss": float(step), "mine": None if step % 2 else 1, "none": None}
            for step in range(1, 5001)]
    curves = report.curves_of(rows)
    assert curves["each"] == 3 and len(curves["steps"]) == 1667 and curves["steps"][-1] == 5000
    loss, mine = curves["charts"]
    assert loss["lines"]["loss"][:2] == [2, 5]
    assert mine == {"title": "mine", "unit": "", "lines": {"mine": [1.0] * 1667}}


def test_a_page_that_cannot_be_made_ends_no_run(cmd, monkeypatch):
    def fail(out):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(report, "renew", fail)
    status, out, err = cmd(grpo, *GRPO, "--steps", "1")
    assert status == 0 and "report.html is not renewed: [Errno 28]" in out, err


@pytest.mark.parametrize("name, change, message", [
    ("metrics.jsonl", lambda text: "{}\n", "run/metrics.jsonl:1: the key 'step' is missing"),
    ("metrics.jsonl", None, "run: nothing to show yet, neither metrics.jsonl nor results.jsonl"),
    ("rollouts.jsonl", lambda text: "[1]\n", "run/rollouts.jsonl:1: expected an object"),
    ("rollouts.jsonl", lambda text: text.replace('"attempts": [', '"attempts": 5, "x": [', 1),
     "run/rollouts.jsonl:1: attempts is '5'"),
    ("rollouts.jsonl", lambda text: text.replace('"ids": [', '"ids": ["a", ', 1),
     "run/rollouts.jsonl:1: damaged; remove this line"),
    ("rollouts.jsonl", lambda text: text.replace('"prompt": [', '"prompt": ["a", ', 1),
     "run/rollouts.jsonl:1: damaged; remove this line"),
    ("run.json", None, "run: not a folder of evaluate.py, sft.py or grpo.py"),
    ("run.json", lambda text: "{", "run/run.json: not valid JSON"),
    ("run.json", lambda text: '{"command": 5}', "run/run.json: command is '5'"),
])
def test_a_damaged_run_is_named(cmd, name, change, message):
    assert cmd(grpo, *GRPO, "--steps", "1")[0] == 0
    path = Path("run", name)
    if change:
        path.write_text(change(path.read_text()))
    else:
        path.unlink()
    refused(cmd, report, ("run",), message)


@pytest.mark.parametrize("name, change, message", [
    ("summary.json", lambda text: text.replace("1.0", "NaN", 1), "run/summary.json: damaged"),
    ("summary.json", lambda text: "[" * 10**5, "run/summary.json: damaged"),
    ("summary.json", lambda text: "[{}]", "run/summary.json: damaged, or of another version"),
    ("summary.json", lambda text: text.replace('"retries"', '"other"'), "run/summary.json: damaged"),
    ("results.jsonl", lambda text: text[text.index("\n") + 1:], "run/results.jsonl: rows of base on multi"),
    ("results.jsonl", lambda text: text.replace("true", "3"), "run/results.jsonl:1: "),
])
def test_a_damaged_evaluation_is_named(cmd, name, change, message):
    evaluation(Path("run"), [result("base", i) for i in range(3)])
    path = Path("run", name)
    path.write_text(change(path.read_text()))
    refused(cmd, report, ("run",), message)
