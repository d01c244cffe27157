"""The page in a browser: it opens without an error, filters, follows links and keys, and keeps text text.

Skipped where playwright or a Chromium is missing (Debian: apt install chromium).
"""
import json
import shutil
from pathlib import Path

import pytest
from conftest import MINI
from test_report import HOSTILE, TASK, evaluation, responses, result

import grpo
import report
from cli import printable

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


@pytest.fixture
def run(cmd):
    """The page of a run of three steps."""
    flags = ("--model", MINI, "--device", "cpu", "--questions", "8", "--questions-per-step", "4",
             "--mini-batch", "2", "--rollouts", "4", "--max-new-tokens", "60", "--reward", "random",
             "--steps", "3", "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    return Path("run/report.html")


def shown(tab):
    """(heading of the response that is shown, its text)"""
    return tab.inner_text("article h4"), tab.inner_text("article .text")


def contradicted(row):
    return sum(said != actual for said, actual in row["verdicts"])


def matching(tab):
    return int(tab.inner_text(".note[role=status]").split()[0])


# ---- what is there ---------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(visit, evaluated, run, width, scheme):
    for path in (evaluated[0], run):
        tab = visit(path, width=width, scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        headings = tab.locator("h2").all_inner_texts()
        assert headings[-1] in ("Responses", "Rollouts") and len(headings) >= 2
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
    assert tab.locator("script").count() == 2 and tab.locator("img, iframe, link, object").count() == 0
    assert printable(HOSTILE) in tab.text_content(".question")
    assert printable(HOSTILE) in tab.text_content("article .text")
    tab.locator(".list a").last.click()
    again = visit(tmp_path / "report.html", tab.evaluate("location.hash"))
    assert again.inner_text("h3") == tab.inner_text("h3") != ""


def test_figures_and_tables_say_the_same(visit, evaluated):
    """Python made the tables, and rounds a tie to the even digit."""
    tab = visit(evaluated[0])
    shares = [k / n for n in (8, 100, 300, 400, 1000, 1319) for k in range(n + 1)]
    assert tab.evaluate("shares => shares.map(percent)", shares) == [f"{100 * x:.1f}%" for x in shares]


# ---- what it does ----------------------------------------------------------------------------------
def test_whole_text_is_shown_and_contradictions_are_marked(visit, evaluated):
    path, rows = evaluated
    for row in rows[::7]:
        tab = visit(path, f"#trace/{TASK.name}/{row['id']}/{row['model']}/{row['index']}")
        assert tab.text_content("article .text") == row["response"]
        assert tab.locator(".text .contradicts").count() == contradicted(row)
        right = sum(row["attempts"]) if "<sample>" in row["response"] else 0
        assert tab.locator(".block.correct").count() == right


def test_filters(visit, evaluated):
    """Each against the rows themselves."""
    path, rows = evaluated
    tab = visit(path)
    assert matching(tab) == len(rows) == 40
    base = {(row["id"], row["index"]): row["correct"] for row in rows if row["model"] == "base"}
    wanted = {
        ("Model", "sft"): lambda row: row["model"] == "sft",
        ("Outcome", "right"): lambda row: row["correct"],
        ("Outcome", "no readable answer"): lambda row: row["answer"] is None,
        ("Outcome", "a verdict contradicts the grade"): contradicted,
        ("Outcome", "first attempt wrong, answer right"): lambda row: row["correct"] > row["attempts"][0],
        ("Outcome", "right, unlike base"): lambda row: row["correct"] and not base[row["id"], row["index"]],
        ("Outcome", "wrong, unlike base"): lambda row: not row["correct"] and base[row["id"], row["index"]],
    }
    for (label, value), condition in wanted.items():
        tab.get_by_label(label, exact=True).select_option(label=value)
        found = matching(tab)
        assert found == sum(map(bool, map(condition, rows))) and 0 < found < 40, label
        tab.get_by_role("button", name="clear").click()
    tab.get_by_label("Outcome", exact=True).select_option(label="wrong")
    assert shown(tab)[0].startswith(("✗", "○"))  # the first that matches is shown
    tab.get_by_role("button", name="clear").click()
    tab.get_by_label("Text", exact=True).fill("QUESTION 7")
    assert matching(tab) == 4 and tab.inner_text(".question") == "question 7"
    tab.get_by_label("Text", exact=True).fill("nowhere")
    assert matching(tab) == 0 and not tab.locator("article").is_visible()


def test_each_response_has_an_address(visit, tmp_path):
    """It can be copied and followed, and wins over a filter. q of m/n is not q/m of n."""
    rows = [result(model, id=name, response=f"{model} on {name}")
            for model in ("n", "m/n") for name in ("q", "q/m")]
    evaluation(tmp_path, rows)
    report.renew(tmp_path)
    path = tmp_path / "report.html"
    for address, text in (("q/m%2Fn", "m/n on q"), ("q%2Fm/n", "n on q/m")):
        assert shown(visit(path, f"#trace/{TASK.name}/{address}/0"))[1] == text
    tab = visit(path)
    tab.get_by_label("Model", exact=True).select_option(label="n")
    tab.locator(".list a").last.click()
    tab.locator(".members a").first.click()
    address = tab.evaluate("location.hash")
    tab.evaluate(f"location.hash = '#trace/{TASK.name}/q/m%2Fn/0'")
    playwright.expect(tab.locator("article .text")).to_have_text("m/n on q")
    assert matching(tab) == 4
    assert shown(visit(path, address))[1] == "n on q/m"
    gone = visit(path, "#trace/multiply-2/gone/base/0")
    assert "not on this page" in gone.inner_text(".note[role=status]")


def test_a_step_leads_to_its_rollouts(visit, run):
    tab = visit(run)
    assert matching(tab) == 24
    picture = tab.locator(".plot svg").first
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] / 2, "y": 10})
    playwright.expect(tab.locator("h3")).to_contain_text("step 2")
    assert matching(tab) == 8 and tab.evaluate("location.hash").startswith("#trace/2/")
    # The whole group, with what GRPO made of it.
    group = json.loads(Path("run/rollouts.jsonl").read_text().splitlines()[2])
    table = tab.inner_text(".members tbody").splitlines()
    assert len(table) == 4
    for line, rollout in zip(table, group["rollouts"], strict=True):
        assert f"{abs(rollout['advantage']):.2f}" in line and f"{rollout['tokens']}" in line
