"""The chat as a server: OpenAI's chat completions over HTTP, who may ask, and what cannot be answered."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from chat_helpers import QUESTIONS, Echo, reference
from conftest import ROOT

from utils.chat import serve
from utils.chat.model import Options, Reply
from utils.chat.serve import Server
from utils.errors import RunError
from utils.model.chat_format import encode_prompt
from utils.model.generate import read_answer

ASKED = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def serving(*models, key="", file_pages=False):
    with Server(models, Options(numbers={"max_new_tokens": 64}), "127.0.0.1", 0, key, file_pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def port(chat_model):
    with serving(chat_model) as port:
        yield port


def ask(port, body, method="POST", path="/v1/chat/completions", **headers):
    """(status, headers, text) of one request; `body` a dict, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def said(port, **more):
    """The JSON that answers ASKED, changed so."""
    return json.loads(ask(port, {**ASKED, **more})[2])


def content(answer):
    return answer["choices"][0]["message"]["content"]


def streamed(port, **more):
    """(the events of the same as a stream, the text in them)."""
    status, headers, text = ask(port, {**ASKED, **more, "stream": True})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    assert text.endswith("data: [DONE]\n\n")
    events = [json.loads(event) for event in re.findall("^data: ({.*)$", text, re.MULTILINE)]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    return events, "".join(delta.get("content", "") for delta in deltas)


def expected(chat_model, messages=ASKED["messages"], length=12):
    prompt = encode_prompt(chat_model.tokenizer, messages)
    return prompt, read_answer(chat_model.tokenizer, prompt, reference(chat_model, prompt, length)).content


# ---- Answers


def test_an_answer_whole_and_piece_by_piece(port, chat_model):
    answer, same = (json.loads(ask(port, ASKED, path=f"{base}/chat/completions")[2]) for base in ("/v1", ""))
    prompt, text = expected(chat_model)
    assert answer["choices"] == same["choices"] and answer["model"] == chat_model.name
    assert content(answer) == text and answer["choices"][0]["finish_reason"] == "length"
    tokens = {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}
    assert answer["usage"] == tokens

    events, pieces = streamed(port, stream_options={"include_usage": True})
    assert pieces == text and events.pop()["usage"] == tokens
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}
    assert len({event["id"] for event in events}) == 1


def test_several_turns_parts_system_and_thinking(port, chat_model, monkeypatch):
    system = [{"role": "system", "content": "你是中医。"}]
    parts = [{"type": "text", "text": "甘"}, {"type": "text", "text": "草"}]
    turns = [{"role": "assistant", "content": "甘。"}, {"role": "user", "content": "合谷"}]
    turns, plain = [{"role": "user", "content": parts}, *turns], [{"role": "user", "content": "甘草"}, *turns]
    monkeypatch.setattr(chat_model, "system", system[0]["content"])
    assert content(said(port, messages=turns)) == expected(chat_model, system + plain)[1]
    own, same = [{"role": role, "content": "x"} for role in ("developer", "system")]
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    for more, thinking in (({}, None), ({"enable_thinking": False}, False), (kwargs, False)):
        tokens = said(port, messages=[own, *turns], **more)["usage"]["prompt_tokens"]
        assert tokens == len(encode_prompt(chat_model.tokenizer, [same, *plain], thinking))


def test_settings_of_a_request(port, chat_model):
    seeds = [{"seed": 7}, {"seed": 7}, {"seed": 8}, {}, {}]
    texts = [content(said(port, temperature=1, **seed)) for seed in seeds]
    assert texts[0] == texts[1] != texts[2] and texts[3] != texts[4]
    plain = content(said(port, max_tokens=40))
    assert content(said(port, max_tokens=40, repetition_penalty=1.5)) != plain
    assert said(port, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    neutral = dict(n=1, logprobs=False, min_p=0, response_format={"type": "text"}, tools=[], logit_bias={})
    harmless = dict(user="我", metadata={"a": "b"}, presence_penalty=0, parallel_tool_calls=True, stop=None)
    assert content(said(port, **neutral, **harmless)) == expected(chat_model)[1]


def test_a_stop_text_ends_an_answer(port, chat_model):
    whole = expected(chat_model)[1]
    before = whole[: whole.index(whole[3:5])]
    for stop, kept, end in (
        (whole[3:5], before, "stop"),
        (["没有这个", whole[3:5], whole[5:9]], before, "stop"),
        (whole[-3:] + "。", whole, "length"),  # it begins, and does not come
    ):
        answer, (events, pieces) = said(port, stop=stop), streamed(port, stop=stop)
        assert content(answer) == pieces == kept
        assert answer["choices"][0]["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == end


NOT_DONE = dict(n=2, response_format={"type": "json_object"}, logprobs=True, logit_bias={"100": -100})
NOT_DONE |= dict(presence_penalty=1, frequency_penalty=-0.5, reasoning_effort="high", something_new="x")
NOT_DONE |= dict(min_p=0.1, tools=[{"type": "function"}], chat_template_kwargs=3)
CALL = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}
NO_TEXT = [None, "\ud800", [{"type": "image_url", "image_url": {"url": "x"}}]]
WRONG = [
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "wanted {"),
    *[({"messages": [one]}, "every message is wanted as") for one in (3, {"role": "tool", "content": "a"})],
    *[({"messages": [{"role": "user", "content": value}]}, "that are no text") for value in NO_TEXT],
    *[({"messages": messages}, "the last message") for messages in ([], [{**CALL, "tool_calls": []}])],
    ({"messages": [CALL]}, "tool_calls is not supported"),
    ({"messages": [{"role": "user", "content": "长" * 9000}]}, "the context window takes 4096"),
    *[({**ASKED, name: value}, f"{name} is not supported") for name, value in NOT_DONE.items()],
    ({**ASKED, "chat_template_kwargs": {"thinking_budget": 9}}, "chat_template_kwargs.thinking_budget is"),
    ({**ASKED, "enable_thinking": "yes"}, "enable_thinking: wanted true or false"),
    ({**ASKED, "stream": 1}, "stream: wanted true or false"),
    *[({**ASKED, "stop": stop}, "stop: wanted a text, or") for stop in ([""], {"a": 1})],
    ({**ASKED, "temperature": 11}, "temperature is 11.0, wanted a number: 0 to 10"),
    ({**ASKED, "temperature": "warm"}, "temperature is 'warm', wanted"),
    ({**ASKED, "max_tokens": [1]}, "max_tokens is [1], wanted"),
]


