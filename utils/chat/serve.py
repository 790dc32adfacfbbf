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
import secrets
import select
import socket
import threading
import time
import uuid
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from utils.chat.model import ChatModel, Options
from utils.chat.terminal import LOOPBACK, note
from utils.errors import RunError, UserError, explain
from utils.files import is_text
from utils.settings import read_number

LARGEST_BODY = 8 << 20  # bytes of a request
LONGEST_LINE = 1000  # bytes, between the chunks of a body
PAGE = Path(__file__).with_name("page.html")


# ---- What a request asks for

RULES = {  # of the numbers that a request may set, as in utils/settings.py
    "temperature": "0 to 10",  # 0: greedy
    "top_p": "> 0, at most 1",
    "top_k": "0, 1, ...",  # 0: no limit
    "repetition_penalty": "0.1 to 10",
    "seed": "0, 1, ...",
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
RULES |= dict.fromkeys(LIMITS, "1, 2, ...")
THINKING = ("enable_thinking", "chat_template_kwargs.enable_thinking")  # what is inside an object is named so
FLAGS = ("stream", "stream_options.include_usage", *THINKING)
# Who asks, and what is to be kept or measured beside an answer: these change none.
WITHOUT_EFFECT = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "tool_choice parallel_tool_calls cache_prompt timings_per_token id chat_id session_id stream_options.include_obfuscation"
).split()
KNOWN = {"model", "messages", "stop", *RULES, *FLAGS, *WITHOUT_EFFECT}
IN_MESSAGES = {"role", "content", "name", "reasoning_content", "reasoning", "refusal"}
# With these a field that is not done asks for nothing; so it does with null, false, 0, {} and [].
NEUTRAL = {"n": 1, "response_format": {"type": "text"}, "modalities": ["text"]}


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
    numbers, thinking = dict(options.numbers), options.thinking
    for name, value in request.items():
        if name in RULES:
            numbers["max_new_tokens" if name in LIMITS else name] = read_number(name, value, RULES[name])
        elif name in FLAGS and not isinstance(value, bool):
            raise UserError(f"{name}: wanted true or false")
        elif name in THINKING:
            thinking = value
    stops = request.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(is_text(stop) and stop for stop in stops):
        raise UserError("stop: wanted a text, or a list of texts")
    return request, messages, Options(thinking, tuple(stops), numbers)


def _refuse_unknown(fields, known):
    for name, value in fields.items():
        if name not in known and value and value != NEUTRAL.get(name):
            raise UserError(f"{name} is not supported here, and would change the answer; leave it out")


