"""The Hugging Face Hub: what a repository holds at one commit, and its files brought to disk whole or not at all.

huggingface_hub's own download functions are not used. They do not compare a file with the sha256 of the listing, begin a file
again after a kill, retry in silence or not at all, and their fast path (Xet) goes around mirrors. Here every file is verified,
goes on where it stopped, and retries are announced. Files come over plain HTTP from HF_ENDPOINT, the Hub or a mirror
(utils/hub_requests.py).
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.errors import RunError, UserError
from utils.files import is_text, read_json, sha256_of, show_path
from utils.hub_requests import OTHER_MIRROR, Endpoint, ListingBudget, TemporaryFailure, Wanted, web_page
from utils.text import ByteProgress, format_bytes, printable, say, shorten

COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
SPARE_BYTES = 64 << 20  # to leave free on the disk
LISTING_PAGES = 1000  # of 1,000 files each


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it: `sha256` for the large ones (LFS), else "" and only `blob`, the git blob id, counts."""

    path: str
    size: int
    blob: str
    sha256: str

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repo:
    """A repository at one commit. `kind` is model or dataset, `licence` the Hub's short name for it or None."""

    kind: str
    id: str
    commit: str
    licence: str | None
    files: dict[str, HubFile]

    @property
    def page(self) -> str:
        return web_page(self.kind, self.id)


class Hub:
    """Repositories on the Hub or the mirror that HF_ENDPOINT names, and their files."""

    def __init__(self, timeout: float, retries: int):
        self.server = Endpoint(timeout, retries)
        self.endpoint = self.server.address

    # ---- what a repository holds

    def look_up(self, kind: str, repo_id: str, revision: str) -> Repo:
        """The Repo that `revision` (commit, branch or tag) means now. UserError where it is not there or not allowed."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
            raise UserError(f"{repo_id!r} is not the name of a {kind} on the Hub, wanted owner/name")
        api, wanted = f"{self.endpoint}/api/{kind}s/{repo_id}", Wanted(kind, repo_id, revision)
        budget = ListingBudget(self.endpoint)
        info, _ = self.server.get_json(f"{api}/revision/{quote(revision, safe='')}", wanted, budget)
        commit, tags = (info.get("sha"), info.get("tags") or []) if isinstance(info, dict) else (None, [])
        if not (_is_digest(commit, COMMIT) and isinstance(tags, list) and all(map(is_text, tags))):
            raise RunError(f"{self.endpoint} does not describe {repo_id} as the Hub does")
        if COMMIT.fullmatch(revision) and revision != commit:
            raise RunError(f"{self.endpoint} gives commit {commit} for {repo_id} at {revision}")
        licence = next((tag[8:] for tag in tags if tag.startswith("license:")), None)
        files = self._list_files(f"{api}/tree/{commit}", wanted, budget)
        return Repo(kind, repo_id, commit, licence, {file.path: file for file in files})

    def _list_files(self, url, wanted, budget):
        """The HubFiles that the pages at `url` list. Of a link to the next page only the query counts: mirrors pass on the
        Hub's own links, and a page is asked of nobody but the endpoint."""
        files, query, seen = [], "recursive=true", set()
        while query is not None:
            if query in seen or len(seen) == LISTING_PAGES:
                raise RunError(f"{self.endpoint} lists {wanted.repo_id} in pages without end; {OTHER_MIRROR}")
            seen.add(query)
            page, query = self.server.get_json(f"{url}?{query}", wanted, budget)
            if not isinstance(page, list) or not all(isinstance(entry, dict) for entry in page):
                raise RunError(f"{self.endpoint} does not list files as the Hub does")
            files += [_read_entry(entry, self.endpoint) for entry in page if entry.get("type") != "directory"]
        return files

    # ---- files

    def download(
        self, repo: Repo, wanted: Mapping[Path, HubFile], ours: Collection[Path] = ()
    ) -> Iterator[Path]:
        """Put `wanted` ({path on disk: HubFile}) in place and yield each path as soon as it is whole and the listed one.

        A file that is there is kept where it is the right one, replaced where an earlier run brought it (`ours`) and it was
        damaged since, and never overwritten otherwise (UserError). Raises RunError for too little disk, or a transfer that
        fails for good; what has arrived stays in .part files and the next run goes on from there.
        """
        missing = self._missing(repo, wanted, ours)
        to_fetch = sum(max(0, file.size - _size(_part(path, file))) for path, file in missing.items())
        total = sum(file.size for file in wanted.values())
        say(
            f"{repo.id} at {repo.commit[:7]} from {self.endpoint}: {len(wanted)} file{'s' * (len(wanted) > 1)}, "
            f"{format_bytes(total)}, {format_bytes(to_fetch)} to fetch",
            flush=True,
        )
        for folder in {path.parent for path in missing}:
            _check_space(folder, to_fetch)
        for path, file in wanted.items():
            if path in missing:
                self._fetch(repo, file, path)
            yield path

    def _missing(self, repo, wanted, ours):
        """The part of `wanted` that is not there, or there but damaged."""
        missing = {}
        for path, file in wanted.items():
            problem = damage(path, file) if path.exists() else ""
            if problem and path not in ours:
                raise UserError(
                    f"{show_path(path)} is there, but is not {file.path} of {repo.id} at {repo.commit[:7]} "
                    f"({problem}); delete it, or choose another folder with --output-dir"
                )
            if problem:
                say(f"{show_path(path)} is damaged ({problem}); fetching it again")
            if problem or not path.exists():
                missing[path] = file
        return missing

    def _fetch(self, repo, file, path):
        """Bring one file to its place, whole and verified; a damaged one is fetched a second time."""
        part = _part(path, file)
        _remove_other_parts(path, part)
        for last in (False, True):
            try:
                self.server.with_retries(lambda: self._transfer(repo, file, part), lambda: _size(part))
                problem = damage(part, file)
                if not problem:
                    os.replace(part, path)
                    return
                part.unlink()
            except FileNotFoundError:  # another run of the same command finished the part that was ours too
                problem = damage(path, file) if path.exists() else "it was deleted underway"
                if not problem:
                    return
            if not last:
                say(f"  {file.path} arrived damaged ({problem}); fetching it once more", flush=True)
        raise RunError(
            f"{file.path} of {repo.id} arrived damaged twice from {self.endpoint} ({problem}); {OTHER_MIRROR}"
        )

    def _transfer(self, repo, file, part):
        """One attempt to bring `part` from the size it has to its full size."""
        part.touch()
        done = _size(part)
        if done >= file.size:
            return
        prefix = "datasets/" if repo.kind == "dataset" else ""
        url = f"{self.endpoint}/{prefix}{repo.id}/resolve/{repo.commit}/{quote(file.path)}"
        wanted = Wanted(repo.kind, repo.id, repo.commit, file.path)
        with self.server.get(url, wanted, {"Range": f"bytes={done}-"} if done else None) as response:
            status, sent_range = response.status_code, response.headers.get("Content-Range", "")
            if status == 416 or status == 206 and not sent_range.startswith(f"bytes {done}-"):
                part.unlink()
                raise TemporaryFailure(
                    f"{response.url.host} cannot resume {file.path} at {done:,}; starting it anew"
                )
            # a server that knows no ranges answers 200 and sends the file from its start
            done = _write_blocks(response.iter_bytes(), part, 0 if status == 200 else done, file)
        if done < file.size:
            raise TemporaryFailure(
                f"{response.url.host} ended {file.path} at {done:,} of {file.size:,} bytes"
            )


