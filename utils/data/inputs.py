"""Data files: which there are in the folders given, what split their names say, and how each is opened.

A file may be packed (.gz, .zip). A source is one file of rows: a plain file, or one inside an archive.
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
DATA_ENDINGS = (*TEXT_ENDINGS, ".parquet", ".xlsx")
ARCHIVES = (".gz", ".zip")
EVALUATION = {"test", "valid", "validation", "val", "dev", "eval", "evaluation", "测试集", "验证集"}
PLAIN_TEXT = "plain text: continued pre-training is not done here"
LONGEST_PIECE = 1 << 20  # bytes of a line that are looked at together
ENCODING_LINES = 1000  # non-ASCII lines looked at to tell UTF-8 from GB18030
BOM = b"\xef\xbb\xbf"


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
    """What lies in a folder that was given, and is not read."""

    name: str
    reason: str


# What goes wrong in the middle of an archive.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


def find_input_files(
    inputs: list[Path], made_by: str, by_name: bool = True
) -> tuple[list[InputFile], list[Skipped]]:
    """The sources among `inputs` (files, or folders of them), each once, and what is skipped.

    UserError names `made_by`, the command that makes data. `by_name`: files in a folder, and folders in it, that are named
    as test or validation sets are evaluation; a file that is given by its own name is what the user says it is.
    """
    found, skipped = [], []
    for given in inputs:
        if given.is_dir():
            for path in sorted(given.iterdir()):
                for name, file in _files_in(path, skipped):
                    split = "eval" if by_name and any(map(says_evaluation, Path(name).parts)) else ""
                    found += _sources_of(file, name, split, skipped)
        elif not given.exists():
            raise UserError(f"{show_path(given)} does not exist; make it with: {made_by}")
        elif why := _not_data(given):
            raise UserError(
                f"{show_path(given)}: {why}; wanted {', '.join(DATA_ENDINGS)}, or such a file as .gz or .zip"
            )
        else:
            found += _sources_of(given, given.name, "", skipped)
    if not found:
        places = ", ".join(map(show_path, inputs))
        there = f" (there: {'; '.join(f'{name}, {why}' for name, why in skipped[:3])})" if skipped else ""
        raise UserError(
            f"no data file ({', '.join(DATA_ENDINGS)}) in {places}{there}; make one with: {made_by}"
        )
    for source in found:
        if not _encodes(source.name):
            raise UserError(
                f"{ascii(source.name)}: the file's name is not UTF-8; rename it and run the same command again"
            )
    found = list({(source.path.resolve(), source.member): source for source in found}.values())
    return [source._replace(encoding=detect_encoding(source)) for source in found], skipped


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
    kind = Path(name.removesuffix(".gz")).suffix
    if kind in (".txt", ".md"):
        return PLAIN_TEXT if kind == ".txt" else "a text for people"
    if kind in DATA_ENDINGS or name.endswith(".zip"):
        return "" if kind not in (".parquet", ".xlsx") or not name.endswith(".gz") else "unpack it first"
    return f"cannot read {path.suffix or 'a file without extension'}"


def _sources_of(path, name, split, skipped):
    if path.suffix.lower() != ".zip":
        return [InputFile(path, name, split)]
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
    """Whether the first or last word of a file's or folder's name is that of an evaluation split."""
    words = re.findall(r"[a-z]+|[\u4e00-\u9fff]+", name.lower().partition(".")[0])
    return bool(words) and bool({words[0], words[-1]} & EVALUATION)


def _encodes(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def detect_encoding(source: InputFile) -> str:
    """ "utf-8", "utf-8-sig" (with a BOM), "gb18030", or "parquet" or "xlsx" for a file that is no text.

    A UTF-8 file with damaged lines stays UTF-8: GB18030 is chosen only where most non-ASCII lines are not UTF-8 and more of
    them are GB18030 (which accepts most byte pairs, so it cannot be asked first).
    """
    if source.ending not in TEXT_ENDINGS:
        return source.ending[1:]
    try:
        with source.open_bytes() as lines:
            first = lines.read(4)
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(
                f"{show_path(source.path)} is UTF-16; save it as UTF-8 and run the same command again"
            )
        if first.startswith(BOM):
            return "utf-8-sig"
        with source.open_bytes() as lines:
            return _encoding_of(lines)
    except DAMAGED as error:
        raise UserError(f"{show_path(source.path)} cannot be unpacked ({error})") from None


def _encoding_of(lines):
    seen, failing = 0, {"utf-8": 0, "gb18030": 0}
    for line in iter(lambda: lines.readline(LONGEST_PIECE), b""):
        if line.isascii():
            continue
        seen += 1
        for encoding in failing:
            failing[encoding] += not _decodes(line, encoding)
        if seen == ENCODING_LINES:
            break
    return "gb18030" if 2 * failing["utf-8"] > seen and failing["gb18030"] < failing["utf-8"] else "utf-8"


def _decodes(line, encoding):
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
