"""Files: UTF-8 JSON lines in and out, and writing that never leaves half a file under its real name."""

import contextlib
import difflib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from utils.errors import UserError
from utils.settings import ROOT
from utils.text import printable

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
# The fields of our files that hold a text, and those that hold messages.
TEXTS = ("id", "text", "question", "kind", "term")
MESSAGES = ("messages", "prompt", "chosen", "rejected")
OURS = 'as a script here writes it: a text, or a list of {"role", "content"} with a user and an answer that is not empty'


def show_path(path: str | Path) -> str:
    """A path for a message: relative to the repository where it lies inside it, whole otherwise; always printable."""
    path = Path(path)
    return printable(path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path))


def require_file(path: str | Path, command: str, fields: Sequence[str] = ()) -> Path:
    """Return `path` if it is a file, else raise UserError naming `command`, the one that makes it. `fields`: of its first line."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{show_path(path)} is a folder, wanted a file")
    if not path.is_file():
        raise missing(path, f"make it with: {command}")
    if fields:
        next(read_jsonl(path, fields))
    return path


def missing(path: Path, mend: str = "") -> UserError:
    """The error for a path that is not there. It says where the path is instead, or which name there is alike, or else `mend`.

    A path in a script begins at the repository, and one on the command line at the folder that the user stands in.
    """
    path = Path.cwd() / path
    for base, other in ((Path.cwd(), ROOT), (ROOT, Path.cwd())):
        if path.is_relative_to(base) and (there := other / path.relative_to(base)).exists():
            return UserError(f"looked in {base} for {path.relative_to(base)}; it is in {other}: {there}")
    entries = [entry.name for entry in path.parent.glob("*")]
    for near in difflib.get_close_matches(path.name, entries, 1, 0.82):
        mend = f"did you mean {show_path(path.with_name(near))}?"
    return UserError("; ".join(filter(None, (f"{show_path(path)} does not exist", mend))))


def read_jsonl(path: str | Path, wanted: Sequence[str] = ()) -> Iterator[dict]:
    """Yield the dicts of a JSON lines file that a script here wrote; every dict has the fields in `wanted`.

    UserError, with the line, if it is damaged: not UTF-8, not JSON, empty, or a field is missing or not one of ours.
    """
    number = 0
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                lacking = (
                    [name for name in wanted if name not in row] if isinstance(row, dict) else ["at all"]
                )
                if lacking:
                    raise UserError(f"{show_path(path)}, line {number}: no field {', '.join(lacking)}")
                if odd := [name for name in wanted if not _is_ours(name, row[name])]:
                    raise UserError(f"{show_path(path)}, line {number}: {odd[0]} is not {OURS}")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{show_path(path)}, line {number + 1}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
            why = getattr(error, "msg", error)
            raise UserError(f"{show_path(path)}, line {number}: not JSON ({why})") from None
    if not number:
        raise UserError(f"{show_path(path)} is empty")


def _is_ours(name, value):
    """Tell whether a field holds what it holds in our files."""
    if name in TEXTS:
        return is_text(value)
    if name not in MESSAGES:
        return True
    with contextlib.suppress(TypeError, AttributeError, KeyError, ValueError):
        turns = [(turn["role"], turn["content"], turn.get("reasoning_content") or "") for turn in value]
        if not turns or not all(is_text(text) for turn in turns for text in turn):
            return False
        if name != "messages":
            return True
        roles = [role for role, _, _ in turns]
        answered = "assistant" in roles[roles.index("user") :]
        return answered and all(content for role, content, _ in turns if role == "assistant")
    return False


def is_text(value: object) -> bool:
    """Tell whether it is a text that can be written as UTF-8: an escape such as \\ud800 by itself is half a character."""
    return isinstance(value, str) and not HALF_CHARACTER.search(value)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` (UTF-8 unless binary); move it into place when the block ends well.

    The data reaches the disk before the name does: a power cut leaves no half file under the name. What killed processes have
    left of a file of this name is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        if not psutil.pid_exists(int(left.suffixes[-2][1:])):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Write a model: `save(place)` fills a hidden folder, whose entries then move to `folder`, whole, one by one."""
    partial = folder / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save(partial)
        for path in sorted(partial.iterdir()):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prepare_folder(folder: Path) -> None:
    """Make `folder` where it is missing and try whether it can be written to: OSError now, not after hours of work."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write dicts as JSON lines and return how many."""
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_json(path: str | Path, value: object) -> None:
    """Write one JSON value, indented for reading."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON value; UserError if the file is not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
        raise UserError(f"{show_path(path)}: not JSON ({error})") from None


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a training_log.jsonl. Lines that are no entry, such as one that a kill has cut, are left out, which is said."""
    entries, lines = [], Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[:-1]:  # after the last line break: nothing, or a line cut by a kill
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
    if damaged := len(lines) - 1 - len(entries):
        print(f"{show_path(path)}: {damaged} damaged lines are left out of the curve")
    return entries


def render(template: Path, **values: Any) -> str:
    """The text of a jinja2 template. In HTML (NAME.html.jinja) every value is escaped; all are made printable."""
    return _templates(template.parent).get_template(template.name).render(values)


@functools.cache
def _templates(folder):
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder, encoding="utf-8"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def id_key(identifier: str) -> int:
    """A 64-bit number from the sha256 of a row's id, the same in every run."""
    return int.from_bytes(hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).digest()[:8])


def sample_by_id(rows: Iterable[dict], count: int) -> list[dict]:
    """`count` of the rows (0: all), in their order: those with the lowest id_key, the same ones whatever their order."""
    rows = list(rows)
    by_key = sorted(range(len(rows)), key=lambda index: id_key(rows[index]["id"]))
    return [rows[index] for index in sorted(by_key[: count or len(rows)])]
