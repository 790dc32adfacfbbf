"""The chat as a server: a page to talk to the model, and OpenAI's chat completions, for this machine.

    GET  /                          the page (page.html)
    GET  /v1/models                 the models that answer: one, or two side by side
    POST /v1/chat/completions       {"messages": [...]}, as a whole or, with "stream": true, piece by piece as server-sent events

One answer at a time: a model on a small machine is no faster with two. A field that would change the answer and that is not done
here is refused by its name. Fields and their meaning: https://platform.openai.com/docs/api-reference/chat/create; top_k,
repetition_penalty and chat_template_kwargs are vLLM's. Python's own http.server reads the requests; starlette with uvicorn would
take 0.1 s more to start, 10 MiB and a thread with a queue for each answer, and save few lines.
"""

import contextlib
import hmac
import json
import re
import secrets
import select
import socket
import threading
import time
import uuid
from dataclasses import asdict, replace
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.chat.model import RULES, ChatModel, Options, Reply
from utils.chat.terminal import LOOPBACK, note
from utils.errors import RunError, UserError, explain, explain_os_error
from utils.files import is_text
from utils.settings import read_number

LARGEST_BODY = 8 << 20  # bytes of a request
LONGEST_LINE = 1000  # bytes, between the chunks of a body
SILENCE = 60  # seconds that a client may take between two bytes
PAGE = Path(__file__).with_name("page.html")


# ---- What a request asks for

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Numbers that a request may set: the name in the request, and ours.
NUMBERS = {name: name for name in RULES}
NUMBERS |= {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
THINKING = ("enable_thinking", "chat_template_kwargs.enable_thinking")
FLAGS = ("stream", "stream_options.include_usage", *THINKING)  # what is inside an object is named so
# Who asks, and what is to be kept or measured beside an answer: these change none.
WITHOUT_EFFECT = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls "
    "cache_prompt timings_per_token id chat_id session_id stream_options.include_obfuscation"
).split()
KNOWN = {"model", "messages", "stop", *NUMBERS, *FLAGS, *WITHOUT_EFFECT}
IN_MESSAGES = {"role", "content", "name", "reasoning_content", "reasoning", "refusal"}
# Values with which a field that is not done asks for nothing; so do null, {} and [].
NEUTRAL = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "min_p": [0],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}


def read_request(body: bytes, options: Options) -> tuple[dict, list[dict], Options]:
    """(its fields, its messages, its options) of a request in JSON; what it does not set is as in `options`. UserError if it
    cannot be answered."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise UserError('wanted {"messages": [...]}')
    for name in ("stream_options", "chat_template_kwargs"):
        if isinstance(request.get(name), dict):
            request |= {f"{name}.{inner}": value for inner, value in request.pop(name).items()}
    request = {name: value for name, value in request.items() if value is not None}
    _refuse_unknown(request, KNOWN)
    messages = [_read_message(message) for message in request["messages"]]
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message has to be the user's")
    own = replace(options, numbers=dict(options.numbers))
    for name, value in request.items():
        if name in NUMBERS:
            own.numbers[NUMBERS[name]] = read_number(name, value, RULES[NUMBERS[name]])
        elif name in FLAGS and not isinstance(value, bool):
            raise UserError(f"{name}: wanted true or false")
        elif name in THINKING:
            own.thinking = value
    stops = request.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(is_text(stop) and stop for stop in stops):
        raise UserError("stop: wanted a text, or a list of texts")
    own.stop = tuple(stops)
    return request, messages, own


def _refuse_unknown(fields, known):
    for name, value in fields.items():
        if name not in known and value not in (None, [], {}, *NEUTRAL.get(name, [])):
            raise UserError(f"{name} is not supported here, and would change the answer; leave it out")


def _read_message(message):
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    content = message.get("content") if role else None
    if isinstance(content, list):  # OpenAI's parts; only texts are understood
        parts = [part if isinstance(part, dict) else {} for part in content]
        if other := next((part["type"] for part in parts if part.get("type", "text") != "text"), ""):
            raise UserError(f"content parts of type {other!r} are not supported here, only text")
        texts = [part.get("text") for part in parts]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not is_text(content):
        wanted = '{"role": "system", "user" or "assistant", "content": text}'
        raise UserError(f"every message is wanted as {wanted}")
    _refuse_unknown(message, IN_MESSAGES)
    return {"role": role, "content": content}


# ---- An answer, as clients expect it


class Answer:
    """The JSON of one answer, whole or as the events of a stream."""

    def __init__(self, chat_model: ChatModel, prompt: list[int]):
        self.prompt_tokens = len(prompt)
        self.about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat_model.name,
        }

    def whole(self, reply: Reply) -> dict:
        reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        message = {"role": "assistant", "content": reply.content, **reasoning}
        choice = {"index": 0, "message": message, "finish_reason": self.reason(reply)}
        return {**self.about, "object": "chat.completion", "choices": [choice], **self.usage(reply)}

    def event(self, delta: dict, reason: str | None = None) -> bytes:
        """One event of a stream: what comes next of the message, and why it has ended if it has."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return as_event({**self.about, "object": "chat.completion.chunk", "choices": [choice]})

    def last_event(self, reply: Reply) -> bytes:
        """The event that tells the usage."""
        return as_event({**self.about, "object": "chat.completion.chunk", "choices": [], **self.usage(reply)})

    def usage(self, reply: Reply) -> dict:
        """The numbers of tokens, and the speed under llama.cpp's name."""
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": reply.tokens}
        tokens["total_tokens"] = self.prompt_tokens + reply.tokens
        return {"usage": tokens, "timings": {"predicted_per_second": reply.rate}}

    def reason(self, reply: Reply) -> str:
        return "stop" if reply.ended else "length"


def as_event(value: dict) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def describe_model(chat_model: ChatModel, options: Options) -> dict:
    """An entry of the list of models. `meta` is for the page: the values that hold unless a request sets others."""
    meta = asdict(chat_model.decoding(options))
    meta["temperature"] *= meta["do_sample"]
    meta |= {"thinking": chat_model.thinks(options), "max_tokens": options.limit}
    meta |= {"system": chat_model.system, "single_questions": chat_model.single}
    return {"id": chat_model.name, "object": "model", "created": 0, "owned_by": "local", "meta": meta}


# ---- The server


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
