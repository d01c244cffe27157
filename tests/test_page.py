"""The page in a browser: it opens without an error, filters, follows links and keys, and keeps text text.

Skipped where playwright or a Chromium is missing (Debian: apt install chromium).
"""
import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import GRPO, finish, start
from test_report import HOSTILE, TASK, evaluation, responses, result

import report.page as report
from run.command import printable

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
ALONE = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(path, address): a tab with the page. At the end nothing must have been loaded, said or thrown."""
    trouble = []
    tabs = []

    def visit(path, address="", width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("dialog", lambda dialog: trouble.append(dialog.message))
        tab.on("request", lambda request: trouble.append(request.url))
        tabs.append(tab)
        tab.goto(f"{Path(path).absolute().as_uri()}{address}")
        assert trouble.pop(0).startswith("file:")  # the page itself
        return tab
    yield visit
    for tab in tabs:
        tab.close()
    assert trouble == []


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The page of two models on ten questions, two samples each."""
    out = tmp_path_factory.mktemp("evaluated")
    rows = [result(model, number, index, text) for model in ("base", "sft") for number in range(10)
            for index, text in enumerate(responses(2, seed=hash(model == "sft") + 7 * number))]
    evaluation(out, rows, samples=2)
    report.renew(out)
    return out / "report.html", rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The page of a run of three steps."""
    out = tmp_path_factory.mktemp("page") / "run"
    finish(start("grpo.py", *GRPO, "--questions", "8", "--reward", "random", "--steps", "3", "--out", out))
    return out / "report.html"


def opened(tab):
    """(the line of the response that is open, its text)"""
    return tab.inner_text(".response[open] summary"), tab.text_content(".response[open] .text")


def contradicted(row):
    return sum(said != actual for said, actual in row["verdicts"])


def matching(tab):
    return int(tab.inner_text("#count").split()[0])


def address(*parts):
    return "#" + "/".join(quote(part, safe="") for part in parts)


# ---- what is there ---------------------------------------------------------------------------------
@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1280, "light")])
def test_it_fits_the_screen(visit, evaluated, run, width, scheme):
    for path in (evaluated[0], run):
        tab = visit(path, width=width, scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("h2").all_inner_texts()[-1] in ("Responses", "Rollouts")
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")


def test_text_of_models_is_never_markup(visit, tmp_path):
    """Nor does it run, load, or turn the text around it."""
    rows = [result(model, i, response=HOSTILE, question=HOSTILE, task=HOSTILE, id=f"{i}{HOSTILE}",
                   reference=HOSTILE, answer=HOSTILE, reason=HOSTILE)
            for model in ("base", HOSTILE) for i in range(2)]
    evaluation(tmp_path, rows)
    report.renew(tmp_path)
    tab = visit(tmp_path / "report.html")
    assert tab.locator("script").count() == 1 and tab.locator("img, iframe, link, object").count() == 0
    assert printable(HOSTILE) in tab.text_content(".question")
    tab.locator(".group summary").last.evaluate("line => line.closest('.group').open = true")
    tab.locator(".response a").last.click()
    assert opened(tab)[1] == printable(HOSTILE)
    again = visit(tmp_path / "report.html", tab.evaluate("location.hash"))
    assert opened(again) == opened(tab)


# ---- what it does ----------------------------------------------------------------------------------
def test_whole_text_is_shown_and_contradictions_are_marked(visit, evaluated):
    path, rows = evaluated
    for row in rows[::7]:
        tab = visit(path, address(TASK.name, row["id"], f"{row['model']}, sample {row['index']}"))
        line, text = opened(tab)
        assert text == row["response"] and ("right" in line) == row["correct"]
        shown = tab.locator(".response[open]")
        assert shown.locator(".contradicts").count() == contradicted(row)
        right = sum(row["attempts"]) if "<sample>" in row["response"] else 0
        assert shown.locator(".block.correct").count() == right


def test_filters(visit, evaluated):
    """Each against the rows themselves."""
    path, rows = evaluated
    tab = visit(path)
    assert matching(tab) == len(rows) == 40
    base = {(row["id"], row["index"]): row["correct"] for row in rows if row["model"] == "base"}
    wanted = {
        ("model", "sft"): lambda row: row["model"] == "sft",
        ("outcome", "right"): lambda row: row["correct"],
        ("outcome", "no readable answer"): lambda row: row["answer"] is None,
        ("outcome", "a verdict contradicts the grade"): contradicted,
        ("outcome", "first attempt wrong, answer right"): lambda row: row["correct"] > row["attempts"][0],
        ("outcome", "right, unlike the first model"):
            lambda row: row["correct"] and not base[row["id"], row["index"]],
        ("outcome", "wrong, unlike the first model"):
            lambda row: not row["correct"] and base[row["id"], row["index"]],
    }
    for (name, value), condition in wanted.items():
        tab.locator(f"#{name}").select_option(label=value)
        found = matching(tab)
        assert found == sum(map(bool, map(condition, rows))) and 0 < found < 40, name
        tab.get_by_role("button", name="clear").click()
    for text, n in (("QUESTION 7", 4), ("nowhere", 0)):
        tab.locator("#text").fill(text)
        tab.locator("#text").press("Enter")
        assert matching(tab) == n and tab.locator(".group:visible").count() == bool(n)


def test_each_response_has_an_address(visit, tmp_path):
    """It can be copied and followed, and wins over a filter. q of m/n is not q/m of n."""
    rows = [result(model, id=name, response=f"{model} on {name}")
            for model in ("n", "m/n") for name in ("q", "q/m")]
    evaluation(tmp_path, rows)
    report.renew(tmp_path)
    path = tmp_path / "report.html"
    for name, model in (("q", "m/n"), ("q/m", "n")):
        tab = visit(path, address(TASK.name, name, f"{model}, sample 0"))
        assert opened(tab)[1] == f"{model} on {name}"
    tab = visit(path)
    tab.locator("#model").select_option(label="n")
    assert matching(tab) == 2
    tab.evaluate(f"location.hash = {address(TASK.name, 'q', 'm/n, sample 0')!r}")
    playwright.expect(tab.locator(".response[open] .text")).to_have_text("m/n on q")
    assert matching(tab) == 4
    gone = visit(path, "#multiply-2/gone/base")
    assert "not on this page" in gone.inner_text("#count")


def test_a_step_shows_its_whole_groups(visit, run):
    """With what GRPO made of them."""
    tab = visit(run)
    assert matching(tab) == 24
    tab.locator("#step").select_option(label="2")
    assert matching(tab) == 8 and tab.locator(".group:visible").count() == 2
    group = json.loads((run.parent / "rollouts.jsonl").read_text().splitlines()[2])
    lines = tab.locator(".group:visible").first.locator(".response summary").all_text_contents()
    for line, rollout in zip(lines, group["rollouts"], strict=True):
        assert f"{rollout['advantage']:+.2f}" in line and f"{rollout['tokens']} tokens" in line
