"""What every command owes its user: one clear line on bad input, flags that explain themselves, a clean end.

    command(main)                                # exit status 0, 2 with one line, or 128 + a signal's number
    say("once, from the first of several processes")
    with Progress("sft", total=60) as progress:
        progress.update(loss="0.123")            # a bar, or, without a terminal, a line now and then

What is printed decides nothing: it may have no reader, no terminal, no room on the disk. And no text of a
model steers the terminal. Imports nothing of ours and no torch, so that `rearrange.py` and `tasks.py` stay
light.
"""
import argparse
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from tqdm import tqdm

# Waiting threads sleep. Spinning, they would take a busy CPU from the very threads that they wait for.
# Read when torch is imported, which every command does after this module.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class UserError(Exception):
    """A mistake the user can fix.

    The message is one line that names the file, line or flag and how to fix it.
    """


# ---- what is printed -----------------------------------------------------------------------------
# What would move the cursor, colour the screen or reverse a line: control characters (except line feed and
# tab), and the marks of bidirectional text.
CONTROL = [*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x200F, *range(0x2028, 0x202F),
           *range(0x2066, 0x206A)]
SPELLED_OUT = {code: chr(code).encode("unicode_escape").decode() for code in CONTROL}


def printable(text: str, one_line: bool = False) -> str:
    """A text of users or models, for a terminal: control characters are spelled out."""
    text = text.translate(SPELLED_OUT)
    return text.replace("\n", "\\n") if one_line else text


def prepare_streams() -> None:
    """Make printing safe: a closed stream is filled, and characters that a terminal lacks get backslashes."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it fills the place of a closed stream, which the next file would have taken
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (the interpreter closes it)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing(stream) -> Iterator[None]:
    """Where printing to a stream fails, the stream goes silent."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: it is closed
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # for what it still holds


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, from the first of several processes only."""
    if is_first():
        with printing(sys.stdout):
            print(printable(text), flush=True)


class Progress:
    """How far a command is, from the first process only: a bar on a terminal, else a line now and then.

    `figures` of `update` are shown beside it.
    """
    SECONDS = 20.0  # between lines

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "step"):
        self.is_bar = sys.stderr.isatty() and is_first()
        stream = sys.stderr if self.is_bar else open(os.devnull, "w")  # noqa: SIM115
        self.bar = tqdm(total=total, initial=done, desc=printable(name, one_line=True), unit=unit,
                        file=stream, leave=False, ncols=None if self.is_bar else 0)
        self.said_at = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        with printing(sys.stderr):
            self.bar.close()

    def update(self, **figures: str) -> None:
        """One more is done."""
        with printing(sys.stderr):
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update()
        done = self.bar.n == self.bar.total
        if not self.is_bar and (done or time.monotonic() - self.said_at > self.SECONDS):
            say(str(self.bar))
            self.said_at = time.monotonic()


# ---- running a command ---------------------------------------------------------------------------
# Each asks a command to stop: a person, a terminal that is closed, a scheduler whose time is up (Slurm's
# --signal sends USR1 or USR2 if told so).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(KeyboardInterrupt):
    """Somebody asked the command to stop."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.number = number


def command(main: Callable[[], None], resumable: bool = False) -> None:
    """Run `main()` as a command: exit status 0 on success, 2 on a user's mistake, 128 + the signal's number
    (130 on Ctrl-C) when it was asked to stop. `resumable`: it has the flag --resume.

    A bug of ours keeps its traceback.
    """
    prepare_streams()
    status = 0
    with handlers(_raise_stopped):
        try:
            main()
        except KeyboardInterrupt as e:
            status = 128 + getattr(e, "number", signal.SIGINT)
            way_on = "; what was written is whole, go on with --resume auto" if resumable else ""
            _say_last(status, f"interrupted{way_on}")
        except Exception as e:
            message = explanation(e)
            if message is None:
                raise
            status = 2
            _say_last(status, message)
    if "WORLD_SIZE" in os.environ:
        # At once: torch's threads sometimes abort an interpreter that is torn down, and torchrun would take
        # that for a failure.
        os._exit(status)
    if status:
        sys.exit(status)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    ignore_further_signals()  # a Ctrl-C comes twice under torchrun: from the terminal and from its agent
    raise Stopped(number)


def ignore_further_signals() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While it is on, the signals that ask to stop go to `handler`, except those already ignored (nohup)."""
    before = {}
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is handler:  # else they are ignored, to the end
                signal.signal(number, old)


OTHERS_WAIT = 5.0  # seconds


def _say_last(status, message):
    """Print the last line, once, though all processes that torchrun started may have the same to say.

    The first of a host says it and ends, whereupon torchrun ends the others. One that still lives after some
    seconds has failed for a reason of its own.
    """
    ignore_further_signals()
    if int(os.environ.get("LOCAL_RANK", 0)):
        if status != 2:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's
        time.sleep(OTHERS_WAIT)
        message = f"process {os.environ['RANK']}: {message}"
    with printing(sys.stderr):
        print(f"{Path(sys.argv[0]).name}: {printable(message, one_line=True)}", file=sys.stderr, flush=True)


def explanation(error: Exception) -> str | None:
    """One line for what the user or the machine did wrong; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "while writing"
            return f"the disk is full ({where}); free some space, then go on as after an interruption"
        if error.filename and error.strerror:
            return f"{error.filename}: {error.strerror.lower()}"
        return None
    # torch's allocators: RuntimeError on CPU, OutOfMemoryError (a RuntimeError) on a GPU
    no_memory = "out of memory" in str(error) or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or no_memory:
        return ("out of memory; "
                "lower --slots, --micro-batch-tokens or --max-new-tokens (whichever this command has)")
    # torch's ways to say that another process did not answer: a RuntimeError of gloo, or a DistError.
    if "gloo" in str(error) or any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return ("another process is dead or stuck: its connection is lost, or it did not answer within "
                "--timeout; the last checkpoint is good, go on with --resume")
    return None


