"""The page in a browser: it opens without an error, filters, follows links and keys, and keeps text text.

Skipped where playwright or a Chromium is missing (Debian: apt install chromium).
"""
import json
import shutil
import time
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


CONTRAST = """
() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(low)];
}"""


NAMELESS = """
() => [...document.querySelectorAll("button, select, input")].filter((control) => {
  const labels = [...(control.labels || [])].map((label) => label.innerText).join("");
  return !(control.ariaLabel || (control.tagName === "BUTTON" && control.textContent) || labels);
}).map((control) => control.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_heard(visit, evaluated, run, scheme):
    """Contrast of all text (WCAG AA), a name for every control and picture, headings without a gap."""
    for path in (evaluated[0], run):
        tab = visit(path, scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
        assert tab.evaluate(NAMELESS) == []
        assert tab.locator("svg:not([role=img][aria-label])").count() == 0
        levels = tab.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(e => Number(e.tagName[1]))")
        assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
        repeated = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(repeated) == len(set(repeated))


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
    tab.keyboard.press("n")
    again = visit(tmp_path / "report.html", tab.evaluate("location.hash"))
    assert again.inner_text("h3") == tab.inner_text("h3") != ""


def test_figures_and_tables_say_the_same(visit, evaluated):
    """Python made the tables, and rounds a tie to the even digit."""
    tab = visit(evaluated[0])
    shares = [k / n for n in (8, 100, 300, 400, 1000, 1319) for k in range(n + 1)]
    assert tab.evaluate("shares => shares.map(percent)", shares) == [f"{100 * x:.1f}%" for x in shares]


# ---- what it does ----------------------------------------------------------------------------------
def test_filters(visit, evaluated):
    """Each against the rows themselves."""
    path, rows = evaluated
    tab = visit(path)
    assert matching(tab) == len(rows) == 40
    wanted = {
        ("Model", "1"): lambda row: row["model"] == "sft",
        ("Outcome", "right"): lambda row: row["correct"],
        ("Outcome", "no readable answer"): lambda row: row["answer"] is None,
        ("Outcome", "a verdict contradicts the grade"): contradicted,
        ("Outcome", "first attempt wrong, answer right"): lambda row: row["correct"] > row["attempts"][0],
        ("Attempts", "3"): lambda row: len(row["attempts"]) == 3,
        ("Outcome", "right, unlike base"): lambda row: row["correct"] and not base[row["id"], row["index"]],
        ("Outcome", "wrong, unlike base"): lambda row: not row["correct"] and base[row["id"], row["index"]],
    }
    base = {(row["id"], row["index"]): row["correct"] for row in rows if row["model"] == "base"}
    for (label, value), condition in wanted.items():
        tab.get_by_label(label, exact=True).select_option(value)
        found = matching(tab)
        assert found == sum(map(bool, map(condition, rows))) and 0 < found < 40, label
        tab.get_by_role("button", name="clear").click()
    tab.get_by_label("Tokens at least").fill("100")
    tab.get_by_label("Tokens at most").fill("300")
    assert matching(tab) == sum(100 <= row["tokens"] <= 300 for row in rows)
    tab.get_by_label("Outcome", exact=True).select_option("wrong")
    assert matching(tab) == sum(100 <= row["tokens"] <= 300 and not row["correct"] for row in rows)
    assert shown(tab)[0].startswith(("✗", "○"))  # the first that matches is shown
    # From a response that the filter hides, on to the next that it lets pass.
    tab.locator(".members a").last.click()
    tab.keyboard.press("k")
    assert shown(tab)[0].startswith(("✗", "○"))
    tab.get_by_role("button", name="clear").click()
    tab.get_by_label("Text", exact=True).fill("QUESTION 7")
    count = tab.locator(".note[role=status]")
    playwright.expect(count).to_have_text("4 of 40 responses match.")
    assert tab.inner_text(".question") == "question 7"
    tab.get_by_label("Text", exact=True).fill("nowhere")
    assert not tab.locator("article").is_visible()
    playwright.expect(count).to_have_text("0 of 40 responses match.")


def test_keys_and_links(visit, evaluated):
    path, rows = evaluated
    tab = visit(path)
    seen = []
    for _ in range(5):
        seen.append((tab.inner_text("h3"), shown(tab)))
        tab.keyboard.press("j")
    assert [title for title, _ in seen] == ["q0"] * 4 + ["q1"]
    assert [heading[2:].split(":")[0] for _, (heading, _) in seen] == [
        "base, sample 0", "base, sample 1", "sft, sample 0", "sft, sample 1", "base, sample 0"]
    for key in ("n", "p", "j", "j"):  # there and back, from base's sample 1
        tab.keyboard.press(key)
    address = tab.evaluate("location.hash")
    assert address == "#trace/multiply-2/q1/sft/1"
    other = visit(path, address)
    assert shown(other) == shown(tab) and other.inner_text("h3") == "q1"
    assert other.evaluate("document.activeElement.id") == "trace"
    # The same sample of another model beside it, and back.
    other.keyboard.press("b")
    assert other.locator("article").count() == 2
    assert other.locator("article h4").nth(1).inner_text()[2:].startswith("base, sample 1")
    other.keyboard.press("n")  # both stay for the next question
    assert other.inner_text("h3") == "q2"
    for place, name in enumerate(("sft, sample 1", "base, sample 1")):
        assert other.locator("article h4").nth(place).inner_text()[2:].startswith(name)
    other.get_by_label("Beside").select_option("")
    assert other.locator("article").count() == 1
    # Another sample of the model that is shown: the same of the other one beside it.
    other.get_by_label("Beside").select_option(label="base, sample 1")
    other.keyboard.press("k")
    heads = other.locator("article h4")
    assert heads.nth(0).inner_text()[2:].startswith("sft, sample 0")
    assert heads.nth(1).inner_text()[2:].startswith("base, sample 0")
    other.get_by_label("Beside").select_option("")
    # Buttons and choices stay, and with them the focus.
    following = other.get_by_role("button", name="next ›")
    following.focus()
    for _ in range(2):
        before = other.inner_text("article h4")
        other.keyboard.press("Enter")
        assert other.inner_text("article h4") != before
    # In a search field letters are letters.
    other.keyboard.press("/")
    other.keyboard.type("jjj")
    assert other.get_by_label("Text", exact=True).input_value() == "jjj"
    other.keyboard.press("Enter")
    other.get_by_role("button", name="clear").click()
    # A link to what a filter hides wins over the filter; so does one that somebody has decoded.
    tab.get_by_label("Model", exact=True).select_option("0")
    tab.evaluate("location.hash = '#trace/multiply%2D2/q3/sft/0'")
    playwright.expect(tab.locator("h3")).to_have_text("q3")
    assert matching(tab) == 40


def test_marks_are_links(visit, evaluated):
    """One can copy them and go back; a plain click keeps the filters."""
    tab = visit(evaluated[0], width=400)
    tab.get_by_label("Model", exact=True).select_option("1")
    mark = tab.locator(".list a").nth(6)
    address = mark.get_attribute("href")
    mark.click()
    assert tab.evaluate("location.hash") == address and matching(tab) == 20
    assert 0 <= tab.locator("article").bounding_box()["y"] < 800  # brought onto the screen
    tab.locator(".members a").first.click()
    tab.go_back()
    assert tab.evaluate("location.hash") == address
    name = tab.inner_text("article h4")
    assert shown(visit(evaluated[0], address))[0] == name


def test_a_link_to_nothing_says_so(visit, evaluated):
    tab = visit(evaluated[0], "#trace/multiply-2/gone/base/0")
    assert "not on this page" in tab.inner_text("[role=alert]")
    tab.keyboard.press("j")
    assert not tab.locator("[role=alert]").is_visible()
    assert tab.locator("article").bounding_box()["y"] < 800  # from the top of the page to the response


def test_names_with_slashes_are_told_apart(visit, tmp_path):
    """q of m/n is not q/m of n, though both are written with the same slashes."""
    rows = [result(model, id=name, response=f"{model} on {name}")
            for model in ("n", "m/n") for name in ("q", "q/m")]
    evaluation(tmp_path, rows)
    report.renew(tmp_path)
    for address, text in (("q/m%2Fn", "m/n on q"), ("q%2Fm/n", "n on q/m")):
        assert shown(visit(tmp_path / "report.html", f"#trace/{TASK.name}/{address}/0"))[1] == text


def test_whole_text_is_shown_and_contradictions_are_marked(visit, evaluated):
    path, rows = evaluated
    for row in rows[::7]:
        tab = visit(path, f"#trace/{TASK.name}/{row['id']}/{row['model']}/{row['index']}")
        assert tab.text_content("article .text") == row["response"]
        assert tab.locator(".text .contradicts").count() == contradicted(row)
        right = sum(row["attempts"]) if "<sample>" in row["response"] else 0
        assert tab.locator(".block.correct").count() == right


def test_a_step_leads_to_its_rollouts(visit, run):
    tab = visit(run)
    assert matching(tab) == 24
    picture = tab.locator(".plot svg").first
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] / 2, "y": 10})
    assert matching(tab) == 8 and tab.inner_text("h3").startswith("step 2")
    assert tab.evaluate("location.hash").startswith("#trace/2/")
    tab.get_by_label("Shown step").fill("1")
    tab.get_by_role("button", name="rollouts of step 2").click()
    tab.get_by_label("Shown step").fill("0")
    tab.get_by_label("Shown step").press("Enter")
    assert matching(tab) == 8 and tab.inner_text("h3").startswith("step 1")
    # The whole group, with what GRPO made of it.
    group = json.loads(Path("run/rollouts.jsonl").read_text().splitlines()[0])
    table = tab.inner_text(".members tbody").splitlines()
    assert len(table) == 4
    for line, rollout in zip(table, group["rollouts"], strict=True):
        assert f"{abs(rollout['advantage']):.2f}" in line and f"{rollout['tokens']}" in line


def test_tokens(visit, run):
    """Their text adds up, and each says what sampler and trainer gave it."""
    group = next(group for group in map(json.loads, Path("run/rollouts.jsonl").read_text().splitlines())
                 if group["rollouts"][0]["trainer_logprobs"])
    rollout = group["rollouts"][0]
    tab = visit(run, f"#trace/{group['step']}/{group['id'].replace('/', '%2F')}/0")
    tab.keyboard.press("c")
    tokens = tab.locator(".token")
    assert tokens.count() == rollout["tokens"]
    texts = tokens.all_text_contents()
    ended = rollout["finish"] == "stop"
    assert "".join(texts[:-1] if ended else texts) == rollout["response"]
    tokens.nth(3).hover()
    said = tab.inner_text(".readout")
    for logprobs in (rollout["sampler_logprobs"], rollout["trainer_logprobs"]):
        assert f"{logprobs[3]:.3f}".replace("-0.000", "0.000") in said.replace("-0.000", "0.000")
    tab.locator(".tokens").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text(".readout").startswith("token 5 of")
    tab.get_by_label("Colour").select_option("difference")
    assert tab.locator(".token").count() == rollout["tokens"]


def test_a_thousand_traces(visit, tmp_path):
    """They take less than 20 MB, and open at once; a list of them is as long as one wants."""
    long = "So, 12 * 34 = 408, and then some more of it is said.\n" * 60
    rows = [result("base", number, index, long + text) for number in range(500)
            for index, text in enumerate(responses(2, seed=number))]
    evaluation(tmp_path, rows, samples=2)
    report.renew(tmp_path)
    path = tmp_path / "report.html"
    assert path.stat().st_size < 20e6
    started = time.time()
    tab = visit(path)
    assert matching(tab) == 1000
    assert time.time() - started < 3  # a second on an idle machine
    assert tab.locator(".list > li").count() == 101
    tab.get_by_role("button", name="100 more").click()
    assert tab.locator(".list > li").count() == 201


def test_on_paper(visit, evaluated):
    tab = visit(evaluated[0])
    tab.emulate_media(media="print")
    for unneeded in ("nav", ".controls", ".list", ".keys"):
        assert not tab.locator(unneeded).first.is_visible()
    assert tab.locator("article").is_visible() and tab.locator("#accuracy table").is_visible()
