"""The page is well-formed, loads nothing from elsewhere, and text of a model is never markup."""
from html.parser import HTMLParser

from report import page

HOSTILE = "</pre><script>alert(1)</script> & \"quoted\" <b>"


class Page(HTMLParser):
    """Checks that every tag closes and that nothing is loaded from elsewhere."""
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.seen = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not any(name in ("src", "href") for name, _ in attrs)
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def row(correct):
    texts = dict.fromkeys(("id", "question", "response", "reason"), HOSTILE)
    return {**texts, "correct": correct, "tokens": 7}


def test_the_page_is_well_formed_whatever_the_text():
    figures = {"accuracy": 0.5, "interval": (0.2, 0.8), "questions": 2, "samples": 1, "lenient": 0.5,
               "pass": {},
               "truncated": 0, "tokens": 7, "answers": 1, "reflections": 0, "first_attempt": 0,
               "any_attempt": 0,
               "f1_correct": None, "f1_incorrect": None, "no_answer": 0, "wrong_form": 0}
    cells = [{"model": model, "task": HOSTILE, **figures} for model in ("base", HOSTILE)]
    results = {(model, HOSTILE): [row(True), row(False)] for model in ("base", HOSTILE)}
    text = page(HOSTILE, cells, results)
    assert {"svg", "table", "details", "summary"} <= Page(text).seen
    assert "<script" not in text and "<b>" not in text
    assert page(HOSTILE, cells, results) == text  # same data, same bytes