def test_what_cannot_be_answered(port, capsys):
    for body, told in WRONG:
        status, _, text = ask(port, body)
        assert status == 400 and told in json.loads(text)["error"]["message"], (body, text)
        assert capsys.readouterr().err.count("refused (400) POST") == 1
    assert ask(port, ASKED)[0] == 200


def test_two_models(chat_model, port):
    with serving(chat_model, Echo(chat_model, single=True)) as two:
        listed = json.loads(ask(two, None, "GET", "/v1/models")[2])["data"]
        assert [model["id"] for model in listed] == [chat_model.name, "echo"]
        assert [model["meta"]["single_questions"] for model in listed] == [False, True]
        assert content(said(two, model="echo")) == "答1" and said(two)["model"] == chat_model.name
        status, _, text = ask(two, {**ASKED, "model": "gpt-4"})
        assert status == 404 and f"wanted {chat_model.name} or echo" in text
    # the only model answers, whatever an app calls it
    assert said(port, model="gpt-4")["model"] == said(port, model=[3])["model"] == chat_model.name


# ---- HTTP


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def send(port, raw):
    """The answer to bytes as they are, up to the end of its connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=180) as client:
        client.sendall(raw)
        return client.makefile("rb").read().decode()


def test_a_body_in_chunks(port, chat_model):
    body = json.dumps(ASKED).encode()
    chunks = b"%x\r\n%b\r\n" % (9, body[:9]) + b"%X;name=value\r\n%b\r\n" % (len(body) - 9, body[9:])
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = send(port, head + chunks + b"0\r\nTrailer: x\r\n\r\n")
    assert content(json.loads(answer.partition("\r\n\r\n")[2])) == expected(chat_model)[1]


def test_what_is_no_request(port, capsys):
    chunked = b"Transfer-Encoding: chunked\r\n"
    for head in (
        chunked + b"\r\nx\r\n",
        chunked + b"\r\n-5\r\n",
        chunked + b"\r\n2\r\nabcd\r\n",
        chunked + b"\r\nfffffff\r\n",
        chunked + b"Content-Length: 5\r\n\r\n",
        b"Transfer-Encoding: gzip\r\n\r\n",
        b"Content-Length: 1099511627776\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"\r\n",
    ):
        assert "HTTP/1.1 400 " in send(port, HEAD + head)
        assert (
            capsys.readouterr().err.count("refused (400) POST /v1/chat/completions HTTP/1.1: wanted a body")
            == 1
        )
    assert "Bad request syntax" in send(port, b"nonsense\r\n\r\n")
    assert ask(port, None, "DELETE")[0] == 501
    assert capsys.readouterr().err.count("refused (") == 2 and ask(port, ASKED)[0] == 200


def test_the_page_runs_its_own_script_and_no_file_is_reached(port):
    status, headers, text = ask(port, None, "GET", "/?a=b")
    rules = headers["Content-Security-Policy"]
    assert status == 200 and "<textarea" in text and rules.startswith("default-src 'none'")
    [once] = re.findall('<script nonce="(.*?)">', text)
    assert f"script-src 'nonce-{once}';" in rules and once not in ask(port, None, "GET", "/")[2]
    assert not re.findall(r"(?:src|href)=\"(?!data:)|innerHTML|https?://|eval\(", text)
    for path in "/page.html /../serve.py //etc/passwd /v1/../etc/passwd /%2e%2e/serve.py /v1/nothing".split():
        for method, body in (("GET", None), ("POST", ASKED)):
            status, _, text = ask(port, body, method, path)
            assert status == 404 and list(json.loads(text)) == ["error"]


def test_who_may_ask(port, chat_model):
    page, foreign = {"Origin": "http://localhost:3000"}, {"Origin": "https://example.com"}
    file, key = {"Origin": "null"}, {"Authorization": "Bearer secret"}
    wants = "authorization,content-type,x-stainless-os,x-stainless-helper-method"
    with serving(chat_model, file_pages=True) as files, serving(chat_model, key="secret") as keyed:
        for where, headers, status in (
            (port, {}, 200),
            (port, page, 200),
            (port, {"Origin": "http://127.0.0.1"}, 200),
            (port, {"Host": "localhost:8000"}, 200),
            (port, foreign, 403),
            (port, file, 403),
            (port, {"Host": "example.com"}, 403),
            (files, file, 200),
            (files, foreign, 403),
            (keyed, {}, 401),
            (keyed, {"Authorization": "Bearer 密".encode()}, 401),
            (keyed, key | foreign, 200),
        ):
            got, sent, _ = ask(where, ASKED, **headers)
            assert got == status == ask(where, None, "GET", "/v1/models", **headers)[0], headers
            origin = headers.get("Origin") if status == 200 else None
            assert sent.get("Access-Control-Allow-Origin") == origin
            # A browser asks first what it may send, without the key.
            got, sent, _ = ask(where, None, "OPTIONS", **headers, Access_Control_Request_Headers=wants)
            assert got == (403 if status == 403 else 204)
            assert sent["Access-Control-Allow-Headers"] == (None if status == 403 else wants)
            assert got == 403 or "POST" in sent["Access-Control-Allow-Methods"]


# ---- Several clients, and those that leave


def leave(port, **more):
    """Ask, and leave without waiting for the answer."""
    body = json.dumps({**ASKED, **more}).encode()
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    return client


def test_a_client_that_leaves_is_not_answered(chat_model, monkeypatch):
    model, begun, go_on, ended = Echo(chat_model), threading.Event(), threading.Event(), []

    def answer(prompt, options, show):
        begun.set()
        for _ in range(options.limit):
            go_on.wait(180)
            time.sleep(0.01)
            show("甘", False)
        ended.append(options.limit)  # not reached where the answer is broken off
        return Reply("甘", "", options.limit, 0.1, 1.0, "length")

    monkeypatch.setattr(model, "answer", answer)
    with serving(model) as port, ThreadPoolExecutor(3) as pool:
        for stream in (True, False):
            go_on.clear()
            begun.clear()
            first = leave(port, max_tokens=2000, stream=stream)
            assert begun.wait(180)
            leave(port, max_tokens=5).close()  # while the other is answered
            first.close()
            go_on.set()
            asked = [pool.submit(ask, port, ASKED) for _ in range(3)]  # one answer at a time
            assert [one.result()[0] for one in asked] == 3 * [200]
    assert ended == 6 * [12]


def test_a_bug_an_address_that_is_taken_and_a_refusal_that_nobody_reads(
    port, chat_model, monkeypatch, capsys
):
    monkeypatch.setattr(type(chat_model), "encode", lambda *_: 1 / 0)
    assert ask(port, ASKED)[0] == 500
    with pytest.raises(RunError, match="cannot be used .*; choose another --port"):
        Server([chat_model], Options(), "127.0.0.1", port, "", False)
    capsys.readouterr()
    monkeypatch.setattr(serve._Handler, "_send", Mock(side_effect=BrokenPipeError))
    assert send(port, b"nonsense\r\n\r\n") == send(port, HEAD + b"\r\n") == ""
    said = capsys.readouterr().err
    assert said.count("refused (400)") == 2 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts the script in a forked process")
def test_the_script_serves_until_ctrl_c(tiny_folder, tmp_path):
    from processes import Script

    words = ["model_download/load_local_model.py", tiny_folder, "--serve", "--port", "0"]
    server, address = Script(words, ROOT, tmp_path, ready=True), r"http://127.0.0.1:(\d+)/v1 answers"
    server.wait_for(lambda: re.search(address, server.err))
    found = re.search(address, server.err)
    assert ask(int(found[1]), ASKED)[0] == 200
    if curl := shutil.which("curl"):
        words = ["-s", f"http://127.0.0.1:{found[1]}/v1/chat/completions", "-H", "Transfer-Encoding: chunked"]
        body = json.dumps(ASKED).encode()
        done = subprocess.run([curl, *words, "-d", "@-"], input=body, stdout=subprocess.PIPE)
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 12
    server.kill(signal.SIGINT)
    assert server.end() == 130 and "stopped by Ctrl-C" in server.err