# ---- flags ---------------------------------------------------------------------------------------
class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. `may_change` and `location` mark its flags."""

    def error(self, message: str):
        raise UserError(f"{message} (--help explains every flag)")

    def parse_args(self):
        class Flags(argparse.Namespace):
            """The flags. Class attributes are not in `vars()`, so these two are no flags."""
            may_change = {action.dest for action in self._actions if hasattr(action, "may_change")}
            locations = {action.dest for action in self._actions if hasattr(action, "is_location")}
        return super().parse_args(namespace=Flags())


def may_change(flag: argparse.Action) -> None:
    """Marks a flag that --resume lets differ: it changes how far a run goes or how it is made, not its steps
    (except for rounding)."""
    flag.may_change = True


def location(flag: argparse.Action) -> None:
    """Marks a flag that says where something is: a run that goes on compares what is there, not the path."""
    flag.is_location = True


def bare_parser(doc: str) -> Parser:
    """A parser without any flag but --help."""
    return Parser(description=doc, formatter_class=_Help, allow_abbrev=False)  # --task is not --tasks


def parser(doc: str, out: str | None, model: str | None = "mini") -> argparse.ArgumentParser:
    """An argparse parser with the flags that every command has.

    `model=None` leaves out those about a model, `model=""` only --model itself.
    """
    p = bare_parser(doc)
    if model:
        location(p.add_argument("--model", default=model, help="folder in Hugging Face format, or hub id"))
    if model is not None:
        may_change(p.add_argument("--device", default="auto",
                                  help="cpu, cuda or cuda:N; auto takes a GPU if there is one"))
        p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of the weights; auto is bfloat16 on a GPU, float32 on a CPU")
        p.add_argument("--chat-template-kwargs", type=json_object, metavar="JSON",
                       help="for the model's chat template, such as '{\"enable_thinking\": false}'; "
                            "if not given, what the run that made the model was given")
    location(p.add_argument("--out", type=output, default=out, help="where the output goes"))
    p.add_argument("--seed", type=number(int, -2**63, 2**63 - 1), default=0,
                   help="the same seed gives the same output")
    return p


def number(kind: type, low=None, high=None, open_low: bool = False) -> Callable[[str], int | float]:
    """An argparse type, a number within bounds: `--top-p 7` is one line, not a crash an hour later."""
    def parse(text):
        value = kind(text)
        too_low = low is not None and (value < low or (open_low and value == low))
        too_high = high is not None and value > high
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be a finite number")
        if too_low or too_high:
            bounds = f"above {low}" if open_low else f"at least {low}"
            if high is not None:
                bounds += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value
    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def json_object(text: str) -> dict:
    """An argparse type."""
    value = json.loads(text, parse_constant=int)  # int("NaN") is a ValueError, as bad JSON is
    if not isinstance(value, dict):
        raise ValueError
    for name in ("messages", "add_generation_prompt", "tools", "documents"):
        if name in value:
            raise argparse.ArgumentTypeError(f"{name} cannot be given")
    return value


json_object.__name__ = "JSON object"  # argparse names it, as above


def output(text: str) -> str:
    """An argparse type: a path that can be made."""
    if not text.strip():
        raise argparse.ArgumentTypeError("give a path that is not empty")
    for parent in Path(text).absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text} cannot be made: {parent} is a file")
    return text


def resume_flag(p: argparse.ArgumentParser) -> None:
    may_change(p.add_argument(
        "--resume", nargs="?", const="yes", choices=["yes", "auto"], default=None,
        help="continue the run in --out, with the same result; auto: start it if there is none"))


def split_list(text: str, flag: str) -> list[str]:
    """The parts of a list with commas. Raises UserError if one is empty or there twice."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise UserError(f"{flag} {text!r}: nothing between two commas")
    refuse_repeated([os.path.normpath(part) for part in parts], f"{flag} {text}")  # two spellings of one path
    return parts


def refuse_repeated(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {name} appears twice; name it once")


# What flags are if they are not given: (for a model of the miniature's size, for others what the paper has).
Defaults = dict[str, tuple[float, float]]


def if_not_given(values: tuple[float, float]) -> str:
    """The end of the help of a flag with two defaults."""
    miniature, paper = (f"{value:g}".replace("e-0", "e-") for value in values)
    return f"if not given, the paper's {paper}, or {miniature} for a model under 10M parameters"


def fill_in(args, defaults: Defaults, is_miniature: bool) -> None:
    """Set the flags that were not given, so that run.json has their values."""
    for name, (miniature, paper) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, miniature if is_miniature else paper)


positive = number(int, 1)
natural = number(int, 0)
