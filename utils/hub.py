"""The Hugging Face Hub: what a repository holds at one commit, and its files brought to disk whole or not at all.

Built on `repo_info` and `http_get` of huggingface_hub 2.4.0, which sends no token after a redirect to another host. Its
`hf_hub_download` begins a file again after a kill, compares no sha256, and takes large files from Xet, not from a mirror.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import RunError, UserError
from utils.files import read_json, sha256_of, show_path
from utils.text import bar, format_bytes, say

HOME = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
SPARE_BYTES = 64 << 20  # to leave free on the disk


class HubFile(NamedTuple):
    """A file as the Hub lists it. `digest`: the sha256 (64 digits) of a large file (LFS), the git blob id (40) of a small one."""

    path: str
    size: int
    digest: str


class Repo(NamedTuple):
    """A repository at one commit. `kind` is model or dataset, `licence` the Hub's short name for it or None."""

    kind: str
    id: str
    commit: str
    licence: str | None
    files: dict[str, HubFile]

    @property
    def page(self) -> str:
        """Its address for people, on the Hub itself, where terms are accepted."""
        return f"{HOME}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


# ---- What a repository holds


def look_up(kind: str, repo_id: str, revision: str) -> Repo:
    """The Repo that `revision` (commit, branch or tag) means now. UserError if it is not there or not allowed."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise UserError(f"{repo_id!r} is not the name of a {kind} on the Hub, wanted owner/name")
    with _errors_told(Repo(kind, repo_id, revision, None, {})):
        from huggingface_hub import HfApi, constants

        wanted = {"repo_type": kind, "revision": revision, "files_metadata": True}
        info = HfApi(_endpoint()).repo_info(repo_id, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, **wanted)
        if not COMMIT.fullmatch(info.sha) or COMMIT.fullmatch(revision) and revision != info.sha:
            raise ValueError(info.sha)
        licence = next((tag[8:] for tag in info.tags or [] if tag.startswith("license:")), None)
        files = {}
        for entry in info.siblings:
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            files[entry.rfilename] = HubFile(entry.rfilename, int(entry.size), digest.lower())
    return Repo(kind, repo_id, info.sha, licence, files)


# ---- Files


def download(repo: Repo, wanted: Mapping[Path, HubFile], ours: Collection[Path]) -> Iterator[Path]:
    """Put `wanted` ({path in one folder: HubFile}) in place and yield each path as soon as it is whole and the listed one.

    A file that is there is kept if it is the right one, replaced if an earlier run brought it (`ours`) and it was damaged
    since, and never overwritten otherwise (UserError). RunError for too little disk, or a transfer that fails for good; what
    has arrived stays in .part files, and the next run goes on from there.
    """
    missing = {}
    for path, file in wanted.items():
        problem = damage(path, file) if path.exists() else ""
        if problem and path not in ours:
            what = f"{show_path(path)} is there, but is not {file.path} of {repo.id} at {repo.commit[:7]} ({problem})"
            raise UserError(f"{what}; delete it, or choose another folder with --output-dir")
        if problem or not path.exists():
            missing[path] = max(0, file.size - _size(_part(path, file)))
    needed, total = sum(missing.values()), sum(file.size for file in wanted.values())
    fetch = f"{len(wanted)} files, {format_bytes(total)}, {format_bytes(needed)} to fetch"
    say(f"{repo.id} at {repo.commit[:7]} from {_endpoint()}: {fetch}", flush=True)
    folder = next(iter(wanted)).parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing and free < needed + SPARE_BYTES:
        short = f"{format_bytes(needed)} to fetch, but only {format_bytes(free)} free in {show_path(folder)}"
        raise RunError(f"{short}; free some space, or choose another disk with --output-dir")
    for path, file in wanted.items():
        if path in missing:
            _fetch(repo, file, path)
        yield path


def _fetch(repo, file, path):
    """Bring one file to its place, whole and verified."""
    part = _part(path, file)
    with _errors_told(repo):
        import httpx2
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(repo.id, file.path, repo_type=repo.kind, revision=repo.commit, endpoint=_endpoint())
        # identity: a compressed answer would have neither the listed size nor ranges of the file itself
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        # 10 MiB, on a slow line, are minutes without a sign, and lost by a kill.
        constants.DOWNLOAD_CHUNK_SIZE = 64 << 10
        while not part.exists() or _size(part) < file.size:
            if done := _size(part):
                arrived = f"{format_bytes(done)} of {format_bytes(file.size)}"
                say(f"  {file.path}: going on at {arrived}", flush=True)
            try:
                part.touch()
                with open(part, "r+b") as out:  # two runs at once write the same bytes to the same places
                    out.seek(done)
                    shown = {"displayed_filename": file.path, "tqdm_class": bar}
                    http_get(url, out, resume_size=done, headers=headers, **shown)
                    out.flush()
                    os.fsync(out.fileno())
                break
            except httpx2.ReadError:  # a connection that was reset, which http_get does not repeat
                if _size(part) == done:
                    raise
    arrived = part if part.exists() else path  # another run may have moved the part into place
    if problem := damage(arrived, file):
        arrived.unlink()
        what = f"{file.path} of {repo.id} arrived damaged from {_endpoint()} ({problem})"
        raise RunError(f"{what}; run this again, or choose another mirror in HF_ENDPOINT")
    os.replace(arrived, path)


def damage(path: Path, file: HubFile) -> str:
    """Say how the file on disk differs from the listed one; "" if it does not. Reads all of it."""
    if _size(path) != file.size:
        return f"{_size(path):,} bytes, wanted {file.size:,}"
    found = sha256_of(path)
    if COMMIT.fullmatch(file.digest):
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "" if found == file.digest else f"digest {found[:12]}..., wanted {file.digest[:12]}..."


def _part(path, file):
    """The place where a file grows. Its name holds what it will be, so that the halves of two commits never meet."""
    return path.with_name(f"{path.name}.{file.digest[:12]}.part")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def read_record(path: Path, **origin: str) -> dict[str, Any]:
    """A source.json as a dict; {} if there is none. UserError if it is of another `origin` (repo, revision, file)."""
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
        raise UserError(f"{show_path(path)} is not a record of a download; delete it and run this again")
    there = {name: str(record.get(name)) for name in origin}
    if record and there != origin:
        holds = f"{show_path(path)} is of {' '.join(there.values())}, not {' '.join(origin.values())}"
        raise UserError(f"{holds}; delete that download, or choose another folder with --output-dir")
    return record


# ---- What a failure means, in one line


def _endpoint():
    return (os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")


@contextlib.contextmanager
def _errors_told(repo):
    """Turn what the Hub client raises into a UserError or a RunError."""
    # Before huggingface_hub is imported: not even versions are told.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")  # seconds without a byte
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # its words for a repeated request hold long addresses
    endpoint, again = _endpoint(), "the same command goes on from here"
    try:
        yield
    except HfHubHTTPError as error:
        response, status = error.response, error.response.status_code
        reason = response.headers.get("X-Error-Message") or response.reason_phrase
        cause = f"{response.url.host} answered {status} ({reason})"
        if isinstance(error, GatedRepoError):
            terms = f"accept its terms at {repo.page}, then set HF_TOKEN to a token of that account"
            raise UserError(f"{repo.id} is gated: {terms}") from None
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            missing = f"no {repo.kind} {repo.id} at {repo.commit} on {endpoint}: {cause}"
            raise UserError(f"{missing}; check the names, or set HF_TOKEN if it is private") from None
        if status in (401, 403):
            raise UserError(f"{cause}; check the token in HF_TOKEN, see {HOME}/settings/tokens") from None
        raise RunError(f"{cause}; try later, or another mirror in HF_ENDPOINT; {again}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ImportError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        check = "check the network, HF_ENDPOINT, HF_TOKEN and the proxy"
        raise RunError(f"no connection to {endpoint} ({cause}); {check}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        check = "check HF_ENDPOINT and the network's login page"
        raise RunError(f"{endpoint} does not answer as the Hub does; {check}") from None
