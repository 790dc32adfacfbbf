"""The chat as a server: OpenAI's chat completions over HTTP, who may ask, and what cannot be answered."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from chat_helpers import QUESTIONS, reference
from conftest import ROOT

from utils.chat.model import Options
from utils.chat.serve import make_server
from utils.errors import RunError
from utils.model.chat_format import encode_prompt
from utils.model.generate import read_answer

ASKED = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def serving(chat_model, system="", key="", host="127.0.0.1"):
    options = Options(None, 64)
    with make_server(chat_model, options, system, host, 0, key) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def port(chat_model):
    with serving(chat_model) as port:
        yield port


def ask(port, body, method="POST", path="/v1/chat/completions", **headers):
    """(status, headers, text) of one request; `body` a dict, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def expected(chat_model, messages=ASKED["messages"], length=12):
    prompt = encode_prompt(chat_model.tokenizer, messages)
    return prompt, read_answer(chat_model.tokenizer, prompt, reference(chat_model, prompt, length))


def test_models_are_listed(port, chat_model):
    status, _, text = ask(port, None, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == [chat_model.name]
    assert ask(port, None, "GET", "/v1/nothing")[0] == 404 and ask(port, ASKED, path="/v1/nothing")[0] == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_an_answer_as_a_whole(port, chat_model, path):
    status, _, text = ask(port, ASKED, path=path)
    answer = json.loads(text)
    prompt, reader = expected(chat_model)
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == chat_model.name
    assert answer["choices"][0]["message"]["content"] == reader.content
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
    }


def test_an_answer_piece_by_piece(port, chat_model):
    status, headers, text = ask(port, {**ASKED, "stream": True, "stream_options": {"include_usage": True}})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    events = [json.loads(event) for event in events]
    assert events.pop()["usage"]["completion_tokens"] == 12
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == expected(chat_model)[1].content
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_several_turns_parts_system_and_thinking(chat_model):
    system = [{"role": "system", "content": "你是中医。"}]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "甘"}, {"type": "text", "text": "草"}]},
        {"role": "assistant", "content": "甘。"},
        {"role": "user", "content": "合谷"},
    ]
    plain = [{**turns[0], "content": "甘草"}, *turns[1:]]
    with serving(chat_model, system=system[0]["content"]) as port:
        text = json.loads(ask(port, {**ASKED, "messages": turns})[2])
        assert text["choices"][0]["message"]["content"] == expected(chat_model, system + plain)[1].content
        own = [{"role": "developer", "content": "x"}, *turns]
        usage = json.loads(ask(port, {**ASKED, "messages": own})[2])["usage"]
        own = [{"role": "system", "content": "x"}, *plain]
        assert usage["prompt_tokens"] == len(encode_prompt(chat_model.tokenizer, own))
        off = {**ASKED, "messages": own, "chat_template_kwargs": {"enable_thinking": False}}
        usage = json.loads(ask(port, off)[2])["usage"]
        assert usage["prompt_tokens"] == len(encode_prompt(chat_model.tokenizer, own, False))


def test_the_same_seed_gives_the_same_answer(port):
    def said(**more):
        return json.loads(ask(port, {**ASKED, "temperature": 1, **more})[2])["choices"][0]["message"]

    assert said(seed=7) == said(seed=7) != said(seed=8)
    assert said() != said()


@pytest.mark.parametrize(
    "body, told",
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "wanted {"),
        ({"messages": []}, "the last message"),
        ({"messages": [3]}, "every message"),
        ({"messages": [{"role": "user", "content": None}]}, "every message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "every message"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "every message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message"),
        ({**ASKED, "temperature": 1e-40}, "temperature: wanted"),
        ({**ASKED, "temperature": "warm"}, "temperature: wanted"),
        ({**ASKED, "max_tokens": [1]}, "max_tokens: wanted"),
        ({**ASKED, "n": 2}, "not supported"),
        ({"messages": [{"role": "user", "content": "长" * 9000}]}, "the context window takes 4096"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_answered(port, body, told):
    status, _, text = ask(port, body)
    assert status == 400 and told in json.loads(text)["error"]["message"]
    assert ask(port, ASKED)[0] == 200


def test_a_body_that_is_too_large_is_not_read(port):
    assert ask(port, b"", Content_Length=str(1 << 40))[0] == 413


def test_a_bug_is_an_error_of_the_server(port, chat_model, monkeypatch):
    monkeypatch.setattr(type(chat_model), "encode", lambda *_: 1 / 0)
    assert ask(port, ASKED)[0] == 500


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "example.com"}, 403),
        ({"Host": "localhost:8000"}, 200),
    ],
)
def test_only_pages_of_this_machine_may_ask(port, headers, status):
    got, sent, _ = ask(port, ASKED, **headers)
    assert got == status
    allowed = sent.get("Access-Control-Allow-Origin")
    assert allowed == (headers.get("Origin") if status == 200 else None)
    assert ask(port, None, "OPTIONS", **headers)[0] == 204


def test_a_key_is_asked_for(chat_model):
    with serving(chat_model, key="secret") as port:
        assert ask(port, ASKED)[0] == ask(port, ASKED, Authorization="Bearer wrong")[0] == 401
        assert ask(port, None, "GET", "/v1/models", Authorization="Bearer 密".encode())[0] == 401
        status, headers, _ = ask(port, ASKED, Authorization="Bearer secret", Origin="https://example.com")
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://example.com"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(port, chat_model, stream, monkeypatch):
    begun, ended = threading.Event(), []
    answer = type(chat_model).answer

    def watched(self, prompt, options, show):
        def show_slowly(text, thinking):
            begun.set()
            time.sleep(0.02)
            show(text, thinking)

        ended.append(answer(self, prompt, options, show_slowly))  # not reached where the answer is broken off
        return ended[-1]

    monkeypatch.setattr(type(chat_model), "answer", watched)
    body = json.dumps({**ASKED, "max_tokens": 50, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        assert begun.wait(20)
    assert ask(port, ASKED)[0] == 200
    assert [reply.tokens for reply in ended] == [12]


def test_two_clients_at_once(port, chat_model):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(port, ASKED)[2])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = {json.loads(answer)["choices"][0]["message"]["content"] for answer in answers}
    assert said == {expected(chat_model)[1].content} and len(answers) == 3


def test_an_address_that_is_taken(chat_model, port):
    options = Options(None, 64)
    with pytest.raises(RunError, match="cannot be used .*; choose another --port"):
        make_server(chat_model, options, "", "127.0.0.1", port, "")


@pytest.mark.slow
def test_the_script_serves_until_ctrl_c(tiny_folder, tmp_path):
    command = [
        sys.executable,
        ROOT / "model_download/load_local_model.py",
        tiny_folder,
        "--serve",
        "--port",
        "0",
    ]
    server = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, encoding="utf-8"
    )
    for line in server.stderr:
        if found := re.search(r"http://127.0.0.1:(\d+)/v1 answers", line):
            break
    assert ask(int(found[1]), ASKED)[0] == 200
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 130 and "stopped by Ctrl-C" in server.stderr.read()
