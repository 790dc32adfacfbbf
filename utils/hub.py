"""The Hugging Face Hub: what a repository holds at one commit, and its files brought to disk whole or not at all.

huggingface_hub's own download functions are not used. They do not compare a file with the sha256 of the listing, begin a file
again after a kill, retry in silence or not at all, and their fast path (Xet) goes around mirrors. Here every file is verified,
goes on where it stopped, and retries are announced. Its session and headers are used (proxies, HF_TOKEN, HF_HUB_OFFLINE);
files come over plain HTTP from HF_ENDPOINT, the Hub or a mirror.
"""

import contextlib
import email.utils
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from utils.errors import RunError, UserError
from utils.files import read_json, sha256_of, show_path
from utils.progress import ByteProgress
from utils.text import format_bytes

HOME = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_WAIT = 600  # seconds; the Hub counts requests in windows of 300 s, a longer wait is left to the user
RETRIES_START_ANEW = 1 << 20  # bytes that arrived since the last failure: retrying gets somewhere
SPARE_BYTES = 64 << 20  # to leave free on the disk
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
OTHER_MIRROR = "try later, or another mirror in HF_ENDPOINT"


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


class Wanted(NamedTuple):
    """What a request is about, for messages: `path` is None where it is a listing."""

    kind: str
    repo_id: str
    revision: str
    path: str | None = None


class TemporaryFailure(Exception):
    """Worth another try. `wait`: seconds that the server asks for, or None; `advice`: what to do when it stays like this."""

    def __init__(self, what: str, advice: str = OTHER_MIRROR, wait: int | None = None):
        super().__init__(what)
        self.advice, self.wait = advice, wait


