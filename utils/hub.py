"""The Hugging Face Hub: what a repository holds at one commit, and its files brought to disk whole or not at all.

Not done with huggingface_hub's own download functions: they do not compare what arrived with the sha256 of the listing,
start a file again after a kill, retry in silence or not at all, and their fast path (Xet) goes around mirrors. Its session
and headers are used (proxies, HF_TOKEN, HF_HUB_OFFLINE); files come over plain HTTP from HF_ENDPOINT, the Hub or a mirror.
"""

import contextlib
import email.utils
import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from utils.errors import RunError, UserError
from utils.files import read_json, sha256_of, show_path
from utils.progress import Meter
from utils.text import format_bytes

HOME = "https://huggingface.co"


COMMIT = re.compile(r"[0-9a-f]{40}")


LONGEST_WAIT = 600  # seconds; the Hub counts requests in windows of 300 s, a longer wait is left to the user


PROGRESS = 1 << 20  # bytes between two failures that show that retrying gets somewhere


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


ROOM = 64 << 20  # bytes to leave free on the disk


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it: `sha256` for the large ones (LFS), else "" and only `blob`, the git blob id, counts."""

    path: str
    size: int
    blob: str
    sha256: str

    @property
    def digest(self):
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repo:
    """A repository at one commit. `kind` is model or dataset, `licence` the Hub's short name for it or None."""

    kind: str
    id: str
    commit: str
    licence: str | None
    files: dict

    @property
    def page(self):
        return web_page(self.kind, self.id)


class TemporaryFailure(Exception):
    """Worth another try. `wait`: seconds that the server asks for, or None; `advice`: what to do when it stays like this."""

    def __init__(self, what, advice, wait=None):
        super().__init__(what)
        self.advice, self.wait = advice, wait


