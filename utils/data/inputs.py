"""Finds the input files in the folders given, and tells their split by their names and their form by their first bytes.

A file may be packed (.gz, .zip). An InputFile is one file of rows: a plain file, or one inside an archive.
"""

import gzip
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from utils.errors import UserError
from utils.files import missing, show_path
from utils.settings import ROOT

TEXT_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
DATA_ENDINGS = (*TEXT_ENDINGS, ".parquet", ".arrow", ".xlsx")
PLAIN_TEXT = "plain text: continued pre-training is not done here"
NOT_READ = {".txt": PLAIN_TEXT, ".md": "a text for people", ".xls": "an old Excel file: save it as .xlsx"}
ENCODING_LINES = 1000  # non-ASCII lines looked at to tell UTF-8 from GB18030
BOM = b"\xef\xbb\xbf"
SURROGATES = re.compile("[\udc80-\udcff]")  # stand for bytes that could not be decoded

# First bytes of a file that is something else than its name says: what it is and what to do, and the endings that it may have.
FIRST_BYTES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned", ()),
    (rb"\s*<(?i:!doctype html|html|head)", "a web page, not the file: sign in where it lies and download it again", ()),
    (rb"\s*<\?xml|%PDF", "XML or a PDF: save its rows as .jsonl or .csv", ()),
    (rb"\xd0\xcf\x11\xe0", "an old Excel file: save it as .xlsx", ()),
    (rb"\xff\xfe|\xfe\xff", "UTF-16: save it as UTF-8", ()),
    (rb"PK\x03\x04", "a .zip or .xlsx file under another name: rename it", (".zip", ".xlsx")),
    (rb"PAR1", "a .parquet file under another name: rename it", (".parquet",)),
    (rb"ARROW1", "an .arrow file under another name: rename it", (".arrow",)),
    (rb"\x1f\x8b", "a .gz file under another name: rename it", ()),
)  # fmt: skip

EVALUATION = (
    "test testset valid validation validset val dev devset eval evalset evaluation heldout holdout".split()
)
_EVALUATION_CHINESE = re.compile("(?:测试|验证|评测|测评|评估|开发(?=集))(?:集|数据|数据集|样本|题|题目)?$")
_TRAINING = re.compile("^train|^训练|训练集?$")
# Words beside the one that tells the split: test_set, 测试_数据, test-B.
_BESIDE = set("set data dataset split file part final".split())

# Errors of a damaged archive; a locked one raises RuntimeError, one of an unknown packing NotImplementedError.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError, NotImplementedError)


class InputFile(NamedTuple):
    """One file of rows. `name`: what messages and output rows call it; `split`: "eval" where its name says so, else ""."""

    path: Path
    name: str
    split: str = ""
    member: str = ""  # its name inside a .zip
    encoding: str = ""

    @property
    def ending(self) -> str:
        """The ending that says how it is read."""
        name = self.member or self.path.name.lower().removesuffix(".gz")
        return Path(name).suffix.lower()

    @property
    def size(self) -> int:
        """Bytes of the file unpacked, about: a .gz of more than 4 GB states too little in its last four bytes."""
        if self.member:
            return zipfile.ZipFile(self.path).getinfo(self.member).file_size
        packed = self.path.stat().st_size
        with open(self.path, "rb") as file:
            file.seek(max(packed - 4, 0))
            return max(packed, int.from_bytes(file.read(), "little") * (self.path.suffix.lower() == ".gz"))

    def open_bytes(self) -> IO[bytes]:
        """The file, unpacked; raises one of DAMAGED."""
        if self.member:
            return zipfile.ZipFile(self.path).open(self.member)
        return gzip.open(self.path) if self.path.suffix.lower() == ".gz" else open(self.path, "rb")


