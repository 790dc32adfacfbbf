"""The chat as a server: OpenAI's chat completions over HTTP, for chat pages, editors and apps on the same machine.

    GET  /v1/models                 the one model that answers
    POST /v1/chat/completions       {"messages": [...]}, as a whole or, with "stream": true, piece by piece as server-sent events

One answer at a time: a model on a small machine is no faster with two. Python's own http.server reads the requests.
"""

import hmac
import json
import select
import socket
import threading
import time
import uuid
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from utils.chat.model import ChatModel, Options, Reply, read_value
from utils.chat.terminal import note
from utils.errors import RunError, UserError, explain, explain_os_error
from utils.files import is_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 8 << 20  # bytes of a request
SILENCE = 60  # seconds that a client may take between two bytes
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What a request may change: OpenAI's name of it, and ours.
NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "seed",
}


def check_address(host: str, key: str) -> None:
    """UserError for an address that others could ask at without a key."""
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host}: others could ask there; a key is wanted too: --api-key TEXT")


def serve(chat_model: ChatModel, options: Options, system: str, host: str, port: int, key: str) -> None:
    """Answer requests until Ctrl-C. `system`: the system text of those without their own; `key`: the bearer token that each
    has to bring, "" for none."""
    with make_server(chat_model, options, system, host, port, key) as server:
        address = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/v1"
        note(f"{address} answers as OpenAI's chat completions do; Ctrl-C stops it")
        server.serve_forever()


def make_server(
    chat_model: ChatModel, options: Options, system: str, host: str, port: int, key: str
) -> ThreadingHTTPServer:
    """The server, bound to its address. RunError where that is taken."""
    handler = type("Handler", (_Handler,), {})
    handler.chat_model, handler.options, handler.system, handler.key = chat_model, options, system, key
    handler.one_at_a_time = threading.Lock()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        return server((host, port), handler)
    except OSError as error:
        raise RunError(
            f"{host}:{port} cannot be used ({explain_os_error(error)}); choose another --port"
        ) from None


class Request(NamedTuple):
    """What a client asks: `usage` whether a stream is to end with the numbers of tokens."""

    messages: list[dict]
    options: Options
    stream: bool
    usage: bool


