"""Finds the data files among the paths given: a file's name tells its split, its first bytes tell if it is what its name says.

A file may be packed (.gz, .zip). An InputFile is one file of rows: a plain file, or one inside an archive.
"""

import contextlib
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple
from zipfile import BadZipFile, ZipFile

from utils.errors import UserError
from utils.files import missing, show_path
from utils.settings import ROOT

TEXT_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
DATA_ENDINGS = (*TEXT_ENDINGS, ".parquet", ".arrow", ".xlsx")
OLD_EXCEL = "an old Excel file: save it as .xlsx"
NOT_READ = {
    ".txt": "plain text: continued pre-training is not done here",
    ".md": "a text for people",
    ".xls": OLD_EXCEL,
}
ENCODING_LINES = 1000  # non-ASCII lines looked at to tell UTF-8 from GB18030
BOM = b"\xef\xbb\xbf"
SURROGATES = re.compile("[\udc80-\udcff]")  # stand for bytes that could not be decoded

# First bytes of a file that is something else than its name says: what it is and what to do, and the endings that it may have.
FIRST_BYTES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned", ()),
    (rb"\s*<(?i:!doctype html|html|head)", "a web page, not the file: sign in where it lies and download it again", ()),
    (rb"\s*<\?xml|%PDF", "XML or a PDF: save its rows as .jsonl or .csv", ()),
    (rb"\xd0\xcf\x11\xe0", OLD_EXCEL, ()),
    (rb"\xff\xfe|\xfe\xff", "UTF-16: save it as UTF-8", ()),
    (rb"PK\x03\x04", "a .zip or .xlsx file under another name: rename it", (".zip", ".xlsx")),
    (rb"PAR1|\x1f\x8b", "a .parquet or .gz file under another name: rename it", (".parquet", ".gz")),
)  # fmt: skip

# Words of names: of an evaluation split, of training, and those beside them, as in test_set.
EVALUATION = re.compile(
    "^(?:(?:test|valid|val|dev|eval)(?:set)?|validation|evaluation|heldout|holdout)$"
    "|(?:测试|验证|评测|测评|评估|开发(?=集))(?:集|数据|数据集|样本|题|题目)?$"
)
TRAINING = re.compile("^train|^训练|训练集?$")
BESIDE = set("set data dataset split file part final".split())

# Errors of the libraries that read archives, books and Parquet files, if those are damaged, locked or packed in an unknown way.
DAMAGED = (EOFError, LookupError, OSError, RuntimeError, SystemError, ValueError, BadZipFile, zlib.error)


class InputFile(NamedTuple):
    """One file of rows. `name`: what messages and output rows call it; `split`: "eval" if its name says so, else ""."""

    path: Path
    name: str
    split: str = ""
    member: str = ""  # its name inside a .zip
    encoding: str = ""

    @property
    def ending(self) -> str:
        """The ending that says how it is read."""
        return Path(self.member or self.path.name.lower().removesuffix(".gz")).suffix.lower()

    @property
    def size(self) -> int:
        """Bytes of the file, unpacked."""
        with told_if_damaged(self.path), self.open_bytes() as opened:
            return opened.seek(0, 2)

    def open_bytes(self) -> IO[bytes]:
        """The file, unpacked; raises one of DAMAGED."""
        if self.member:
            return ZipFile(self.path).open(self.member)
        return gzip.open(self.path) if self.path.suffix.lower() == ".gz" else open(self.path, "rb")

    def lines(self, newline: str = "\n") -> Iterator[str]:
        """The lines of a text file; lone surrogates stand for bytes that cannot be decoded."""
        with told_if_damaged(self.path), self.open_bytes() as opened:
            yield from io.TextIOWrapper(opened, self.encoding, "surrogateescape", newline)


def find_input_files(inputs: list[Path], made_by: str) -> tuple[list[InputFile], list[tuple[str, str]]]:
    """The data files among `inputs` (files, or folders of them), each once, and (name, reason) of what is skipped in folders.

    UserError names `made_by`, the command that makes data. Files and folders in a folder that are named as test or validation
    sets are evaluation; a file that is given by its own name is what the user says it is.
    """
    found, skipped, endings = {}, [], ", ".join(DATA_ENDINGS)
    for given in inputs:
        if not given.exists():
            raise missing(given, f"make it with: {made_by}" if given == ROOT / "data_prepare/raw" else "")
        for name, path, member in _listed(given, "" if given.is_dir() else given.name):
            if SURROGATES.search(name):
                raise UserError(f"{ascii(name)}: the file's name is not UTF-8; rename it and run this again")
            why = _not_data(path, member)
            if why and path == given and not member:
                raise UserError(f"{show_path(path)}: {why}; wanted {endings}, or such a file as .gz or .zip")
            if why:
                skipped.append((name, why))
                continue
            telling = Path(name if given.is_dir() else member).parts
            split = "eval" if any(map(says_evaluation, telling)) else ""
            found[path.resolve(), member] = InputFile(path, name, split, member)
    if not found:
        places = ", ".join(map(show_path, inputs))
        there = f" (there: {'; '.join(f'{name}, {why}' for name, why in skipped[:3])})" if skipped else ""
        raise UserError(f"no data file ({endings}) in {places}{there}; make one with: {made_by}")
    return [file._replace(encoding=detect_encoding(file)) for file in found.values()], skipped