def _read_entry(entry, endpoint):
    """The HubFile of one entry of a listing (dict); RunError where a field is not as the Hub has it."""
    path, size, blob, lfs = (entry.get(name) for name in ("path", "size", "oid", "lfs"))
    sha256 = lfs.get("oid") if isinstance(lfs, dict) else ""
    if not (
        entry.get("type") == "file"
        and _is_file_path(path)
        and type(size) is int
        and size >= 0
        and _is_digest(blob, COMMIT)
        and (lfs is None or _is_digest(sha256, SHA256))
    ):
        raise RunError(f"{endpoint} does not list files as the Hub does: {shorten(repr(entry), 200)}")
    return HubFile(path, size, blob, sha256)


def _is_digest(value, pattern):
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _is_file_path(path):
    """Whether `path` can be a file's in a repository: relative, inside it, without control characters or half characters."""
    return is_text(path) and printable(path) == path and not {"", ".", ".."} & set(path.split("/"))


def _check_space(folder, to_fetch):
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < to_fetch + SPARE_BYTES:
        raise RunError(
            f"{format_bytes(to_fetch)} to fetch, but only {format_bytes(free)} free in {show_path(folder)}; "
            "free some space, or choose another disk with --output-dir"
        )


def _write_blocks(blocks, part, done, file):
    """Write `blocks` (bytes) into `part` from position `done` on, and return the position reached."""
    with open(part, "r+b", buffering=0) as out, ByteProgress(file.path, done, file.size) as progress:
        out.seek(done)
        for block in blocks:
            out.write(block)
            done += len(block)
            progress.show(done)
            if done > file.size:
                break  # not our file; the check of the size will say so
        out.truncate()
        os.fsync(out.fileno())
    return done


def damage(path: Path, file: HubFile) -> str:
    """How the file on disk differs from the listed one; "" where it does not. Reads all of it."""
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size:,} bytes, wanted {file.size:,}"
    if file.sha256:
        kind, found = "sha256", sha256_of(path)
    else:
        kind, content = "git blob id", path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "" if found == file.digest else f"{kind} {found[:12]}..., wanted {file.digest[:12]}..."


def read_record(path: Path) -> dict:
    """A source.json as a dict; {} where there is none."""
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
        raise UserError(f"{show_path(path)} is not a record of a download; delete it and run this again")
    return record


def unchanged(path: Path, recorded: dict, record_path: Path) -> bool:
    """Whether a file is still as `recorded` ({"size", "sha256"}) in the record that was written after it.

    Read only where its time is not older than the record's: a folder of gigabytes is recognised at once.
    """
    if not isinstance(recorded, dict) or not path.is_file() or path.stat().st_size != recorded.get("size"):
        return False
    older = path.stat().st_mtime_ns < record_path.stat().st_mtime_ns
    return older or sha256_of(path) == recorded.get("sha256")


def _part(path, file):
    """Where a file grows. Its name holds what it will be, so that the halves of two commits never meet."""
    return path.with_name(f"{path.name}.{file.digest[:12]}.part")


def _remove_other_parts(path, part):
    """Delete what is left of another commit's file of this name."""
    for other in path.parent.glob("*.part"):
        if other != part and re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{12}\.part", other.name):
            other.unlink()


def _size(path):
    return path.stat().st_size if path.exists() else 0
