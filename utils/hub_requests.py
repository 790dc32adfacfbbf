"""Requests to the Hugging Face Hub or a mirror: retries, redirects, limits, and what a failure means in one line.

huggingface_hub's session and headers are used (proxies, HF_TOKEN, HF_HUB_OFFLINE). A server is not trusted: the token goes to
the endpoint alone, a listing comes from nobody else and has an end, no redirect leads into a private network.
"""

import contextlib
import email.utils
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from utils.errors import RunError, UserError
from utils.text import duration, format_bytes, say

HOME = "https://huggingface.co"
LONGEST_WAIT = 600  # seconds; the Hub counts requests in windows of 300 s, a longer wait is left to the user
RETRIES_START_ANEW = 1 << 20  # bytes that arrived since the last failure: retrying gets somewhere
LISTING_BYTES, LISTING_SECONDS = 64 << 20, 600  # about 200 bytes a file
REDIRECTS = 5  # the Hub needs two: to the cache of small files, to the storage of large ones
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
OTHER_MIRROR = "try later, or another mirror in HF_ENDPOINT"


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


class ListingBudget:
    """How much and how long a server may list, all pages together."""

    def __init__(self, endpoint: str):
        self.endpoint, self.bytes_left, self.seconds_left = endpoint, LISTING_BYTES, LISTING_SECONDS

    def read(self, response) -> bytes:
        """The body of `response`; RunError beyond the budget."""
        blocks, began = [], time.monotonic()
        for block in response.iter_raw():
            blocks.append(block)
            self.bytes_left -= len(block)
            if self.bytes_left < 0:
                raise RunError(f"the listing of {self.endpoint} has more than {format_bytes(LISTING_BYTES)}")
            if time.monotonic() - began > self.seconds_left:
                raise RunError(
                    f"the listing of {self.endpoint} takes longer than {duration(LISTING_SECONDS)}"
                )
        self.seconds_left -= time.monotonic() - began
        return b"".join(blocks)