def read_request(body: bytes, options: Options) -> Request:
    """The request in a body of JSON; what it does not set is as in `options`. UserError where it cannot be answered."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise UserError('wanted {"messages": [...]}')
    if request.get("stop") or request.get("tools") or request.get("n", 1) not in (None, 1):
        raise UserError("stop, tools and n above 1 are not supported")
    messages = [_read_message(message) for message in request["messages"]]
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message has to be the user's")
    own = replace(options, decoding=dict(options.decoding), generator=torch.Generator())
    own.generator.seed()  # another one every time, unless the request brings its own
    for name, ours in NAMES.items():
        if request.get(name) is not None:
            own.apply(ours, read_value(ours, request[name], name))
    thinking = _flag_in(request, "chat_template_kwargs", "enable_thinking")
    own.thinking = own.thinking if thinking is None else thinking
    usage = bool(_flag_in(request, "stream_options", "include_usage"))
    return Request(messages, own, bool(request.get("stream")), usage)


def _flag_in(request, name, key):
    """The bool at request[name][key]; None where there is none."""
    inner = request.get(name)
    value = inner.get(key) if isinstance(inner, dict) else None
    return value if isinstance(value, bool) else None


def _read_message(message):
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    content = message.get("content") if role else None
    if isinstance(content, list):  # OpenAI's parts; only texts are understood
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if is_text(content):
        return {"role": role, "content": content}
    raise UserError('every message is wanted as {"role": "system", "user" or "assistant", "content": text}')


class _Handler(BaseHTTPRequestHandler):
    """One connection. make_server's subclass holds chat_model, options, system, key and one_at_a_time."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE

    def log_message(self, *_):
        """Nothing: what is worth a line is told by _chat."""

    def do_OPTIONS(self):
        self._send(HTTPStatus.NO_CONTENT, None)

    def do_GET(self):
        if not self._allowed():
            return
        if self._path() != "/models":
            return self._refuse(HTTPStatus.NOT_FOUND, "wanted /v1/models or /v1/chat/completions")
        model = {"id": self.chat_model.name, "object": "model", "created": 0, "owned_by": "local"}
        self._send(HTTPStatus.OK, {"object": "list", "data": [model]})

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"wanted at most {LARGEST_BODY} bytes")
        self.streaming = False
        try:
            body = self.rfile.read(int(length))
            if not self._allowed():
                return
            if self._path() != "/chat/completions":
                return self._refuse(HTTPStatus.NOT_FOUND, "wanted /v1/models or /v1/chat/completions")
            self._chat(read_request(body, self.options))
        except OSError:  # the client has left, and its answer ends here
            self.close_connection = True
        except Exception as error:
            message, code = explain(error) or (f"{type(error).__name__}: {error}", 1)
            note(f"error: {message}")
            self._fail(HTTPStatus.BAD_REQUEST if code == 2 else HTTPStatus.INTERNAL_SERVER_ERROR, message)

    def _path(self):
        return urlsplit(self.path).path.removeprefix("/v1").rstrip("/")

    def _chat(self, request):
        messages = request.messages
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        prompt = self.chat_model.encode(messages, request.options)
        self.chat_model.check_length(prompt)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        self.about = {"id": identity, "created": int(time.time()), "model": self.chat_model.name}
        with self.one_at_a_time:
            if request.stream:
                self._begin_stream()
            show = self._send_piece if request.stream else self._check_client
            reply = self.chat_model.answer(prompt, request.options, show)
        note(f"[{reply.speed()}]")
        total = len(prompt) + reply.tokens
        usage = {"prompt_tokens": len(prompt), "completion_tokens": reply.tokens, "total_tokens": total}
        finish = "stop" if reply.ended else "length"
        if request.stream:
            self._send_event([{"delta": {}, "finish_reason": finish}])
            if request.usage:
                self._send_event([], usage)
            self._send_chunk(b"data: [DONE]\n\n")
            self._send_chunk(b"")
        else:
            choice = {"index": 0, "message": _message(reply), "finish_reason": finish}
            answer = {"object": "chat.completion", "choices": [choice], "usage": usage}
            self._send(HTTPStatus.OK, self.about | answer)

    def _check_client(self, text, thinking):
        """ConnectionError where the client has left: nobody waits for the rest of the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    # ---- who may ask

    def _allowed(self):
        """Whether this may be answered; a refusal is sent. Without a key only this machine may ask, and of the pages in its
        browser only those that it serves itself: a page from anywhere can send requests to the loopback."""
        if self.key:
            given = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                self.close_connection = True
                self._refuse(HTTPStatus.UNAUTHORIZED, "wrong or no key; wanted Authorization: Bearer KEY")
                return False
        elif not (self._is_local(f"//{self.headers.get('Host', '')}") and self._origin_is_local()):
            self.close_connection = True
            self._refuse(
                HTTPStatus.FORBIDDEN, "only for this machine; for others start it with --host and --api-key"
            )
            return False
        return True

    def _origin_is_local(self):
        origin = self.headers.get("Origin")
        return origin is None or self._is_local(origin)

    @staticmethod
    def _is_local(address):
        try:
            return urlsplit(address).hostname in LOOPBACK
        except ValueError:
            return False

    # ---- sending

    def _send(self, status, value):
        body = b"" if value is None else json.dumps(value, ensure_ascii=False).encode()
        self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_head(self, status, headers):
        self.send_response(status)
        origin = self.headers.get("Origin")
        if origin and (self.key or self._origin_is_local()):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Headers"] = "authorization, content-type"
            headers["Vary"] = "Origin"
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()

    def _refuse(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "code": status.value}
        self._send(status, {"error": error})

    def _fail(self, status, message):
        if self.streaming:  # the head is sent: an event says it, and the stream is cut
            self._send_chunk(f"data: {json.dumps({'error': {'message': message}})}\n\n".encode())
            self.close_connection = True
        else:
            self._refuse(status, message)

    def _begin_stream(self):
        self.streaming = True
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked"}
        self._send_head(HTTPStatus.OK, {**headers, "Cache-Control": "no-store"})
        self._send_event([{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def _send_piece(self, text, thinking):
        """A piece of the answer; one that is empty as yet is a comment, which tells whether the client is still there."""
        if not text:
            return self._send_chunk(b": \n\n")
        delta = {"reasoning_content" if thinking else "content": text}
        self._send_event([{"delta": delta, "finish_reason": None}])

    def _send_event(self, choices, usage=None):
        choices = [{"index": 0, **choice} for choice in choices]
        event = {**self.about, "object": "chat.completion.chunk", "choices": choices}
        event |= {"usage": usage} if usage else {}
        self._send_chunk(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())

    def _send_chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


def _message(reply: Reply):
    reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
    return {"role": "assistant", "content": reply.content, **reasoning}
