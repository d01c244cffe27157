"""What is printed: it never decides what becomes of a run, and no text of a model steers the terminal.

    with streams_that_never_fail():
        say("once, from the first of several processes")
        with Progress("sft", total=60) as progress:
            progress.update(loss="0.123")      # a bar, or, without a terminal, a line now and then
"""
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm


# ---- streams -----------------------------------------------------------------------------------------
class NeverFailing:
    """A stream that goes silent where another fails: its reader has ended, its terminal is gone, its disk is
    full. What a run prints may never decide what becomes of it.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with self.silent_on_failure():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.silent_on_failure():
            self.stream.flush()

    @contextmanager
    def silent_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            nowhere = open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the stream)
            with suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self.stream.fileno())  # for what it still holds
            self.stream = nowhere

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def streams_that_never_fail() -> Iterator[None]:
    """While it is on, printing raises nothing, not even on streams that were closed at the start."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # it fills the place of a closed stream, which the next file would have taken
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know no more than ASCII
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (the interpreter closes it)
    sys.stdout, sys.stderr = (NeverFailing(stream or nowhere) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


# ---- text --------------------------------------------------------------------------------------------
# What would move the cursor, colour the screen or turn a line around: control characters, but the line feed
# and the tab, and those of bidirectional text.
CONTROL = [*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x200F, *range(0x2028, 0x202F),
           *range(0x2066, 0x206A)]
SPELLED_OUT = {code: chr(code).encode("unicode_escape").decode() for code in CONTROL}


def printable(text: str, one_line: bool = False) -> str:
    """A text of users or models, for a terminal: control characters are spelled out."""
    text = text.translate(SPELLED_OUT)
    return text.replace("\n", "\\n") if one_line else text


def say(text: str) -> None:
    """Print, from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


# ---- progress ----------------------------------------------------------------------------------------
class Progress:
    """How far a command is, from the first process only: a bar on a terminal, else a line now and then.

    `figures` of `update` are shown beside it.
    """
    MOST_SECONDS = 60.0  # between lines; in shorter work there are up to 20
    LEAST_SECONDS = 3.0

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "step"):
        self.name = printable(name, one_line=True)
        self.total = total
        self.unit = unit
        self.done = done
        self.done_at_start = done
        self.done_at_last_line = done
        self.started_at = time.monotonic()
        self.last_line_at = self.started_at
        hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: on a terminal only
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit=unit, disable=hidden, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def update(self, **figures: str) -> None:
        """One more is done."""
        self.done += 1
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update()
        now = time.monotonic()
        waited = now - self.last_line_at
        far = self.done - self.done_at_last_line >= self.total / 20 and waited > self.LEAST_SECONDS
        if self.bar.disable and (far or waited > self.MOST_SECONDS or self.done == self.total):
            seconds_each = (now - self.started_at) / (self.done - self.done_at_start)
            left = seconds_each * (self.total - self.done)
            shown = "".join(f", {name} {value}" for name, value in figures.items())
            say(f"{self.name}: {self.unit} {self.done} of {self.total}{shown}, {duration(left)} left")
            self.done_at_last_line = self.done
            self.last_line_at = now


def duration(seconds: float) -> str:
    """duration(50) -> "50 s"      duration(200) -> "3 min"      duration(10000) -> "2.8 h" """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
