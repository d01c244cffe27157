"""What every command owes its user: one clear line on bad input, whole files, a record of the run.

Imports nothing of ours and no torch, so that `rearrange.py` and `tasks.py` stay light.
"""
import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the file, line or flag and the mend."""


def command(main):
    """Run `main()` as a command. Exit status 0 on success, 2 on a user's mistake, 130 on Ctrl-C."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as e:
        message, status = str(e), 2
    except KeyboardInterrupt:
        message, status = "interrupted; what was written is whole. sample.py goes on when called again, the trainers with --resume", 130
    except BrokenPipeError:  # `... | head` closed our output: nothing more can be printed, and the work is not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            message, status = f"the disk is full ({e.filename or 'while writing'}); free some space, then go on as after an interruption", 2
        elif e.filename and e.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG):
            message, status = f"{e.filename}: {e.strerror.lower()}", 2
        else:
            raise
    except Exception as e:  # torch's allocators: RuntimeError on CPU, OutOfMemoryError (a RuntimeError) on a GPU
        if not isinstance(e, MemoryError) and not any(s in str(e) for s in ("out of memory", "can't allocate memory")):
            raise
        message, status = "out of memory; lower --slots, --micro-batch-tokens or --max-new-tokens (whichever this command has)", 2
    else:
        return
    if os.environ.get("RANK", "0") == "0" or status != 130:
        print(f"{name}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(status)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parser(doc, out, model="mini"):
    """An argparse parser with the flags that every command has. `model=None` leaves out those about a model, "" only --model itself."""
    p = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    if model:
        p.add_argument("--model", default=model, help="a folder in Hugging Face format, or a hub id; mini is the one that ships with the project")
    if model is not None:
        p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU if there is one")
        p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the weights; auto is bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--out", default=out, help="where the output goes; nothing is overwritten in silence")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same output")
    return p


def number(kind, low=None, high=None, open_low=False):
    """An argparse type: a number within bounds, so that `--top-p 7` is one line and not a crash an hour later."""
    def parse(text):
        value = kind(text)
        if value != value or (low is not None and (value < low or open_low and value == low)) or (high is not None and value > high):
            bound = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}" + (f" and at most {high}" if high is not None else ""))
        return value
    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


positive, natural = number(int, 1), number(int, 0)


def read_jsonl(path, keys=()):
    """Yield the objects of a JSON Lines file; `keys` must be in each. Raises UserError naming file and line."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    count = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                to_json(row).encode("utf-8")  # "\ud800" alone is valid JSON but no text
            except UnicodeError:
                raise UserError(f"{path}:{number}: not UTF-8 text; mend or remove this line")
            except (ValueError, RecursionError) as e:  # ValueError: bad JSON, or a number of thousands of digits
                raise UserError(f"{path}:{number}: not valid JSON ({getattr(e, 'msg', str(e)[:60])}); mend or remove this line")
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object like {{...}}, found {type(row).__name__}")
            missing = [k for k in keys if k not in row]
            if missing:
                raise UserError(f"{path}:{number}: the key {missing[0]!r} is missing (found: {', '.join(row) or 'none'})")
            count += 1
            yield row
    if not count:
        raise UserError(f"{path}: the file holds no rows")


def to_json(row):
    return json.dumps(row, ensure_ascii=False)


def write_whole(path, text):
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    tmp = f"{path}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def refuse_existing(path):
    """Nothing is overwritten in silence."""
    if os.path.exists(path):
        raise UserError(f"--out {path} exists; give another --out, or move it away")


def run_record(args):
    """The command, every flag, versions and git commit, as `run.json` keeps them."""
    from importlib import metadata
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "tokenizers", "safetensors", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    commit, here = None, Path(__file__).parent
    if (here / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "flags": vars(args), "versions": versions, "git": commit}