class Hub:
    """The Hub that HF_ENDPOINT names. `timeout`: seconds without a byte; `retries`: failures in a row that are forgiven."""

    def __init__(self, timeout, retries):
        os.environ.setdefault(
            "HF_HUB_DISABLE_TELEMETRY", "1"
        )  # before huggingface_hub is imported: not even versions are told
        self.endpoint = (os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")
        self.timeout, self.retries = timeout, retries
        if timeout <= 0 or retries < 0:
            raise UserError(
                f"--timeout {timeout:g} --retries {retries}: wanted more than 0 seconds and at least 0 retries"
            )
        try:
            address = urlsplit(self.endpoint)
            right = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # a port that is no number, brackets without an end
            right = False
        if not right:
            raise UserError(f"HF_ENDPOINT is {self.endpoint!r}, wanted an address such as {HOME}")

    # ---- what a repository holds

    def look_up(self, kind, repo_id, revision):
        """The Repo that `revision` (commit, branch or tag) means now. UserError where it is not there or not allowed."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
            raise UserError(
                f"{repo_id!r} is not the name of a {kind} on the Hub, wanted owner/name as in its address"
            )
        api = f"{self.endpoint}/api/{kind}s/{repo_id}"
        about = (kind, repo_id, revision, None)
        info, _ = self._json(f"{api}/revision/{quote(revision, safe='')}", about)
        commit = info.get("sha", "") if isinstance(info, dict) else ""
        if not COMMIT.fullmatch(commit) or COMMIT.fullmatch(revision) and revision != commit:
            raise RunError(
                f"{self.endpoint} gives commit {commit!r} for {repo_id} at {revision}; it is no Hub mirror"
            )
        licence = next((tag[8:] for tag in info.get("tags") or () if tag.startswith("license:")), None)
        entries, url = [], f"{api}/tree/{commit}?recursive=true"
        while url:
            page, url = self._json(url, about)
            entries += page
        try:
            files = [
                HubFile(entry["path"], entry["size"], entry["oid"], (entry.get("lfs") or {}).get("oid", ""))
                for entry in entries
                if entry["type"] == "file"
            ]
        except (KeyError, TypeError):
            raise RunError(
                f"{self.endpoint} does not list files as the Hub does; it is no mirror of it"
            ) from None
        return Repo(kind, repo_id, commit, licence, {file.path: file for file in files})

    def _json(self, url, about):
        """(the JSON at `url`, the address of the next page or None), with retries."""

        def attempt():
            with self._failures_told():
                response = _session().get(url, headers=_headers(), timeout=self.timeout)
            self._check(response, *about)
            return response

        response = self._patiently(attempt)
        try:
            return response.json(), response.links.get("next", {}).get("url")
        except ValueError:
            raise RunError(
                f"{response.url} did not answer in JSON; is a login page of this network in the way, "
                f"or is HF_ENDPOINT ({self.endpoint}) no mirror of the Hub?"
            ) from None

    # ---- files

    def bring(self, repo, wanted, ours=()):
        """Put `wanted` ({path on disk: HubFile}) in place and yield each path as soon as it is whole and the listed one.

        A file that is there is kept where it is the right one, replaced where an earlier run brought it (`ours`) and it was
        damaged since, and never overwritten otherwise (UserError). Raises RunError for too little disk, or a transfer that
        fails for good; what has arrived stays in .part files and the next run goes on from there.
        """
        missing = {path: file for path, file in wanted.items() if not path.exists()}
        for path in wanted.keys() - missing.keys():
            problem = damage(path, wanted[path])
            if problem and path not in ours:
                raise UserError(
                    f"{show_path(path)} is there, but is not {wanted[path].path} of {repo.id} at "
                    f"{repo.commit[:7]} ({problem}); delete it, or choose another folder with --output-dir"
                )
            if problem:
                print(f"{show_path(path)} is damaged ({problem}); fetching it again")
                missing[path] = wanted[path]
        to_fetch = sum(max(0, file.size - _size(_part(path, file))) for path, file in missing.items())
        print(
            f"{repo.id} at {repo.commit[:7]} from {self.endpoint}: {len(wanted)} file{'s' * (len(wanted) > 1)}, "
            f"{format_bytes(sum(file.size for file in wanted.values()))}, {format_bytes(to_fetch)} to fetch",
            flush=True,
        )
        for folder in {path.parent for path in missing}:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < to_fetch + ROOM:
                raise RunError(
                    f"{format_bytes(to_fetch)} to fetch, but only {format_bytes(free)} free in "
                    f"{show_path(folder)}; free some space, or choose another disk with --output-dir"
                )
        for path, file in wanted.items():
            if path in missing:
                self._fetch(repo, file, path)
            yield path

    def _fetch(self, repo, file, path):
        part = _part(path, file)
        for other in path.parent.glob("*.part"):  # what is left of another commit's file of this name
            if other != part and re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{12}\.part", other.name):
                other.unlink()
        for last in (False, True):
            try:
                self._patiently(lambda: self._transfer(repo, file, part), lambda: _size(part))
                problem = damage(part, file)
                if not problem:
                    os.replace(part, path)
                    return
                part.unlink()
            except (
                FileNotFoundError
            ):  # another run of the same command has finished the part that was ours too
                problem = damage(path, file) if path.exists() else "it was deleted underway"
                if not problem:
                    return
            if not last:
                print(f"  {file.path} arrived damaged ({problem}); fetching it once more", flush=True)
        raise RunError(
            f"{file.path} of {repo.id} arrived damaged twice from {self.endpoint} ({problem}); nothing of it was "
            "kept. Try again later, or another mirror in HF_ENDPOINT"
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
            self._failures_told(),
            _session().stream("GET", url, headers=headers, timeout=self.timeout) as response,
        ):
            status, given = response.status_code, response.headers.get("Content-Range", "")
            if status == 416 or status == 206 and not given.startswith(f"bytes {done}-"):
                part.unlink()
                raise TemporaryFailure(
                    f"{response.url.host} cannot resume {file.path} at {done:,}; starting it anew",
                    "try another mirror in HF_ENDPOINT",
                )
            self._check(response, repo.kind, repo.id, repo.commit, file.path)
            if status == 200:
                done = 0  # a server that knows no ranges sends the file from its start
            with open(part, "r+b", buffering=0) as out, Meter(file.path, done, file.size) as meter:
                out.seek(done)
                for block in response.iter_bytes():
                    out.write(block)
                    done += len(block)
                    meter.show(done)
                    if done > file.size:
                        break  # not our file; the check of the size will say so
                out.truncate()
                os.fsync(out.fileno())
        if done < file.size:
            raise TemporaryFailure(
                f"{response.url.host} ended {file.path} at {done:,} of {file.size:,} bytes",
                "try later, or another mirror in HF_ENDPOINT",
            )

    # ---- when it does not work

    def _patiently(self, attempt, progress=lambda: 0):
        """`attempt()`, again after each TemporaryFailure, announced. Failures count anew where `progress()` (bytes) grew."""
        failures, reached = 0, progress()
        while True:
            try:
                return attempt()
            except TemporaryFailure as failure:
                if progress() - reached >= PROGRESS:
                    failures, reached = 0, progress()
                failures += 1
                if failures > self.retries:
                    raise RunError(
                        f"{failure}; gave up after {failures} failure{'s' * (failures > 1)}: {failure.advice}; "
                        "the same command goes on from here"
                    ) from None
                wait = min(2 ** (failures - 1), 30) if failure.wait is None else failure.wait
                if wait > LONGEST_WAIT:
                    raise RunError(
                        f"{failure} and asks to wait {wait} s; run the same command again after that"
                    ) from None
                print(f"  {failure}; retry {failures} of {self.retries} in {wait} s", flush=True)
                time.sleep(wait)

    @contextlib.contextmanager
    def _failures_told(self):
        """Turn what the HTTP client raises into a TemporaryFailure, or into the error that ends the script."""
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled

        reach = f"check the network and HF_ENDPOINT ({self.endpoint})"
        if proxies := [name for name in os.environ if name.upper() in PROXIES and os.environ[name]]:
            reach += f" and the proxy in {', '.join(proxies)}"
        try:
            yield
        except OfflineModeIsEnabled:
            raise UserError(
                "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it and run this again"
            ) from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise UserError(
                f"no request to {self.endpoint} can be made ({error}); check HF_ENDPOINT and HF_TOKEN"
            ) from None
        except httpx2.TimeoutException as error:
            raise TemporaryFailure(
                f"no byte from {error.request.url.host} for {self.timeout:g} s",
                f"{reach}, or allow more with --timeout",
            ) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            if "CERTIFICATE" in str(error):
                raise RunError(
                    f"the certificate of {error.request.url.host} is not trusted ({error}); behind a company "
                    "proxy, name its certificate file in SSL_CERT_FILE"
                ) from None
            raise TemporaryFailure(f"cannot connect to {error.request.url.host} ({error})", reach) from None
        except httpx2.HTTPError as error:
            raise TemporaryFailure(
                f"the connection to {error.request.url.host} broke ({error or type(error).__name__})", reach
            ) from None

    def _check(self, response, kind, repo_id, revision, path):
        """Raise what an answer with an error status means: TemporaryFailure, or UserError with what to do."""
        status, host = response.status_code, response.url.host
        if status in (200, 206):
            return
        code = response.headers.get("X-Error-Code", "")
        said = response.headers.get("X-Error-Message") or response.reason_phrase
        if status == 429:
            raise TemporaryFailure(
                f"{host} answered 429 (too many requests)",
                "wait some minutes, or set HF_TOKEN: a user may ask more often than a guest",
                server_wait(response.headers),
            )
        expired = (
            status == 403 and response.history and not code
        )  # links to the storage are good for a while only
        if status >= 500 or status == 408 or expired:
            raise TemporaryFailure(
                f"{host} answered {status} ({said})",
                "the trouble is the server's, try later, or another mirror in HF_ENDPOINT",
                server_wait(response.headers),
            )
        page, token = web_page(kind, repo_id), "authorization" in response.request.headers
        if code == "GatedRepo":
            then = (
                "with the account that HF_TOKEN belongs to"
                if token
                else "then set HF_TOKEN to a token of your account"
            )
            raise UserError(
                f"{repo_id} is gated: accept its terms at {page}, {then} (made at {HOME}/settings/tokens)"
            )
        if status == 401 and token:
            raise UserError(
                f"{host} refused the token in HF_TOKEN (401, {said}); make a new one at {HOME}/settings/tokens, "
                "or unset HF_TOKEN: public files need none"
            )
        if status == 403:
            raise UserError(
                f"{host} does not allow reading {repo_id} (403, {said}); ask for access at {page}, "
                "and give the token in HF_TOKEN the right to read it"
            )
        if code == "RevisionNotFound":
            raise UserError(
                f"{repo_id} has no revision {revision!r}; see {page}/commits/main, and choose with --revision"
            )
        if code == "EntryNotFound" and path:
            raise UserError(
                f"{repo_id} has no file {path} at {revision[:7]} on {host}; choose from {page}/tree/main"
            )
        if status in (401, 404):
            raise UserError(
                f"no {kind} {repo_id} on {self.endpoint} ({status}, {said}); check the name in --{kind}, or, "
                "where it is private, set HF_TOKEN"
            )
        raise RunError(f"{response.url} answered {status} ({said})")


def web_page(kind, repo_id):
    """The address of a repository for people: always the Hub's own, where terms are accepted and commits listed."""
    return f"{HOME}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def damage(path, file):
    """ "" where the file on disk is the listed HubFile, else how it differs. Reads all of it."""
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size:,} bytes, wanted {file.size:,}"
    if file.sha256:
        kind, found = "sha256", sha256_of(path)
    else:
        kind, content = "git blob id", path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "" if found == file.digest else f"{kind} {found[:12]}..., wanted {file.digest[:12]}..."


def read_record(path):
    """A source.json as a dict; {} where there is none."""
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
        raise UserError(f"{show_path(path)} is not a record of a download; delete it and run this again")
    return record


def unchanged(path, recorded, record_path):
    """Whether a file is still as `recorded` ({"size", "sha256"}) in the record that was written after it.

    Read only where its time is not older than the record's: a folder of gigabytes is recognised at once.
    """
    if not isinstance(recorded, dict) or not path.is_file() or path.stat().st_size != recorded.get("size"):
        return False
    return path.stat().st_mtime_ns < record_path.stat().st_mtime_ns or sha256_of(path) == recorded.get(
        "sha256"
    )


def server_wait(headers):
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
            "a SOCKS proxy is set (ALL_PROXY, HTTPS_PROXY), which needs one more package: pip install socksio; "
            "or unset it"
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


def _size(path):
    return path.stat().st_size if path.exists() else 0
