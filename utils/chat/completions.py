"""OpenAI's chat completions: what a request asks for, and an answer as clients expect it.

A field that would change the answer and that is not done here is refused by its name. Field names and their meaning:
https://platform.openai.com/docs/api-reference/chat/create; top_k, repetition_penalty, enable_thinking and chat_template_kwargs as in
vLLM's server.
"""

import json
import time
import uuid
from dataclasses import replace
from typing import NamedTuple

import torch

from utils.chat.model import ChatModel, Options, Reply, read_value
from utils.errors import UserError
from utils.files import is_text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Settings that a request may change: the name in the request, and ours.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "seed",
}
OTHERS = {"model", "messages", "stream", "stream_options", "stop", "enable_thinking", "chat_template_kwargs"}
# Fields that change no answer: who asks, and what is to be kept or measured beside it.
WITHOUT_EFFECT = set(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls "
    "cache_prompt timings_per_token id chat_id session_id".split()
)
# Values of fields that are not done, with which they ask for nothing; so do null, {} and [].
NEUTRAL = {
    "n": [1],
    "best_of": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "min_p": [0],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}
PARTS_OF_MESSAGE = {"role", "content", "name", "reasoning_content", "reasoning", "refusal"}
MOST_STOPS = 16


class Request(NamedTuple):
    """A question. `model`: its name, "" for any; `usage`: whether a stream is to end with the numbers of tokens."""

    model: str
    messages: list[dict]
    options: Options
    stream: bool
    usage: bool


def read_request(body: bytes, options: Options) -> Request:
    """The request in a body of JSON; what it does not set is as in `options`. UserError if it cannot be answered."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise UserError('wanted {"messages": [...]}')
    _refuse_unknown(request, OTHERS | SETTINGS.keys() | WITHOUT_EFFECT)
    messages = [_read_message(message) for message in request["messages"]]
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message has to be the user's")
    own = replace(options, decoding=dict(options.decoding), generator=torch.Generator())
    own.seed(-1)  # another one every time, unless the request brings its own
    for name, ours in SETTINGS.items():
        if request.get(name) is not None:
            own.apply(ours, read_value(ours, request[name], name))
    own.stop = _read_stops(request.get("stop"))
    inner = _read_object(request, "chat_template_kwargs", {"enable_thinking"})
    for flags, prefix in ((request, ""), (inner, "chat_template_kwargs.")):
        thinking = _read_flag(flags, "enable_thinking", prefix)
        own.thinking = own.thinking if thinking is None else thinking
    wanted = _read_object(request, "stream_options", {"include_usage", "include_obfuscation"})
    usage = bool(_read_flag(wanted, "include_usage", "stream_options."))
    model = request.get("model") or ""
    return Request(str(model), messages, own, bool(_read_flag(request, "stream")), usage)


def _refuse_unknown(fields, known, prefix=""):
    for name, value in fields.items():
        if name not in known and value not in (None, [], {}, *NEUTRAL.get(name, [])):
            raise UserError(
                f"{prefix}{name} is not supported here, and would change the answer; leave it out"
            )


def _read_object(request, name, known):
    value = request.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: wanted an object")
    _refuse_unknown(value, known, f"{name}.")
    return value


def _read_flag(fields, name, prefix=""):
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{prefix}{name}: wanted true or false")
    return value


def _read_stops(stop):
    stops = [stop] if isinstance(stop, str) else stop or []
    if isinstance(stops, list) and len(stops) <= MOST_STOPS and all(is_text(text) and text for text in stops):
        return tuple(stops)
    raise UserError(f"stop: wanted a text, or a list of up to {MOST_STOPS} texts")


def _read_message(message):
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    content = message.get("content") if role else None
    if isinstance(content, list):  # OpenAI's parts; only texts are understood
        kinds = [part.get("type", "text") if isinstance(part, dict) else None for part in content]
        if other := next((kind for kind in kinds if kind != "text"), ""):
            raise UserError(f"content parts of type {other!r} are not supported here, only text")
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not is_text(content):
        raise UserError(
            'every message is wanted as {"role": "system", "user" or "assistant", "content": text}'
        )
    _refuse_unknown(message, PARTS_OF_MESSAGE, "messages: ")
    return {"role": role, "content": content}


# ---- Answers


class Answer:
    """The JSON of one answer, whole or as the events of a stream. `chat_model` gives it."""

    def __init__(self, chat_model: ChatModel, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat_model.name,
        }

    def event(self, delta: dict, finish: str | None = None) -> bytes:
        """One event of a stream: what comes next of the message, and at its end the reason for it."""
        return self._event([{"index": 0, "delta": delta, "finish_reason": finish}])

    def usage_event(self, reply: Reply) -> bytes:
        return self._event([], {"usage": self._usage(reply)})

    def _event(self, choices, more=None):
        event = {**self.about, "object": "chat.completion.chunk", "choices": choices, **(more or {})}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

    def whole(self, reply: Reply) -> dict:
        reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        message = {"role": "assistant", "content": reply.content, **reasoning}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
        return {**self.about, "object": "chat.completion", "choices": [choice], "usage": self._usage(reply)}

    def _usage(self, reply):
        total = self.prompt_tokens + reply.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": reply.tokens, "total_tokens": total}


def finish_reason(reply: Reply) -> str:
    """ "stop" for an answer that came to its end, else "length"."""
    return "stop" if reply.ended else "length"


def describe_model(chat_model: ChatModel, options: Options, system: str) -> dict:
    """An entry of the list of models. `meta` is ours: what the page shows, and the values that hold unless a request sets others."""
    decoding = chat_model.decoding(options)
    meta = {
        "thinking": chat_model.thinks(options),
        "temperature": decoding.temperature if decoding.do_sample else 0,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "repetition_penalty": decoding.repetition_penalty,
        "max_tokens": options.max_new_tokens,
        "context": chat_model.context,
        "system": system,
        "single_questions": chat_model.record.get("conversations") == "single",
    }
    return {"id": chat_model.name, "object": "model", "created": 0, "owned_by": "local", "meta": meta}