class Hub:
    """The Hub that HF_ENDPOINT names. `timeout`: seconds without a byte; `retries`: failures in a row that are forgiven."""

    def __init__(self, timeout: float, retries: int):
        # before huggingface_hub is imported: not even versions are told
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self.endpoint = (os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")
        self.timeout, self.retries = timeout, retries
        if timeout <= 0 or retries < 0:
            raise UserError(f"--timeout {timeout:g} --retries {retries}: wanted more than 0, and 0 or more")
        if not _is_address(self.endpoint):
            raise UserError(f"HF_ENDPOINT is {self.endpoint!r}, wanted an address such as {HOME}")

    # ---- what a repository holds

    def look_up(self, kind: str, repo_id: str, revision: str) -> Repo:
        """The Repo that `revision` (commit, branch or tag) means now. UserError where it is not there or not allowed."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
            raise UserError(f"{repo_id!r} is not the name of a {kind} on the Hub, wanted owner/name")
        api, wanted = f"{self.endpoint}/api/{kind}s/{repo_id}", Wanted(kind, repo_id, revision)
        info, _ = self._json(f"{api}/revision/{quote(revision, safe='')}", wanted)
        commit = info.get("sha", "") if isinstance(info, dict) else ""
        if not COMMIT.fullmatch(commit) or COMMIT.fullmatch(revision) and revision != commit:
            raise RunError(
                f"{self.endpoint} gives commit {commit!r} for {repo_id} at {revision}; it is no Hub mirror"
            )
        licence = next((tag[8:] for tag in info.get("tags") or () if tag.startswith("license:")), None)
        files = self._list_files(f"{api}/tree/{commit}?recursive=true", wanted)
        return Repo(kind, repo_id, commit, licence, {file.path: file for file in files})

    def _list_files(self, url, wanted):
        entries = []
        while url:
            page, url = self._json(url, wanted)
            entries += page
        try:
            return [
                HubFile(entry["path"], entry["size"], entry["oid"], (entry.get("lfs") or {}).get("oid", ""))
                for entry in entries
                if entry["type"] == "file"
            ]
        except (KeyError, TypeError):
            raise RunError(f"{self.endpoint} does not list files as the Hub does") from None

    def _json(self, url, wanted):
        """(the JSON at `url`, the address of the next page or None), with retries."""

        def attempt():
            with self._network_errors():
                response = _session().get(url, headers=_headers(), timeout=self.timeout)
            self._check(response, wanted)
            return response

        response = self._with_retries(attempt)
        try:
            return response.json(), response.links.get("next", {}).get("url")
        except ValueError:
            raise RunError(
                f"{response.url} did not answer in JSON; is a login page of this network in the way, "
                f"or is HF_ENDPOINT ({self.endpoint}) no mirror of the Hub?"
            ) from None

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
        print(
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
                print(f"{show_path(path)} is damaged ({problem}); fetching it again")
            if problem or not path.exists():
                missing[path] = file
        return missing

    def _fetch(self, repo, file, path):
        """Bring one file to its place, whole and verified; a damaged one is fetched a second time."""
        part = _part(path, file)
        _remove_other_parts(path, part)
        for last in (False, True):
            try:
                self._with_retries(lambda: self._transfer(repo, file, part), lambda: _size(part))
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
                print(f"  {file.path} arrived damaged ({problem}); fetching it once more", flush=True)
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
        # identity: a compressed answer would have neither the listed size nor ranges of the file itself
        headers = _headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with (
            self._network_errors(),
            _session().stream("GET", url, headers=headers, timeout=self.timeout) as response,
        ):
            status, sent_range = response.status_code, response.headers.get("Content-Range", "")
            if status == 416 or status == 206 and not sent_range.startswith(f"bytes {done}-"):
                part.unlink()
                raise TemporaryFailure(
                    f"{response.url.host} cannot resume {file.path} at {done:,}; starting it anew"
                )
            self._check(response, Wanted(repo.kind, repo.id, repo.commit, file.path))
            # a server that knows no ranges answers 200 and sends the file from its start
            done = _write_blocks(response.iter_bytes(), part, 0 if status == 200 else done, file)
        if done < file.size:
            raise TemporaryFailure(
                f"{response.url.host} ended {file.path} at {done:,} of {file.size:,} bytes"
            )

    # ---- when it does not work

    def _with_retries(self, attempt: Callable, arrived: Callable[[], int] = lambda: 0):
        """`attempt()`, again after each TemporaryFailure, announced. Failures count anew where `arrived()` (bytes) grew."""
        failures, reached = 0, arrived()
        while True:
            try:
                return attempt()
            except TemporaryFailure as failure:
                if arrived() - reached >= RETRIES_START_ANEW:
                    failures, reached = 0, arrived()
                failures += 1
                if failures > self.retries:
                    times = f"{failures} failure{'s' * (failures > 1)}"
                    raise RunError(
                        f"{failure}; gave up after {times}: {failure.advice}; the same command goes on from here"
                    ) from None
                wait = min(2 ** (failures - 1), 30) if failure.wait is None else failure.wait
                if wait > LONGEST_WAIT:
                    raise RunError(
                        f"{failure} and asks to wait {wait} s; run this again after that"
                    ) from None
                print(f"  {failure}; retry {failures} of {self.retries} in {wait} s", flush=True)
                time.sleep(wait)

    @contextlib.contextmanager
    def _network_errors(self):
        """Turn what the HTTP client raises into a TemporaryFailure, or into the error that ends the script."""
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled

        proxies = [name for name in os.environ if name.upper() in PROXIES and os.environ[name]]
        advice = f"check the network and {', '.join([f'HF_ENDPOINT ({self.endpoint})', *proxies])}"
        try:
            yield
        except OfflineModeIsEnabled:
            raise UserError("HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise UserError(
                f"no request to {self.endpoint} can be made ({error}); check HF_ENDPOINT and HF_TOKEN"
            ) from None
        except httpx2.TimeoutException as error:
            raise TemporaryFailure(
                f"no byte from {error.request.url.host} for {self.timeout:g} s",
                f"{advice}, or allow more with --timeout",
            ) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            host = error.request.url.host
            if "CERTIFICATE" in str(error):
                raise RunError(
                    f"the certificate of {host} is not trusted ({error}); name a company proxy's in SSL_CERT_FILE"
                ) from None
            raise TemporaryFailure(f"cannot connect to {host} ({error})", advice) from None
        except httpx2.HTTPError as error:
            reason = error or type(error).__name__
            raise TemporaryFailure(
                f"the connection to {error.request.url.host} broke ({reason})", advice
            ) from None

    def _check(self, response, wanted: Wanted) -> None:
        """Raise what an answer with an error status means: TemporaryFailure, or UserError with what to do."""
        status, headers = response.status_code, response.headers
        if status in (200, 206):
            return
        if status == 429:
            raise TemporaryFailure(
                f"{response.url.host} answered 429 (too many requests)",
                "wait some minutes, or set HF_TOKEN: a user may ask more often than a guest",
                server_wait(headers),
            )
        reason = headers.get("X-Error-Message") or response.reason_phrase
        # links to the storage are good for a while only
        expired = status == 403 and response.history and "X-Error-Code" not in headers
        if status >= 500 or status == 408 or expired:
            raise TemporaryFailure(
                f"{response.url.host} answered {status} ({reason})",
                f"the trouble is the server's, {OTHER_MIRROR}",
                server_wait(headers),
            )
        refusal = self._refusal(response, reason, wanted)
        if refusal:
            raise UserError(refusal)
        raise RunError(f"{response.url} answered {status} ({reason})")

    def _refusal(self, response, reason, wanted):
        """What the Hub refuses and what to do about it, in one line; None where it is not the user's doing."""
        kind, repo_id, revision, path = wanted
        status, host, page = response.status_code, response.url.host, web_page(kind, repo_id)
        code = response.headers.get("X-Error-Code", "")
        if code == "GatedRepo":
            return f"{repo_id} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account"
        if status == 401 and "authorization" in response.request.headers:
            return f"{host} refused the token in HF_TOKEN (401, {reason}); make a new one at {HOME}/settings/tokens"
        if status == 403:
            return f"{host} does not allow reading {repo_id} (403, {reason}); ask for access at {page}"
        if code == "RevisionNotFound":
            return f"{repo_id} has no revision {revision!r}; see {page}/commits/main"
        if code == "EntryNotFound" and path:
            return f"{repo_id} has no file {path} at {revision[:7]} on {host}; see {page}/tree/main"
        if status in (401, 404):
            where = f"on {self.endpoint} ({status}, {reason})"
            return f"no {kind} {repo_id} {where}; check the name, or set HF_TOKEN where it is private"
        return None


def _is_address(endpoint):
    try:
        address = urlsplit(endpoint)
        return address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number, brackets without an end
        return False


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


def web_page(kind: str, repo_id: str) -> str:
    """The address of a repository for people: always the Hub's own, where terms are accepted and commits listed."""
    return f"{HOME}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


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
    return path.stat().st_mtime_ns < record_path.stat().st_mtime_ns or sha256_of(path) == recorded.get(
        "sha256"
    )


def server_wait(headers: Mapping) -> int | None:
    """The seconds that a server asks to wait (Retry-After as a number or a date, the Hub's RateLimit), or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return int(asked)
    date = email.utils.parsedate_tz(asked)
    if date:
        return max(0, round(email.utils.mktime_tz(date) - time.time()))
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds if limit and limit.remaining == 0 else None


def _session():
    from huggingface_hub import get_session

    try:
        return get_session()
    except ImportError:  # it is made with the proxies of the environment
        raise UserError(
            "a SOCKS proxy is set (ALL_PROXY, HTTPS_PROXY); it needs: pip install socksio"
        ) from None
    except ValueError as error:
        raise UserError(f"the proxy that is set ({', '.join(PROXIES)}) cannot be used: {error}") from None


def _headers():
    from huggingface_hub.utils import build_hf_headers

    try:
        headers = build_hf_headers()
    except OSError:  # a home folder that cannot be read holds no token
        headers = build_hf_headers(token=False)
    if not headers.get("authorization", "").isascii():
        raise UserError("HF_TOKEN is not a token: it holds characters that no token has")
    return headers


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