def find_input_files(
    inputs: list[Path], made_by: str, by_name: bool = True
) -> tuple[list[InputFile], list[tuple[str, str]]]:
    """The data files among `inputs` (files, or folders of them), each once, and (name, reason) of what is skipped in folders.

    UserError names `made_by`, the command that makes data. `by_name`: files in a folder, and folders in it, that are named
    as test or validation sets are evaluation; a file that is given by its own name is what the user says it is.
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
            telling = Path(name if by_name and given.is_dir() else member).parts
            split = "eval" if any(map(says_evaluation, telling)) else ""
            found[path.resolve(), member] = InputFile(path, name, split, member)
    if not found:
        places = ", ".join(map(show_path, inputs))
        there = f" (there: {'; '.join(f'{name}, {why}' for name, why in skipped[:3])})" if skipped else ""
        raise UserError(f"no data file ({endings}) in {places}{there}; make one with: {made_by}")
    return [file._replace(encoding=detect_encoding(file)) for file in found.values()], skipped


def _listed(path, name, depth=0) -> Iterator[tuple[str, Path, str]]:
    """(name, path, member of a .zip or "") of a file; of what lies in a folder, and in a folder there that is named as a split."""
    if path.is_dir() and (not depth or depth == 1 and (says_evaluation(path.name) or path.name == "train")):
        for inside in sorted(path.iterdir()):
            if not inside.name.startswith(".") and not inside.name.endswith(".source.json"):
                whole = f"{name}{inside.name}{'/' if inside.is_dir() else ''}"
                yield from _listed(inside, whole, depth + 1)
    elif path.suffix.lower() == ".zip":
        refuse_other_bytes(InputFile(path, path.name))
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{show_path(path)} is not a whole .zip file ({error})") from None
        members = [name for name in members if not re.match(r"__MACOSX/|(.*/)?\.|.*/$", name)]
        yield from ((f"{name}/{member}", path, member) for member in members)
    else:
        yield name, path, ""


def _not_data(path, member):
    """The reason why a file is not read, or ""."""
    name = (member or path.name).lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        return "a folder in the folder: name it after --input-files too"
    described = name in ("dataset_info.json", "state.json") and any(path.parent.glob("*.arrow"))
    if described or name == "dataset_dict.json":
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
    words = [word for word in map(str.lower, words) if word not in _BESIDE and (len(word) > 1 or word > "z")]
    if not words or any(map(_TRAINING.search, words)):
        return False
    return any(word in EVALUATION or _EVALUATION_CHINESE.search(word) for word in (words[0], words[-1]))


def refuse_other_bytes(file: InputFile) -> None:
    """UserError where the first bytes of a file say that it is something else than its name says."""
    with open(file.path, "rb") as opened:
        start = opened.read(64)
    if file.member or file.path.suffix.lower() == ".gz" and start.startswith(b"\x1f\x8b"):
        with file.open_bytes() as opened:
            start = opened.read(64)
    for pattern, what, endings in FIRST_BYTES:
        if re.match(pattern, start) and (file.member or file.ending not in endings):
            raise UserError(f"{show_path(file.path)} is {what}; then run the same command again")


def detect_encoding(file: InputFile) -> str:
    """ "utf-8", "utf-8-sig" (with a BOM), "gb18030", or "parquet", "arrow" or "xlsx" for a file that is no text.

    A UTF-8 file with damaged lines stays UTF-8: GB18030 is chosen only where most non-ASCII lines are not UTF-8 and more of
    them are GB18030 (which accepts most byte pairs, so it cannot be asked first).
    """
    try:
        refuse_other_bytes(file)
        if file.ending not in TEXT_ENDINGS:
            return file.ending[1:]
        with file.open_bytes() as lines:
            seen = list(itertools.islice((line for line in lines if not line.isascii()), ENCODING_LINES))
    except DAMAGED as error:
        raise UserError(f"{show_path(file.path)} cannot be unpacked ({error})") from None
    if seen and seen[0].startswith(BOM):
        return "utf-8-sig"
    damaged = {"utf-8": 0, "gb18030": 0}
    for line, encoding in itertools.product(seen, damaged):
        damaged[encoding] += bool(SURROGATES.search(line.decode(encoding, "surrogateescape")))
    utf8, gb18030 = damaged.values()
    return "gb18030" if 2 * utf8 > len(seen) and gb18030 < utf8 else "utf-8"
