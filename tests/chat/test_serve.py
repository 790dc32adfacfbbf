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
from chat_helpers import QUESTIONS, Echo, reference
from conftest import ROOT

from utils.chat.model import Options, before_stop
from utils.chat.serve import Serving, make_server
from utils.errors import RunError
from utils.model.chat_format import encode_prompt
from utils.model.generate import read_answer

ASKED = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def serving(*models, system="", key="", file_pages=False):
    served = Serving(list(models), [system] * len(models), Options(None, 64), key, file_pages)
    with make_server(served, "127.0.0.1", 0) as server:
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
        ({**ASKED, "temperature": 11}, "temperature is 11.0, wanted a number: 0 to 10"),
        ({**ASKED, "temperature": "warm"}, "temperature is 'warm', wanted"),
        ({**ASKED, "max_tokens": [1]}, "max_tokens is [1], wanted"),
        ({**ASKED, "n": 2}, "n is not supported"),
        ({**ASKED, "response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({**ASKED, "logprobs": True}, "logprobs is not supported"),
        ({**ASKED, "logit_bias": {"100": -100}}, "logit_bias is not supported"),
        ({**ASKED, "min_p": 0.1}, "min_p is not supported"),
        ({**ASKED, "reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({**ASKED, "tools": [{"type": "function"}]}, "tools is not supported"),
        (
            {**ASKED, "chat_template_kwargs": {"thinking_budget": 9}},
            "chat_template_kwargs.thinking_budget is",
        ),
        ({**ASKED, "chat_template_kwargs": 3}, "chat_template_kwargs is not supported"),
        ({**ASKED, "enable_thinking": "yes"}, "enable_thinking: wanted true or false"),
        ({**ASKED, "stream": 1}, "stream: wanted true or false"),
        ({**ASKED, "stop": [""]}, "stop: wanted a text, or a list of up to 16 texts"),
        ({**ASKED, "stop": ["a"] * 17}, "stop: wanted"),
        ({**ASKED, "stop": {"a": 1}}, "stop: wanted"),
        ({**ASKED, "presence_penalty": 3}, "presence_penalty is 3.0, wanted a number: -2 to 2"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "content parts of type 'image_url' are not supported here, only text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "tool_calls is not supported",
        ),
        ({"messages": [{"role": "user", "content": "长" * 9000}]}, "the context window takes 4096"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_answered(port, body, told):
    status, _, text = ask(port, body)
    assert status == 400 and told in json.loads(text)["error"]["message"]
    assert ask(port, ASKED)[0] == 200


def test_fields_that_ask_for_nothing(port, chat_model):
    neutral = {
        "n": 1,
        "logprobs": False,
        "min_p": 0,
        "response_format": {"type": "text"},
        "tools": [],
        "stop": None,
    }
    harmless = {
        "user": "我",
        "metadata": {"a": "b"},
        "logit_bias": {},
        "presence_penalty": 0,
        "parallel_tool_calls": True,
    }
    text = ask(port, {**ASKED, **neutral, **harmless})[2]
    assert json.loads(text)["choices"][0]["message"]["content"] == expected(chat_model)[1].content


def test_the_end_of_an_answer(port, chat_model):
    """A stop text ends it, whole and streamed; max_completion_tokens is another name of the limit."""
    whole = expected(chat_model)[1].content
    middle = whole[3:5]
    for stop in (middle, ["没有这个", middle, whole[5:9]]):
        choice = json.loads(ask(port, {**ASKED, "stop": stop})[2])["choices"][0]
        assert choice["message"]["content"] == whole[: whole.index(middle)]
        assert choice["finish_reason"] == "stop"
        pieces = ask(port, {**ASKED, "stop": stop, "stream": True})[2]
        deltas = [
            json.loads(found)["choices"][0] for found in re.findall("^data: ({.*)$", pieces, re.MULTILINE)
        ]
        assert (
            "".join(choice["delta"].get("content", "") for choice in deltas) == choice["message"]["content"]
        )
        assert deltas[-1]["finish_reason"] == "stop"
    short = {"messages": ASKED["messages"], "temperature": 0, "max_completion_tokens": 3}
    assert json.loads(ask(port, short)[2])["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "text, stops, last, before, found",
    [
        ("abcd", ("bc",), False, "a", True),
        ("ab", ("bc",), False, "a", False),  # b may begin it
        ("ab", ("bc",), True, "ab", False),
        ("abx", ("bc",), False, "abx", False),
        ("aaa", ("aab",), False, "a", False),
        ("abcd", ("d", "bc"), False, "a", True),
        ("ab", ("xyz", "b"), False, "a", True),
    ],
)
def test_what_may_begin_a_stop_is_held_back(text, stops, last, before, found):
    assert before_stop(text, stops, last) == (before, found)


def test_thinking_and_penalties(port, chat_model):
    def asked(**more):
        return json.loads(ask(port, {**ASKED, **more})[2])

    off = len(encode_prompt(chat_model.tokenizer, ASKED["messages"], False))
    assert asked(enable_thinking=False)["usage"]["prompt_tokens"] == off
    answers = [asked(**{name: 2, "max_tokens": 40}) for name in ("presence_penalty", "frequency_penalty")]
    answers += [asked(repetition_penalty=1.5, max_tokens=40)]
    assert asked(max_tokens=40)["choices"] not in [answer["choices"] for answer in answers]


# ---- HTTP


def send(port, *raw):
    """The answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        for piece in raw:
            client.sendall(piece)
        answer = client.makefile("rb")
        status = int(answer.readline().split()[1])
        length = next(
            int(line.split(b":")[1]) for line in answer if line.lower().startswith(b"content-length")
        )
        while answer.readline().strip():
            """The rest of the head."""
        return status, answer.read(length).decode()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def test_a_body_in_chunks(port, chat_model):
    body = json.dumps(ASKED).encode()
    chunks = b"%x\r\n%b\r\n" % (9, body[:9]) + b"%X;name=value\r\n%b\r\n" % (len(body) - 9, body[9:])
    status, text = send(
        port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"0\r\nTrailer: x\r\n\r\n"
    )
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == expected(chat_model)[1].content


@pytest.mark.parametrize(
    "head, status",
    [
        (b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", 413),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (b"Content-Length: 1099511627776\r\n\r\n", 413),
        (b"Content-Length: -1\r\n\r\n", 400),
        (b"\r\n", 400),
    ],
)
def test_a_body_that_is_broken_or_too_large(port, head, status, capsys):
    assert send(port, HEAD + head)[0] == status
    assert capsys.readouterr().err.count(f"refused ({status}) POST /v1/chat/completions") == 1
    assert ask(port, ASKED)[0] == 200


def test_what_is_no_request(port, capsys):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert b"Bad request syntax" in client.recv(1000)
    assert ask(port, None, "DELETE")[0] == 501
    assert capsys.readouterr().err.count("refused (") == 2


def test_a_browser_may_send_the_headers_it_asks_for(port):
    asked = "authorization,content-type,x-stainless-os,x-stainless-helper-method"
    headers = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": asked}
    status, sent, _ = ask(port, None, "OPTIONS", Origin="http://localhost:3000", **headers)
    assert (status, sent["Access-Control-Allow-Headers"]) == (204, asked)
    assert (
        sent["Access-Control-Allow-Origin"] == "http://localhost:3000"
        and "POST" in sent["Access-Control-Allow-Methods"]
    )
    status, sent, _ = ask(port, None, "OPTIONS", Origin="https://example.com", **headers)
    assert status == 403 and not sent["Access-Control-Allow-Headers"]


def test_a_page_from_a_file_may_ask_if_that_is_wanted(chat_model, capsys):
    with serving(chat_model, file_pages=True) as port:
        status, sent, _ = ask(port, ASKED, Origin="null")
        assert status == 200 and sent["Access-Control-Allow-Origin"] == "null"
        assert ask(port, ASKED, Origin="https://example.com")[0] == 403
    assert "refused (403)" in capsys.readouterr().err


def test_two_models(chat_model):
    other = Echo(chat_model, record={"conversations": "single"})
    with serving(chat_model, other) as port:
        listed = json.loads(ask(port, None, "GET", "/v1/models")[2])["data"]
        assert [model["id"] for model in listed] == [chat_model.name, "echo"]
        assert [model["meta"]["single_questions"] for model in listed] == [False, True]
        assert (
            json.loads(ask(port, {**ASKED, "model": "echo"})[2])["choices"][0]["message"]["content"] == "答1"
        )
        assert json.loads(ask(port, ASKED)[2])["model"] == chat_model.name
        status, _, text = ask(port, {**ASKED, "model": "gpt-4"})
        assert status == 404 and f"wanted {chat_model.name} or echo" in text
    with serving(chat_model) as port:  # the only model answers, whatever an app calls it
        assert json.loads(ask(port, {**ASKED, "model": "gpt-4"})[2])["model"] == chat_model.name


@pytest.mark.parametrize("path", ["/", "/?a=b"])
def test_the_page_runs_nothing_but_its_own_script(port, path):
    status, headers, text = ask(port, None, "GET", path)
    rules = headers["Content-Security-Policy"]
    assert status == 200 and "<textarea" in text and rules.startswith("default-src 'none'")
    [once] = re.findall('<script nonce="(.*?)">', text)
    assert f"script-src 'nonce-{once}';" in rules and once not in ask(port, None, "GET", path)[2]
    assert not re.findall(r"(?:src|href)=\"(?!data:)|innerHTML|https?://|eval\(", text)


@pytest.mark.parametrize(
    "path",
    ["/page.html", "/../serve.py", "//etc/passwd", "/v1/../etc/passwd", "/%2e%2e/serve.py", "/v1/models/x"],
)
def test_no_file_of_the_machine_is_reached(port, path):
    status, _, text = ask(port, None, "GET", path)
    assert status == 404 and list(json.loads(text)) == ["error"]


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
    assert ask(port, None, "OPTIONS", **headers)[0] == (204 if status == 200 else 403)


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
    with pytest.raises(RunError, match="cannot be used .*; choose another --port"):
        make_server(Serving([chat_model], [""], Options()), "127.0.0.1", port)


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
