"""OpenAI's chat completions: what a request asks for, and an answer as clients expect it.

A field that would change the answer and that is not done here is refused by its name. Fields and their meaning:
https://platform.openai.com/docs/api-reference/chat/create; top_k, repetition_penalty and chat_template_kwargs are vLLM's.
"""

import json
import time
import uuid
from dataclasses import asdict, replace

from utils.chat.model import RULES, ChatModel, Options, Reply
from utils.errors import UserError
from utils.files import is_text
from utils.settings import read_number

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
