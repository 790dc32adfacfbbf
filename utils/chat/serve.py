"""The chat as a server: a page to talk to the model, and OpenAI's chat completions, for this machine.

    GET  /                          the page (page.html)
    GET  /v1/models                 the models that answer: one, or two side by side
    POST /v1/chat/completions       {"messages": [...]}, as a whole or, with "stream": true, piece by piece as server-sent events

One answer at a time: a model on a small machine is no faster with two. Python's own http.server reads the requests; starlette
with uvicorn would take 0.1 s more to start, 10 MiB and a thread with a queue for each answer, and save few lines.
"""

import contextlib
import hmac
import json
import re
import secrets
import select
import socket
import threading
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.chat.completions import Answer, as_event, describe_model, read_request
from utils.chat.model import ChatModel, Options
from utils.chat.terminal import LOOPBACK, note
from utils.errors import RunError, explain, explain_os_error

LARGEST_BODY = 8 << 20  # bytes of a request
LONGEST_LINE = 1000  # bytes, between the chunks of a body
SILENCE = 60  # seconds that a client may take between two bytes
PAGE = Path(__file__).with_name("page.html")


class Refused(Exception):
    """A request that is not answered: the HTTP status, and why."""


class Server(ThreadingHTTPServer):
    """The server, bound to its address; RunError if that is taken.

    `key`: the bearer token that each request has to bring, "" for none; `file_pages`: pages opened from a file may ask.
    """

    def __init__(
        self, models: list[ChatModel], options: Options, host: str, port: int, key: str, file_pages: bool
    ):
        self.models, self.options, self.key, self.file_pages = models, options, key, file_pages
        self.one_at_a_time = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            why = f"{host}:{port} cannot be used ({explain_os_error(error)}); choose another --port"
            raise RunError(why) from None

    def run(self) -> None:
        """Say where it is, and answer requests until Ctrl-C."""
        host, port = self.server_address[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with self:
            note(f"{address}/ is a page to talk to it; Ctrl-C stops it")
            note(f"{address}/v1 answers as OpenAI's chat completions do")
            self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE
    headers = HTTPMessage()  # until they are read
    streaming = False  # the head of a stream is sent

    def do_GET(self):
        self.streaming = False
        try:
            path = unquote(urlsplit(self.path).path)
            body = self._read_body() if self.command == "POST" else b""
            # A browser that opens the page, or asks what it may send, brings no key; the page asks for it.
            self._check_asker(needs_key=path != "/" and self.command != "OPTIONS")
            match self.command, path.removeprefix("/v1").rstrip("/"):
                case "OPTIONS", _:
                    asked = " ".join(self.headers.get("Access-Control-Request-Headers", "").split())
                    allowed = {"Methods": "GET, POST", "Headers": asked or "authorization, content-type"}
                    headers = {f"Access-Control-Allow-{name}": text for name, text in allowed.items()}
                    self._send(HTTPStatus.NO_CONTENT, b"", headers)
                case "GET", "" if path == "/":
                    self._send_page()
                case "GET", "/models":
                    models = [describe_model(model, self.server.options) for model in self.server.models]
                    self._send_json(HTTPStatus.OK, {"object": "list", "data": models})
                case "POST", "/chat/completions":
                    self._chat(*read_request(body, self.server.options))
                case _:
                    raise Refused(HTTPStatus.NOT_FOUND, "wanted /, /v1/models or /v1/chat/completions")
        except Refused as refusal:
            self._refuse(*refusal.args)
        except OSError:  # the client has left, and its answer ends here
            self.close_connection = True
        except Exception as error:
            why, code = explain(error) or (f"{type(error).__name__}: {error}", 1)
            self._refuse(HTTPStatus.BAD_REQUEST if code == 2 else HTTPStatus.INTERNAL_SERVER_ERROR, why)

    do_POST = do_OPTIONS = do_GET

    def _read_body(self):
        """The bytes of a request, sent as a whole or in chunks (RFC 9112, section 7.1)."""
        length, coding = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding")
        if coding is None:
            return self._read(length, 10)
        if coding.strip().lower() != "chunked" or length is not None:
            raise Refused(HTTPStatus.BAD_REQUEST, "wanted a Content-Length, or Transfer-Encoding: chunked")
        body = b""
        while chunk := self._read(self._line().split(";")[0].strip(), 16, len(body)):
            body += chunk
            if self._line().strip():
                raise Refused(HTTPStatus.BAD_REQUEST, "a chunk is not as long as it says")
        while self._line().strip():
            pass  # fields after the last chunk, which no client needs
        return body

    def _line(self):
        return self.rfile.readline(LONGEST_LINE).decode("latin-1")

    def _read(self, length, base, before=0):
        """As many bytes as `length` says, a text in base 10 or 16; `before` bytes were there already."""
        if not re.fullmatch("[0-9a-fA-F]+" if base == 16 else "[0-9]+", length or ""):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body, or a chunk of it, does not say how long it is")
        if before + int(length, base) > LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"wanted at most {LARGEST_BODY} bytes")
        return self.rfile.read(int(length, base))

    def _chat(self, request, messages, options):
        models, name = {model.name: model for model in self.server.models}, str(request.get("model") or "")
        if name and name not in models and len(models) > 1:
            raise Refused(HTTPStatus.NOT_FOUND, f"no model {name} here; wanted {' or '.join(models)}")
        chat_model = models.get(name, self.server.models[0])
        if chat_model.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": chat_model.system}, *messages]
        prompt = chat_model.encode(messages, options)
        chat_model.check_length(prompt)
        answer, stream = Answer(chat_model, prompt), request.get("stream")

        def send_piece(text, thinking):
            """An empty piece is sent as a comment, which tells whether the client is still there."""
            delta = {"reasoning_content" if thinking else "content": text}
            self.wfile.write(answer.event(delta) if text else b": \n\n")

        with self.server.one_at_a_time:
            self._check_client()  # it may have left while another was answered
            if stream:
                headers = {"Connection": "close", "Cache-Control": "no-store"}
                self._send(HTTPStatus.OK, None, headers, "text/event-stream; charset=utf-8")
                self.streaming = True
                self.wfile.write(answer.event({"role": "assistant", "content": ""}))
            show = send_piece if stream else self._check_client
            reply = chat_model.answer(prompt, options, show)
        note(f"[{chat_model.name}: {reply.speed()}]")
        if not stream:
            return self._send_json(HTTPStatus.OK, answer.whole(reply))
        self.wfile.write(answer.event({}, answer.reason(reply)))
        if request.get("stream_options.include_usage"):
            self.wfile.write(answer.last_event(reply))
        self.wfile.write(b"data: [DONE]\n\n")

    def _check_client(self, *_):
        """ConnectionError if the client has left: nobody waits for the rest of the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    # ---- who may ask

    def _check_asker(self, needs_key):
        """Without a key only this machine may ask, and of the pages in its browser only those that it serves itself: a page from
        anywhere can send requests to the loopback. Refused otherwise."""
        key, given = self.server.key, self.headers.get("Authorization", "")
        if key and needs_key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "wrong or no key; wanted Authorization: Bearer KEY")
        if not key and not (_is_local(f"//{self.headers.get('Host', '')}") and self._origin_is_allowed()):
            hint = "for pages from a file start it with --file-pages, for others with --host and --api-key"
            raise Refused(HTTPStatus.FORBIDDEN, f"only for this machine; {hint}")

    def _origin_is_allowed(self):
        origin = self.headers.get("Origin")
        if origin is None or self.server.key:
            return True
        return self.server.file_pages if origin == "null" else _is_local(origin)

    # ---- sending

    def _send(self, status, body, headers, kind="application/json"):
        """A response; `body` is None for one that follows, up to the end of the connection."""
        origin = " ".join(self.headers.get("Origin", "").split())
        if origin and self._origin_is_allowed():
            headers |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        headers |= {"Content-Type": kind} | ({} if body is None else {"Content-Length": str(len(body))})
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body or b"")

    def _send_json(self, status, value):
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), {})

    def _send_page(self):
        """The page may run its own script and ask this server; whatever an answer holds, nothing else runs or is loaded."""
        once = secrets.token_hex(16)
        body = PAGE.read_bytes().replace(b"<script>", f'<script nonce="{once}">'.encode(), 1)
        rules = (
            f"default-src 'none'; script-src 'nonce-{once}'; style-src 'unsafe-inline'; connect-src 'self'"
        )
        rules += "; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": rules, "Cache-Control": "no-store"}
        self._send(HTTPStatus.OK, body, headers, "text/html; charset=utf-8")

    def _refuse(self, status, why):
        note(f"refused ({status.value}) {self.requestline[:100]}: {why}")
        self.close_connection = True
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        error = {"error": {"message": why, "type": kind, "code": status.value}}
        with contextlib.suppress(OSError):  # it may have left
            if self.streaming:
                self.wfile.write(as_event(error))
            else:
                self._send_json(status, error)

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals: of what is no HTTP, or another method."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, *_):
        """Nothing: what is worth a line is told by _chat and _refuse."""


def _is_local(address):
    try:
        return urlsplit(address).hostname in LOOPBACK
    except ValueError:
        return False
