"""Files of rows: read with errors that name the file and the line, written whole or not at all.

Imports no torch, so that `rearrange.py` and `tasks.py` stay light.
"""
import gzip
import json
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from cli import UserError


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
        yield where, _row(value, where, path, required)
    if empty:
        raise UserError(f"{path}: the file holds no rows")


def read_rows_so_far(path: str | Path, required: tuple | dict[str, type] = ()) -> list[tuple[str, dict]]:
    """As `read_jsonl`, of a file that a run writes, which may not be there yet, or be empty."""
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
                    for i, value in enumerate(_parsed(content, path), 1):
                        yield f"{path}: item {i}", value
                    return
                f = content.splitlines()
            for i, line in enumerate(f, 1):
                line = line.removeprefix(BOM_UTF8) if i == 1 else line
                if line.strip():
                    yield f"{path}:{i}", _parsed(line, f"{path}:{i}")
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(f"{path}: not a whole gzip file; get it again") from e


def _parsed(content, where):
    try:
        value = json.loads(content.decode("utf-8"))
        to_json(value).encode("utf-8")  # "\ud800" alone is valid JSON but no text
    except UnicodeError as e:
        raise UserError(f"{where}: not UTF-8 text; fix or remove this line") from e
    except (ValueError, RecursionError) as e:  # ValueError: bad JSON, or a number of thousands of digits
        reason = getattr(e, "msg", str(e)[:60])
        raise UserError(f"{where}: not valid JSON ({reason}); fix or remove this line") from e
    return value


def _row(row, where, path, required):
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object like {{...}}, found {type(row).__name__}")
    for name in required:
        if name not in row:
            refuse_published_shape(row, where, path)
            raise UserError(f"{where}: the key {name!r} is missing (found: {', '.join(row) or 'none'})")
    if isinstance(required, dict):
        check_types(row, required, where)
    return row


def check_types(row: dict, types: dict[str, type], where: str) -> None:
    for name, kind in types.items():
        if not isinstance(row[name], kind):
            raise UserError(f"{where}: {name} is {str(row[name])[:40]!r}, which it cannot be")


def row_of(line: bytes, where: str, types: dict[str, type]) -> dict:
    """The object of a line, which must have these names, with values of these types."""
    return _row(_parsed(line, where), where, where.rpartition(":")[0], types)


def refuse_published_shape(row: dict, where: str, path: str | Path) -> None:
    """Name the shape that a row has, if it is one that `convert.py` knows."""
    from convert import shape_of  # here, so that it is a leaf
    shape = shape_of(row)
    if shape:
        raise UserError(f"{where}: this is {shape.about}; make it ours: "
                        f"python convert.py {path} --out {shape.example}")


def read_json(path: str | Path, content: bytes | None = None) -> dict:
    """The object that a JSON file holds, or this content of it. Raises UserError with the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # to read a pipe would wait for ever
            raise UserError(f"{path}: not a file")
        value = json.loads(Path(path).read_bytes() if content is None else content)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def to_json(row: dict) -> str:
    """Raises ValueError for a number that is not finite, which JSON does not know."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def write_whole(path: str | Path, text: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    tmp = f"{path}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(tmp, "wb") as f:
        f.write(text.encode("utf-8") if isinstance(text, str) else text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def refuse_folder(path: str | Path) -> None:
    if str(path).endswith("/"):
        raise UserError(f"--out {path}: must be a file, not a folder")


def refuse_existing(path: str | Path) -> None:
    """Nothing is overwritten in silence."""
    refuse_folder(path)
    if os.path.exists(path):
        raise UserError(f"--out {path} exists; give another --out, or move it away")