def _listed(path, name, depth=0):
    """(name, path, member of a .zip or "") of a file; of what lies in a folder, and in a folder there that is named as a split."""
    if path.is_dir() and (not depth or depth == 1 and (says_evaluation(path.name) or path.name == "train")):
        for inside in sorted(path.iterdir()):
            if not inside.name.startswith(".") and not inside.name.endswith(".source.json"):
                yield from _listed(inside, f"{name}{inside.name}{'/' * inside.is_dir()}", depth + 1)
    elif path.suffix.lower() == ".zip":
        _refuse_other_bytes(path)
        with told_if_damaged(path), ZipFile(path) as archive:
            members = archive.namelist()
        hidden = re.compile(r"__MACOSX/|(.*/)?\.|.*/$")
        yield from ((f"{name}/{member}", path, member) for member in members if not hidden.match(member))
    else:
        yield name, path, ""


def _not_data(path, member):
    """The reason why a file is not read, or ""."""
    name = (member or path.name).lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        return "a folder in the folder: name it after --input-files too"
    if name in ("dataset_dict.json", "dataset_info.json", "state.json"):
        return "describes a data set, holds no rows"
    if ending not in (*DATA_ENDINGS, ".zip"):
        return NOT_READ.get(ending, f"cannot read {Path(name).suffix or 'a file without extension'}")
    packed = member or name.endswith(".gz")
    return "unpack it first" if packed and ending not in TEXT_ENDINGS or member.endswith(".gz") else ""


def says_evaluation(name: str) -> bool:
    """True if the first or last word of a file's or folder's name is that of an evaluation split, and none says training."""
    while Path(name).suffix.lower() in (*DATA_ENDINGS, ".gz", ".zip"):
        name = Path(name).stem
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[\u4e00-\u9fff]+", name)
    words = [word for word in map(str.lower, words) if word not in BESIDE and (len(word) > 1 or word > "z")]
    if not words or any(map(TRAINING.search, words)):
        return False
    return bool(EVALUATION.search(words[0]) or EVALUATION.search(words[-1]))


def _refuse_other_bytes(path):
    """UserError if the first bytes of a file say that it is something else than its name says."""
    with open(path, "rb") as opened:
        start = opened.read(64)
    for pattern, what, endings in FIRST_BYTES:
        if re.match(pattern, start) and path.suffix.lower() not in endings:
            raise UserError(f"{show_path(path)} is {what}; then run the same command again")


@contextlib.contextmanager
def told_if_damaged(path: Path):
    """One of DAMAGED becomes a UserError. Calls of a library belong inside, and none of ours, whose mistakes it would hide."""
    try:
        yield
    except DAMAGED as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{show_path(path)} is not a whole {path.suffix.lower()} file ({why})") from None


def detect_encoding(file: InputFile) -> str:
    """ "utf-8", "utf-8-sig" (with a BOM), "gb18030", or "parquet", "arrow" or "xlsx" for a file that is no text.

    A UTF-8 file with damaged lines stays UTF-8. GB18030 accepts most byte pairs: it is chosen only if most non-ASCII lines are
    not UTF-8 and more of them are GB18030.
    """
    _refuse_other_bytes(file.path)
    if file.ending not in TEXT_ENDINGS:
        return file.ending[1:]
    with told_if_damaged(file.path), file.open_bytes() as lines:
        seen = list(itertools.islice((line for line in lines if not line.isascii()), ENCODING_LINES))
    if seen and seen[0].startswith(BOM):
        return "utf-8-sig"
    damaged = []
    for encoding in ("utf-8", "gb18030"):
        texts = (line.decode(encoding, "surrogateescape") for line in seen)
        damaged.append(sum(1 for text in texts if SURROGATES.search(text)))
    return "gb18030" if 2 * damaged[0] > len(seen) and damaged[1] < damaged[0] else "utf-8"
