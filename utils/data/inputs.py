"""Input files: which there are in the folders given, what split their names say, and what they are by their first bytes.

A file may be packed (.gz, .zip). An InputFile is one file of rows: a plain file, or one inside an archive.
"""

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from utils.errors import UserError
from utils.files import show_path

TEXT_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
DATA_ENDINGS = (*TEXT_ENDINGS, ".parquet", ".arrow", ".xlsx")
NOT_READ = {
    ".txt": "plain text: continued pre-training is not done here",
    ".md": "a text for people",
    ".xls": "an old Excel file: save it as .xlsx",
}
LONGEST_PIECE = 1 << 20  # bytes of a line that are looked at together
ENCODING_LINES = 1000  # non-ASCII lines looked at to tell UTF-8 from GB18030
BOM = b"\xef\xbb\xbf"

# Files that `datasets` writes beside its .arrow files to describe them.
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")

# What a file is that begins with these bytes, whatever its name says, and what to do.
FIRST_BYTES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"),
    (rb"\s*<(?i:!doctype html|html|head)", "a web page, not the file: download it again, after signing in if need be"),
    (rb"\s*<\?xml", "XML: save it as .jsonl or .csv"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel file: save it as .xlsx"),
    (rb"%PDF", "a PDF: save its rows as .jsonl or .csv"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16: save it as UTF-8"),
)  # fmt: skip
# Packed forms and tables by their first bytes; a file that has them needs one of these endings.
ENDING_OF_BYTES = {
    b"PK\x03\x04": (".zip", ".xlsx"),
    b"PAR1": (".parquet",),
    b"ARROW1": (".arrow",),
    b"\x1f\x8b": (".gz",),
}

EVALUATION = set(
    "test testset valid validation validset val dev devset eval evalset evaluation heldout".split()
)
_EVALUATION_CHINESE = re.compile(
    "(?:测试|验证|评测|测评|评估|开发(?=集))(?:集|数据|数据集|样本|题|题目|部分)?$"
)
_TRAINING = re.compile("^train|^训练|训练集?$")
# Words beside the one that tells the split: test_set, 测试_数据, test-B.
_BESIDE = set("set data dataset split file part final".split())

# What goes wrong in the middle of an archive.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


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
        """Bytes of the file unpacked, about: what a .gz of more than 4 GB says of itself is too little."""
        packed = self.path.stat().st_size
        if self.member:
            return zipfile.ZipFile(self.path).getinfo(self.member).file_size
        if self.path.suffix.lower() != ".gz":
            return packed
        with open(self.path, "rb") as file:
            file.seek(max(packed - 4, 0))
            return max(int.from_bytes(file.read(4), "little"), packed)

    def open_bytes(self) -> IO[bytes]:
        """The file, unpacked. UserError where the archive is damaged or locked."""
        try:
            if self.member:
                return zipfile.ZipFile(self.path).open(self.member)
            if self.path.suffix.lower() == ".gz":
                return gzip.open(self.path)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{show_path(self.path)} cannot be unpacked ({error})") from None
        return open(self.path, "rb")


class Skipped(NamedTuple):
    """A file or folder that lies in a folder given, and is not read."""

    name: str
    reason: str


def find_input_files(
    inputs: list[Path], made_by: str, by_name: bool = True
) -> tuple[list[InputFile], list[Skipped]]:
    """The data files among `inputs` (files, or folders of them), each once, and what is skipped.

    UserError names `made_by`, the command that makes data. `by_name`: files in a folder, and folders in it, that are named
    as test or validation sets are evaluation; a file that is given by its own name is what the user says it is.
    """
    found, skipped = [], []
    for given in inputs:
        if given.is_dir():
            for path in sorted(given.iterdir()):
                for name, file in _files_in(path, skipped):
                    split = "eval" if by_name and any(map(says_evaluation, Path(name).parts)) else ""
                    found += _input_files(file, name, split, skipped)
        elif not given.exists():
            raise UserError(f"{show_path(given)} does not exist; make it with: {made_by}")
        elif why := _not_data(given):
            endings = ", ".join(DATA_ENDINGS)
            raise UserError(f"{show_path(given)}: {why}; wanted {endings}, or such a file as .gz or .zip")
        else:
            found += _input_files(given, given.name, "", skipped)
    if not found:
        places = ", ".join(map(show_path, inputs))
        there = f" (there: {'; '.join(f'{name}, {why}' for name, why in skipped[:3])})" if skipped else ""
        raise UserError(
            f"no data file ({', '.join(DATA_ENDINGS)}) in {places}{there}; make one with: {made_by}"
        )
    for file in found:
        if re.search("[\ud800-\udfff]", file.name):
            raise UserError(
                f"{ascii(file.name)}: the file's name is not UTF-8; rename it and run the same command again"
            )
    found = list({(file.path.resolve(), file.member): file for file in found}.values())
    return [file._replace(encoding=detect_encoding(file)) for file in found], skipped


def _files_in(path, skipped) -> Iterator[tuple[str, Path]]:
    """(name, file) of a data file in a folder given; of a folder there that is named as a split, its data files."""
    if path.name.startswith(".") or path.name.endswith(".source.json"):
        return
    if path.is_dir():
        if says_evaluation(path.name) or path.name.lower() == "train":
            for file in sorted(path.iterdir()):
                if not file.is_dir() and not file.name.startswith("."):
                    yield from ((f"{path.name}/{name}", same) for name, same in _files_in(file, skipped))
        else:
            skipped.append(
                Skipped(f"{path.name}/", "a folder in the folder: name it after --input-files too")
            )
    elif why := _not_data(path):
        skipped.append(Skipped(path.name, why))
    else:
        yield path.name, path


def _not_data(path):
    """Why a file is not read, or ""."""
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if ending in NOT_READ:
        return NOT_READ[ending]
    if name in DESCRIPTIONS and (next(path.parent.glob("*.arrow"), None) or name == "dataset_dict.json"):
        return "describes a data set, holds no rows"
    if ending in DATA_ENDINGS or name.endswith(".zip"):
        return "" if ending in TEXT_ENDINGS or not name.endswith(".gz") else "unpack it first"
    return f"cannot read {path.suffix or 'a file without extension'}"


def _input_files(path, name, split, skipped):
    if path.suffix.lower() != ".zip":
        return [InputFile(path, name, split)]
    refuse_other_bytes(InputFile(path, name))
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
    except zipfile.BadZipFile as error:
        raise UserError(f"{show_path(path)} is not a whole .zip file ({error})") from None
    found = []
    for member in members:
        parts = Path(member).parts
        if parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        if Path(member).suffix.lower() not in TEXT_ENDINGS:
            skipped.append(Skipped(f"{name}/{member}", _not_data(Path(member)) or "unpack it first"))
            continue
        says = split or ("eval" if any(map(says_evaluation, parts)) else "")
        found.append(InputFile(path, f"{name}/{member}", says, member))
    return found


def says_evaluation(name: str) -> bool:
    """Whether the first or last word of a file's or folder's name is that of an evaluation split, and none says training."""
    while Path(name).suffix.lower() in (*DATA_ENDINGS, ".gz", ".zip"):
        name = Path(name).stem
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[\u4e00-\u9fff]+", name)
    words = [word for word in map(str.lower, words) if word not in _BESIDE and (len(word) > 1 or word > "z")]
    if not words or any(map(_TRAINING.search, words)):
        return False
    return any(word in EVALUATION or _EVALUATION_CHINESE.search(word) for word in (words[0], words[-1]))


def refuse_other_bytes(file: InputFile) -> None:
    """UserError where the first bytes of a file say that it is something else than its name says."""
    with file.open_bytes() as opened:
        start = opened.read(64)
    for pattern, what in FIRST_BYTES:
        if re.match(pattern, start):
            raise UserError(f"{show_path(file.path)} is {what}; then run the same command again")
    for begins, endings in ENDING_OF_BYTES.items():
        if start.startswith(begins) and (file.ending not in endings or file.member):
            raise UserError(f"{show_path(file.path)} is a {endings[-1]} file under another name: rename it")


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
            return "utf-8-sig" if lines.read(3) == BOM else _encoding_of(lines)
    except DAMAGED as error:
        raise UserError(f"{show_path(file.path)} cannot be unpacked ({error})") from None


def _encoding_of(lines):
    """ "utf-8" or "gb18030" for an open file whose first three bytes, which are no BOM, have been read."""
    lines.seek(0)
    seen, failing = 0, {"utf-8": 0, "gb18030": 0}
    for line in iter(lambda: lines.readline(LONGEST_PIECE), b""):
        if line.isascii():
            continue
        seen += 1
        for encoding in failing:
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                failing[encoding] += 1
        if seen == ENCODING_LINES:
            break
    return "gb18030" if 2 * failing["utf-8"] > seen and failing["gb18030"] < failing["utf-8"] else "utf-8"