def _read_message(message):
    message = message if isinstance(message, dict) else {}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if role not in ("system", "developer", "user", "assistant") or not is_text(content):
        wanted = '{"role": "system", "user" or "assistant", "content": text}'
        raise UserError(
            f"every message is wanted as {wanted}; parts of it that are no text are not supported"
        )
    _refuse_unknown(message, IN_MESSAGES)
    return {"role": "system" if role == "developer" else role, "content": content}


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
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            why = f"{host}:{port} cannot be used ({explain(error)[0]}); choose another --port"
            raise RunError(why) from None

    def run(self) -> None:
        """Say where it is, and answer requests until Ctrl-C."""
        address = "http://{}:{}".format(*self.server_address)
        with self:
            note(f"{address}/ is a page to talk to it; Ctrl-C stops it")
            note(f"{address}/v1 answers as OpenAI's chat completions do")
            self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may take between two bytes
    origin = ""  # of the page that asks, once it is known to be allowed
    streaming = False  # the head of a stream is sent

    def do_GET(self):
        self.origin, self.streaming = "", False
        try:
            body = self._read_body() if self.command == "POST" else b""
            path = self.path.partition("?")[0].removeprefix("/v1").rstrip("/")
            # A browser that opens the page, or asks what it may send, brings no key; the page asks for it.
            self._check_asker(needs_key=path and self.command != "OPTIONS")
            match self.command, path:
                case "OPTIONS", _:
                    asked = " ".join(self.headers.get("Access-Control-Request-Headers", "").split())
                    headers = {"Access-Control-Allow-Headers": asked or "authorization, content-type"}
                    headers["Access-Control-Allow-Methods"] = "GET, POST"
                    self._send(HTTPStatus.NO_CONTENT, b"", headers)
                case "GET", "":
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

        def read(digits, base):
            size = int(digits, base)
            if not 0 <= size <= LARGEST_BODY - len(body):
                raise ValueError
            return self.rfile.read(size)

        length, coding = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding")
        body = b""
        try:
            if coding is None:
                return read(length or "", 10)
            if coding.lower() != "chunked" or length is not None:
                raise ValueError
            while chunk := read(self.rfile.readline(LONGEST_LINE).split(b";")[0], 16):
                body += chunk
                if self.rfile.readline(LONGEST_LINE).strip():
                    raise ValueError
            while self.rfile.readline(LONGEST_LINE).strip():
                pass  # fields after the last chunk, which no client needs
        except ValueError:
            wanted = f"a body of at most {LARGEST_BODY} bytes, with a Content-Length or in chunks"
            raise UserError(f"wanted {wanted}") from None
        return body

    def _chat(self, request, messages, options):
        chat_model, stream = self._model_named(request.get("model")), request.get("stream")
        prompt = chat_model.encode(messages, options)
        chat_model.check_length(prompt)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat_model.name}
        about["object"] = "chat.completion.chunk" if stream else "chat.completion"

        def send_delta(delta, end=None):
            self._send_event({**about, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]})

        def show(text, thinking):
            if not stream or not text:
                self._check_client()
            else:
                send_delta({"reasoning_content" if thinking else "content": text})

        with self.server.one_at_a_time:
            self._check_client()  # it may have left while another was answered
            if stream:
                headers = {"Connection": "close", "Cache-Control": "no-store"}
                self._send(HTTPStatus.OK, None, headers, "text/event-stream; charset=utf-8")
                self.streaming = True
                send_delta({"role": "assistant", "content": ""})
            reply = chat_model.answer(prompt, options, show)
        note(f"[{chat_model.name}: {reply}]")
        tokens = {"prompt_tokens": len(prompt), "completion_tokens": reply.tokens}
        usage = {"usage": {**tokens, "total_tokens": len(prompt) + reply.tokens}}
        usage["timings"] = {"predicted_per_second": reply.rate}  # llama.cpp's name
        if stream:
            send_delta({}, reply.end)
            if request.get("stream_options.include_usage"):
                self._send_event({**about, "choices": [], **usage})
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            choice = {"index": 0, "message": reply.message(), "finish_reason": reply.end}
            self._send_json(HTTPStatus.OK, {**about, "choices": [choice], **usage})

    def _model_named(self, name):
        """The model of that name; the only one, or the first, where there is none."""
        models = {model.name: model for model in self.server.models}
        if name and len(models) > 1 and str(name) not in models:
            raise Refused(HTTPStatus.NOT_FOUND, f"no model {name} here; wanted {' or '.join(models)}")
        return models.get(str(name), self.server.models[0])

    def _check_client(self):
        """ConnectionError if the client has left: nobody waits for the rest of the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _check_asker(self, needs_key):
        """Without a key only this machine may ask, and of the pages in its browser only those that it serves itself: a page from
        anywhere can send requests to the loopback. Refused otherwise."""
        key, origin = self.server.key, " ".join(self.headers.get("Origin", "").split())
        local = not origin or (self.server.file_pages if origin == "null" else _is_local(origin))
        if not key and not (local and _is_local(f"//{self.headers.get('Host', '')}")):
            hint = "for pages from a file start it with --file-pages, for others with --host and --api-key"
            raise Refused(HTTPStatus.FORBIDDEN, f"only for this machine; {hint}")
        self.origin = origin
        given = self.headers.get("Authorization", "").encode()
        if key and needs_key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "wrong or no key; wanted Authorization: Bearer KEY")

    # ---- sending

    def _send(self, status, body, headers, kind="application/json"):
        """A response; `body` is None for one that follows, up to the end of the connection."""
        if self.origin:
            headers |= {"Access-Control-Allow-Origin": self.origin, "Vary": "Origin"}
        headers |= {"Content-Type": kind} | ({} if body is None else {"Content-Length": str(len(body))})
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body or b"")

    def _send_json(self, status, value):
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), {})

    def _send_event(self, value):
        self.wfile.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())

    def _send_page(self):
        """The page may run its own script and ask this server; whatever an answer holds, nothing else runs or is loaded."""
        once = secrets.token_hex(16)
        body = PAGE.read_bytes().replace(b"<script>", f'<script nonce="{once}">'.encode(), 1)
        rules = (
            f"default-src 'none'; script-src 'nonce-{once}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": rules, "Cache-Control": "no-store"}
        self._send(HTTPStatus.OK, body, headers, "text/html; charset=utf-8")

    def _refuse(self, status, why):
        note(f"refused ({status.value}) {self.requestline[:100]}: {why}")
        self.close_connection = True
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        error = {"error": {"message": why, "type": kind, "code": status.value}}
        with contextlib.suppress(OSError):  # it may have left
            if self.streaming:
                self._send_event(error)
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
