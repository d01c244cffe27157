"""Files of rows: read with errors that name the file and the line, written whole or not at all.

Imports no torch, so that `rearrange.py` and `tasks.py` stay light.
"""
import gzip
import hashlib
import json
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run.command import UserError


# ---- reading -------------------------------------------------------------------------------------
def read_jsonl(path: str | Path, required: tuple | dict[str, type] = ()) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", object) for each line of a JSON Lines file.

    Each must have the `required` names, with values of these types where they are given. The file may be
    compressed (.gz); a .json file may be one array. Raises UserError with file and line.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if path.endswith((".parquet", ".csv", ".tsv")):
        raise UserError(f"{path}: not JSON Lines; make it that: python convert.py {path} --out rows.jsonl")
    empty = True
    for where, value in _values(path):
        empty = False
        check_row(value, required, where)
        yield where, value
    if empty:
        raise UserError(f"{path}: the file holds no rows")


def read_rows_so_far(path: str | Path, required: tuple | dict[str, type] = ()) -> list[tuple[str, dict]]:
    """The rows, as `read_jsonl` yields them, of a file that may be empty or not be there yet."""
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return []
    return list(read_jsonl(path, required))


def _values(path):
    """("file:line", what the line holds)"""
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            if path.removesuffix(".gz").endswith(".json"):
                content = f.read().removeprefix(BOM_UTF8)
                if content.lstrip().startswith(b"["):
                    for i, value in enumerate(parsed(content, path), 1):
                        yield f"{path}: item {i}", value
                    return
                f = content.splitlines()
            for i, line in enumerate(f, 1):
                line = line.removeprefix(BOM_UTF8) if i == 1 else line
                if line.strip():
                    value = parsed(line, f"{path}:{i}")
                    try:
                        to_json(value).encode()
                    except ValueError as e:  # NaN; "\ud800" alone, which is valid JSON but no text
                        raise UserError(f"{path}:{i}: not UTF-8 text, or not JSON ({e}); remove it") from e
                    yield f"{path}:{i}", value
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not a whole gzip file; get it again") from e


def whole_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields ("file:line", line), without a last line that is half written."""
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            if line.endswith(b"\n"):
                yield f"{path}:{i}", line


def parsed(content: bytes, where: str | Path) -> Any:
    """The value of a JSON text. Raises UserError, which names `where`."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeError as e:
        raise UserError(f"{where}: not UTF-8 text; fix or remove it") from e
    except (ValueError, RecursionError) as e:  # ValueError: bad JSON, or a number of thousands of digits
        reason = getattr(e, "msg", str(e)[:60])
        raise UserError(f"{where}: not valid JSON ({reason}); fix or remove it") from e


def check_row(row: Any, required: tuple | dict[str, type], where: str | Path) -> None:
    """Raises UserError unless a row is an object with these names, with values of these types."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object like {{...}}, found {type(row).__name__}")
    for name in required:
        if name not in row:
            raise UserError(f"{where}: the key {name!r} is missing (found: {', '.join(row) or 'none'}); "
                            "python convert.py FILE converts published data")
        if isinstance(required, dict) and not isinstance(row[name], required[name]):
            raise UserError(f"{where}: {name} has the wrong type: {str(row[name])[:40]!r}")


def read_json(path: str | Path, content: bytes | None = None) -> dict:
    """The object that a JSON file holds, or this content of it. Raises UserError with the file."""
    if content is None:
        if not os.path.isfile(path):  # to read a pipe would wait for ever
            raise UserError(f"{path}: no such file")
        content = Path(path).read_bytes()
    value = parsed(content, path)
    check_row(value, (), path)
    return value


def to_json(value: Any) -> str:
    """Raises ValueError for a number that is not finite, which JSON does not know."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# ---- names for content ---------------------------------------------------------------------------
def fingerprint(content: str | bytes) -> str:
    """A 64-bit hash of a content, in hexadecimal."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def file_fingerprint(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()[:32]


# ---- writing -------------------------------------------------------------------------------------
@contextmanager
def appearing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write a file, a folder or a link to, and renames it to `path` once all of it
    is there, so that a reader sees the old one or the new one, never half of it.
    """
    tmp = Path(f"{path}.tmp")
    yield tmp
    if tmp.is_file():
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
    os.replace(tmp, path)


def write_whole(path: str | Path, text: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with appearing(path) as tmp:
        tmp.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)


def refuse_folder(path: str | Path) -> None:
    if str(path).endswith("/"):
        raise UserError(f"--out {path}: must be a file, not a folder")


def refuse_existing(path: str | Path) -> None:
    """Nothing is overwritten in silence."""
    refuse_folder(path)
    if os.path.exists(path):
        raise UserError(f"--out {path} exists; give another --out, or move it away")