class Endpoint:
    """The server that HF_ENDPOINT names. `timeout`: seconds without a byte; `retries`: failures in a row that are forgiven."""

    def __init__(self, timeout: float, retries: int):
        # before huggingface_hub is imported: not even versions are told
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self.address = (os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")
        self.timeout, self.retries = timeout, retries
        if timeout <= 0 or retries < 0:
            raise UserError(f"--timeout {timeout:g} --retries {retries}: wanted more than 0, and 0 or more")
        if not _is_address(self.address):
            raise UserError(f"HF_ENDPOINT is {self.address!r}, wanted an address such as {HOME}")

    @contextlib.contextmanager
    def get(self, url: str, wanted: Wanted, headers: Mapping[str, str] | None = None) -> Iterator:
        """The answer to a GET of `url`, its body still to be read.

        Redirects are followed here, and only where they may lead: a listing stays with the endpoint, the token goes to nobody
        else, and no public server sends us into this network.
        """
        # identity: a compressed answer would have neither the listed size nor ranges of the file itself
        headers = _headers() | {"Accept-Encoding": "identity", **(headers or {})}
        for _ in range(REDIRECTS + 1):
            own = _origin(url) == _origin(self.address)
            sent = headers if own else {k: v for k, v in headers.items() if k.lower() != "authorization"}
            with (
                self._network_errors(),
                _session().stream(
                    "GET", url, headers=sent, timeout=self.timeout, follow_redirects=False
                ) as response,
            ):
                if not response.has_redirect_location:
                    self._check(response, wanted, own)
                    yield response
                    return
                target = response.headers["Location"]
            url = self._check_redirect(url, target, wanted)
        raise RunError(f"{self.address} redirects without end at {wanted.path or wanted.repo_id}")

    def _check_redirect(self, url, target, wanted):
        """The whole address of `target`, where it may be followed."""
        what, host = wanted.path or f"the listing of {wanted.repo_id}", urlsplit(url).hostname
        target = _join(url, target)
        if target is None:
            raise RunError(f"{host} redirects to no address for {what}; {OTHER_MIRROR}")
        if wanted.path is None and _origin(target) != _origin(self.address):
            raise RunError(f"{host} redirects to {target} for {what}, which has to come from {self.address}")
        if is_internal(target) and not is_internal(self.address):
            raise RunError(f"{host} redirects to {target} for {what}, which is inside this network")
        return target

    def get_json(self, url: str, wanted: Wanted, budget: ListingBudget) -> tuple[Any, str | None]:
        """(the JSON at `url`, the query of the next page or None), with retries."""

        def attempt():
            with self.get(url, wanted) as response:
                return response, budget.read(response)

        response, content = self.with_retries(attempt)
        try:
            link = response.links.get("next", {}).get("url")
            return json.loads(content), urlsplit(link).query if link else None
        except (ValueError, RecursionError):
            raise RunError(
                f"{response.url} did not answer in JSON; is a login page of this network in the way, "
                f"or is HF_ENDPOINT ({self.address}) no mirror of the Hub?"
            ) from None

    def with_retries(self, attempt: Callable, arrived: Callable[[], int] = lambda: 0):
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
                say(f"  {failure}; retry {failures} of {self.retries} in {wait} s", flush=True)
                time.sleep(wait)

    @contextlib.contextmanager
    def _network_errors(self):
        """Turn what the HTTP client raises into a TemporaryFailure, or into the error that ends the script."""
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled

        proxies = [name for name in os.environ if name.upper() in PROXIES and os.environ[name]]
        advice = f"check the network and {', '.join([f'HF_ENDPOINT ({self.address})', *proxies])}"
        try:
            yield
        except OfflineModeIsEnabled:
            raise UserError("HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise UserError(
                f"no request to {self.address} can be made ({error}); check HF_ENDPOINT and HF_TOKEN"
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

    def _check(self, response, wanted: Wanted, own: bool) -> None:
        """Raise what an answer with an error status means: TemporaryFailure, or UserError with what to do.

        416 is left to the transfer, which begins anew. `own`: the answer is the endpoint's, not that of a storage.
        """
        status, headers = response.status_code, response.headers
        if status in (200, 206) or status == 416 and wanted.path:
            return
        if status == 429:
            raise TemporaryFailure(
                f"{response.url.host} answered 429 (too many requests)",
                "wait some minutes, or set HF_TOKEN: a user may ask more often than a guest",
                server_wait(headers),
            )
        reason = headers.get("X-Error-Message") or response.reason_phrase
        # links to the storage are good for a while only
        expired = status == 403 and not own and "X-Error-Code" not in headers
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
            mend = f"make a new one at {HOME}/settings/tokens, or unset it: public files need none"
            return f"{host} refused the token in HF_TOKEN (401, {reason}); {mend}"
        if status == 403:
            return f"{host} does not allow reading {repo_id} (403, {reason}); ask for access at {page}"
        if code == "RevisionNotFound":
            return f"{repo_id} has no revision {revision!r}; see {page}/commits/main"
        if code == "EntryNotFound" and path:
            return f"{repo_id} has no file {path} at {revision[:7]} on {host}; see {page}/tree/main"
        if status in (401, 404):
            where = f"on {self.address} ({status}, {reason})"
            return f"no {kind} {repo_id} {where}; check the name, or set HF_TOKEN where it is private"
        return None


def _origin(url):
    """(scheme, host, port) of an address."""
    address = urlsplit(url)
    return address.scheme, address.hostname, address.port or {"http": 80, "https": 443}.get(address.scheme)


def is_internal(url: str) -> bool:
    """Whether the host of `url` is this machine or in a private network; False where its name is not known."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(urlsplit(url).hostname, None)}
    except (OSError, ValueError):  # the request will say so
        return False
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
    return any(not (getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def _is_address(url):
    try:
        address = urlsplit(url)
        return address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number, brackets without an end
        return False


def _join(url, target):
    """The address that `target`, whole or relative, means at `url`; None where it is none."""
    try:
        joined = urljoin(url, target)
    except ValueError:
        return None
    return joined if _is_address(joined) else None


def web_page(kind: str, repo_id: str) -> str:
    """The address of a repository for people: always the Hub's own, where terms are accepted and commits listed."""
    return f"{HOME}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def server_wait(headers: Mapping) -> int | None:
    """The seconds that a server asks to wait (Retry-After as a number or a date, the Hub's RateLimit), or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = headers.get("Retry-After", "").strip()
    try:
        if asked.isdecimal():
            return int(asked)
        date = email.utils.parsedate_tz(asked)
        if date:
            return max(0, round(email.utils.mktime_tz(date) - time.time()))
    except (ValueError, OverflowError):  # a date or a number that no clock has
        return None
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
