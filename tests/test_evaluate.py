import itertools
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import MINI

import evaluate
import tasks
from cli import UserError
from evaluate import bootstrap, f1, forced_prompt, interval, pass_at, skills, wilson
from model import Tokenizer
from sample import Completion


def test_pass_at_k_by_brute_force():
    for n, c in [(5, 0), (5, 2), (6, 6), (4, 1)]:
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at(k, n, c) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    with pytest.raises(UserError, match="pass@8 needs at least 8 samples"):
        pass_at(8, 4, 1)


def test_intervals():
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-3) and wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-3)  # Wilson's own closed form, tabulated
    assert interval([[0, 0]] * 20) == wilson(0, 20)
    # The bootstrap by question must be wider than one that takes samples of a question for independent.
    rng = np.random.default_rng(0)
    right = (rng.random((60, 1)) < 0.5).repeat(8, 1)
    low, high = interval(right)
    assert high - low > 1.8 * (wilson(right.sum(), right.size)[1] - wilson(right.sum(), right.size)[0])
    coverage = [low <= 0.3 <= high for low, high in (bootstrap((rng.random(80) < 0.3), seed=i, draws=400) for i in range(200))]
    assert 0.88 < np.mean(coverage) < 0.99


def test_f1():
    pairs = [(True, True), (True, False), (False, False), (False, False), (False, True)]
    assert f1(pairs, True) == 0.5 and f1(pairs, False) == pytest.approx(2 / 3) and f1([], True) is None


def test_skills():
    task = tasks.find("multiply-2")
    problem = tasks.Problem("", "", "", {"answer": "6"})
    trace = ("<think>\n<sample>\na <answer>7</answer>\n</sample>\n<reflect>\nno <verdict>Incorrect</verdict>\n</reflect>\nAgain.\n<sample>\n<answer>6</answer>\n</sample>\n"
             "<reflect>\nno <verdict>Incorrect</verdict>\n</reflect>\n</think>\n\nSo\n\n<answer>\n6\n</answer>")
    assert skills(task, problem, trace) == {"answers": 2, "reflections": 2, "verdicts": [(False, False), (False, True)]}
    assert skills(task, problem, "just <answer>6</answer>") == {"answers": 1, "reflections": 0, "verdicts": []}


@pytest.mark.parametrize("text, kept", [
    ("<think>\n<sample>\n7 * 8 = 56\n</sample>\n<reflect>\nx\n</reflect>\n</think>\n\nMy work above leads to this answer.\n\n<answer>\n56\n</answer>", "<think>\n<sample>\n7 * 8 = 56\n</sample>\n<reflect>\nx\n</reflect>\n<sample>\n"),
    ("no tags é <answer>5</answer>", "no tags é <answer>5</answer>\n<sample>\n"),
])
def test_budget_forcing_appends_ids(text, kept):
    """Rule 6: what stays is a prefix of the sampled ids, the very same, even if they are no ids that `encode` would give."""
    tokenizer = Tokenizer(MINI)
    tokens = [i for c in text for i in tokenizer.encode(c)]  # letter by letter: encoding the text again would give other ids
    assert tokens != tokenizer.encode(text)
    ids, prefix = forced_prompt(tokenizer, Completion([1, 2, 3], tokens + [tokenizer.end_id]))
    opened = tokenizer.encode("<sample>\n") if "think" in text else tokenizer.encode("\n<sample>\n")
    assert ids == [1, 2, 3] + prefix and prefix[:-len(opened)] == tokens[:len(prefix) - len(opened)] and prefix[-len(opened):] == opened
    assert tokenizer.decode(prefix) == kept


class Page(HTMLParser):
    """Checks that every tag closes and that nothing is loaded from elsewhere."""
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name in ("src", "href") for name, _ in attrs)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_command(cmd, tmp_path):
    status, out, err = cmd(evaluate, "--models", f"base={MINI},again={MINI}", "--tasks", "countdown-3-small,countdown-2-small", "--questions", "6", "--samples", "3", "--k", "1,2",
                           "--max-new-tokens", "60", "--budget-forcing", "--device", "cpu")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out/evaluate/results.jsonl").read_text().splitlines()]
    cells = json.loads((tmp_path / "out/evaluate/summary.json").read_text())
    assert len(rows) == 2 * 2 * 6 * 3 and len(cells) == 4
    for cell in cells:
        mine = [r for r in rows if r["model"] == cell["model"] and r["task"] == cell["task"]]
        assert cell["accuracy"] == pytest.approx(np.mean([r["correct"] for r in mine])) and cell["interval"][0] <= cell["accuracy"] <= cell["interval"][1]
        assert cell["lenient"] >= cell["accuracy"] and cell["pass"]["1"] == pytest.approx(cell["accuracy"]) and cell["pass"]["2"] >= cell["accuracy"]
        assert all(r["forced"]["tokens"] <= 120 for r in mine) and all(r["forced"]["response"].startswith(r["response"].split("</think>")[0]) for r in mine if r["finish"] == "stop")
    same = [c for c in cells if c["model"] == "again"]
    assert all(c["difference"] == 0 and c["difference_interval"][0] < 0 < c["difference_interval"][1] for c in same)  # same questions, same seed, same model
    page = Page()
    page.feed((tmp_path / "out/evaluate/report.html").read_text())
    assert page.open == [] and {"svg", "table", "details"} <= page.seen
    assert "accuracy" in out and "report.html" in out


def test_bad_input(cmd):
    base = ("--models", MINI, "--device", "cpu", "--questions", "5")
    for flags, message in [(("--k", "9", "--samples", "4"), "pass@9 needs at least 9"), (("--k", "x"), "give whole numbers"), (("--k", "1,-2"), "give whole numbers"), (("--questions", "0"), "makes its questions"), (("--tasks", "chess"), "unknown; the tasks are"),
                           (("--split", "train"), "has no split 'train'"), (("--tasks", "gsm8k"), "no such file; gsm8k is not downloaded"), (("--models", "nowhere"), "no such folder")]:
        status, _, err = cmd(evaluate, *base, *flags)
        assert status == 2 and message in err and err.count("\n") == 1, (flags, err)


def test_paper_figures_are_printed_for_its_tasks():
    rows = evaluate.paper_rows({"countdown-4", "gsm8k", "mine"})
    assert rows[0] == ["paper, 1.5B", "countdown-4", "gsm8k"] and rows[-1] == ["SkillFactory then GRPO", "42.1", "68.2"]
