"""The chat as a server: a page to talk to the model, and OpenAI's chat completions, for this machine.

    GET  /                          the page (page.html)
    GET  /v1/models                 the models that answer: one, or two side by side
    POST /v1/chat/completions       {"messages": [...]}, as a whole or, with "stream": true, piece by piece as server-sent events

One answer at a time: a model on a small machine is no faster with two. Python's own http.server reads the requests.
"""

import base64
import hashlib
import hmac
import json
import re
import select
import socket
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.chat.completions import Answer, Request, describe_model, finish_reason, read_request
from utils.chat.model import ChatModel, Options
from utils.chat.terminal import note
from utils.errors import RunError, UserError, explain, explain_os_error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 8 << 20  # bytes of a request
LONGEST_LINE = 1000  # bytes, between the chunks of a body
SILENCE = 60  # seconds that a client may take between two bytes
PAGE = Path(__file__).with_name("page.html")


@dataclass
class Serving:
    """What answers, and whom. `systems`: the system text of each model, for requests without their own; `key`: the bearer token
    that each request has to bring, "" for none; `file_pages`: pages that were opened from a file may ask."""

    models: list[ChatModel]
    systems: list[str]
    options: Options
    key: str = ""
    file_pages: bool = False


class Refused(Exception):
    """A request that is not answered: the status, and why."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


def check_address(host: str, key: str) -> None:
    """UserError for an address that others could ask at without a key."""
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host}: others could ask there; a key is wanted too: --api-key TEXT")


def serve(serving: Serving, host: str, port: int) -> None:
    """Answer requests until Ctrl-C."""
    with make_server(serving, host, port) as server:
        address = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"
        note(f"{address}/ is a page to talk to it; Ctrl-C stops it")
        note(f"{address}/v1 answers as OpenAI's chat completions do")
        server.serve_forever()


def make_server(serving: Serving, host: str, port: int) -> ThreadingHTTPServer:
    """The server, bound to its address. RunError if that is taken."""
    handler = type("Handler", (_Handler,), {"serving": serving, "one_at_a_time": threading.Lock()})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        return server((host, port), handler)
    except OSError as error:
        raise RunError(
            f"{host}:{port} cannot be used ({explain_os_error(error)}); choose another --port"
        ) from None


class _Handler(BaseHTTPRequestHandler):
    """One connection. make_server's subclass holds `serving` and `one_at_a_time`."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE
    serving: Serving
    one_at_a_time: threading.Lock
    streaming = False
    headers = HTTPMessage()  # until they are read

    def do_OPTIONS(self):
        self._run(self._preflight)

    def do_GET(self):
        self._run(self._get)

    def do_POST(self):
        self._run(self._post)

    def _run(self, answer):
        """Call `answer()` and send what it could not do, which is told in one line here, too."""
        self.streaming = False
        try:
            answer()
        except Refused as refusal:
            self._refuse(refusal.status, str(refusal))
        except OSError:  # the client has left, and its answer ends here
            self.close_connection = True
        except Exception as error:
            message, code = explain(error) or (f"{type(error).__name__}: {error}", 1)
            self._refuse(HTTPStatus.BAD_REQUEST if code == 2 else HTTPStatus.INTERNAL_SERVER_ERROR, message)

    def _preflight(self):
        """A browser asks whether a page of another origin may send what it is going to send."""
        self._check_asker()
        asked = " ".join(self.headers.get("Access-Control-Request-Headers", "").split())
        allowed = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": asked or "authorization, content-type",
            "Access-Control-Max-Age": "600",
            "Content-Length": "0",
        }
        self._send_head(HTTPStatus.NO_CONTENT, allowed)

    def _get(self):
        path, serving = self._path(), self.serving
        if path == "" and not self.path.startswith("/v1"):
            if not serving.key:  # a browser that opens the page brings no key; the page asks for it
                self._check_asker()
            return self._send_page()
        self._check_asker()
        models = [
            describe_model(model, serving.options, system)
            for model, system in zip(serving.models, serving.systems)
        ]
        if path == "/models":
            return self._send(HTTPStatus.OK, {"object": "list", "data": models})
        named = [model for model in models if path == f"/models/{model['id']}"]
        if not named:
            raise Refused(HTTPStatus.NOT_FOUND, "wanted /, /v1/models or /v1/chat/completions")
        self._send(HTTPStatus.OK, named[0])

    def _post(self):
        body = self._read_body()
        self._check_asker()
        if self._path() != "/chat/completions":
            raise Refused(HTTPStatus.NOT_FOUND, "wanted /v1/chat/completions")
        self._chat(read_request(body, self.serving.options))

    def _path(self):
        return unquote(urlsplit(self.path).path).removeprefix("/v1").rstrip("/")

    def _read_body(self):
        """The bytes of a request, sent as a whole or in chunks (RFC 9112, section 7.1)."""
        length, coding = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding")
        too_large = Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"wanted at most {LARGEST_BODY} bytes")
        broken = Refused(HTTPStatus.BAD_REQUEST, "the body is neither as long as it says nor in whole chunks")
        if coding is None:
            if not re.fullmatch("[0-9]+", length or ""):
                raise Refused(HTTPStatus.LENGTH_REQUIRED, "wanted a Content-Length, or a body in chunks")
            if int(length) > LARGEST_BODY:
                raise too_large
            return self.rfile.read(int(length))
        if coding.strip().lower() != "chunked" or length is not None:
            raise broken
        body = b""
        while True:
            size = self.rfile.readline(LONGEST_LINE).split(b";")[0].strip()
            if not re.fullmatch(b"[0-9a-fA-F]+", size):
                raise broken
            if len(body) + int(size, 16) > LARGEST_BODY:
                raise too_large
            chunk = self.rfile.read(int(size, 16))
            if chunk:
                body += chunk
                if self.rfile.readline(LONGEST_LINE).strip():
                    raise broken
            else:
                while self.rfile.readline(LONGEST_LINE).strip():
                    """Fields after the last chunk, which no client needs."""
                return body

    def _chat(self, request: Request):
        serving = self.serving
        names = [model.name for model in serving.models]
        if request.model not in ("", *names) and len(names) > 1:
            raise Refused(HTTPStatus.NOT_FOUND, f"no model {request.model} here; wanted {' or '.join(names)}")
        place = names.index(request.model) if request.model in names else 0
        chat_model, system, messages = serving.models[place], serving.systems[place], request.messages
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        prompt = chat_model.encode(messages, request.options)
        chat_model.check_length(prompt)
        self.answer = answer = Answer(chat_model, len(prompt))
        with self.one_at_a_time:
            self._check_client("", False)  # it may have left while another was answered
            if request.stream:
                self._begin_stream()
            show = self._send_piece if request.stream else self._check_client
            reply = chat_model.answer(prompt, request.options, show)
        note(f"[{chat_model.name}: {reply.speed()}]" if len(names) > 1 else f"[{reply.speed()}]")
        if request.stream:
            self._send_chunk(answer.event({}, finish_reason(reply)))
            if request.usage:
                self._send_chunk(answer.usage_event(reply))
            self._send_chunk(b"data: [DONE]\n\n")
            self._send_chunk(b"")
        else:
            self._send(HTTPStatus.OK, answer.whole(reply))

    def _check_client(self, text, thinking):
        """ConnectionError if the client has left: nobody waits for the rest of the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    # ---- who may ask

    def _check_asker(self):
        """Without a key only this machine may ask, and of the pages in its browser only those that it serves itself: a page from
        anywhere can send requests to the loopback. Refused otherwise."""
        if self.serving.key:
            given = self.headers.get("Authorization", "").encode()
            preflight = self.command == "OPTIONS"  # which never brings one
            if not preflight and not hmac.compare_digest(given, f"Bearer {self.serving.key}".encode()):
                raise Refused(HTTPStatus.UNAUTHORIZED, "wrong or no key; wanted Authorization: Bearer KEY")
        elif not _is_local(f"//{self.headers.get('Host', '')}") or not self._origin_is_allowed():
            why = "only for this machine; for others start it with --host and --api-key"
            if self.headers.get("Origin") == "null":
                why = "a page from a file; start it with --file-pages true to let those ask"
            raise Refused(HTTPStatus.FORBIDDEN, why)

    def _origin_is_allowed(self):
        origin = self.headers.get("Origin")
        if origin is None or self.serving.key:
            return True
        return self.serving.file_pages if origin == "null" else _is_local(origin)

    # ---- sending

    def _send(self, status, value):
        body = json.dumps(value, ensure_ascii=False).encode()
        self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_page(self):
        """The page may run its own script and ask this server; whatever an answer holds, nothing else runs and nothing is loaded."""
        body = PAGE.read_bytes()
        own = " ".join(
            f"{kind}-src '{_digest(re.search(pattern, body, re.DOTALL)[1])}';"
            for kind, pattern in (("script", b"<script>(.*)</script>"), ("style", b"<style>(.*)</style>"))
        )
        rules = f"default-src 'none'; {own} connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{rules}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        self._send_head(HTTPStatus.OK, headers)
        self.wfile.write(body)

    def _send_head(self, status, headers):
        self.send_response(status)
        origin = " ".join(self.headers.get("Origin", "").split())
        if origin and self._origin_is_allowed():
            headers |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()

    def _refuse(self, status, why):
        note(f"refused ({status.value}) {self.requestline[:100]}: {why}")
        self.close_connection = True
        if self.streaming:  # the head is sent: an event says it, and the stream is cut
            self._send_chunk(
                f"data: {json.dumps({'error': {'message': why}}, ensure_ascii=False)}\n\n".encode()
            )
        else:
            kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
            self._send(status, {"error": {"message": why, "type": kind, "code": status.value}})

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals of what is not HTTP, or a method that is not here."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, *_):
        """Nothing: what is worth a line is told by _chat and _refuse."""

    def _begin_stream(self):
        self.streaming = True
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked"}
        self._send_head(HTTPStatus.OK, {**headers, "Cache-Control": "no-store"})
        self._send_chunk(self.answer.event({"role": "assistant", "content": ""}))

    def _send_piece(self, text, thinking):
        """A piece of the answer; one that is empty as yet is a comment, which tells whether the client is still there."""
        delta = {"reasoning_content" if thinking else "content": text}
        self._send_chunk(self.answer.event(delta) if text else b": \n\n")

    def _send_chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


def _is_local(address):
    try:
        return urlsplit(address).hostname in LOOPBACK
    except ValueError:
        return False


def _digest(text):
    return f"sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}"
