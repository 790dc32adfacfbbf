"""`load_local_model.py --serve`, asked by OpenAI's own client: the answers of our chat, whole and in pieces."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from interop.conftest import TINY

from utils.model.chat_format import encode_prompt
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import generate_tokens, stop_tokens

QUESTION, KEY = "麻黄的药性是什么？", "hemlig nyckel"


@pytest.fixture
def port():
    words = ["--serve", "--port", 0, "--api-key", KEY, "--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, ROOT / "model_download/load_local_model.py", TINY, *words]
    server = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    said = ""
    while not (found := re.search(r"http://127.0.0.1:(\d+)/v1", said)):
        said += (line := server.stderr.readline())
        assert line, said
    yield found[1]
    server.send_signal(signal.SIGINT)
    assert server.wait(30) in (0, 130)


@pytest.mark.parametrize(
    "environment, asking", [("openai", "ask_openai.py"), ("openai_js", "ask_openai.cjs")]
)
def test_openai_client(run_in, port, environment, asking):
    found = run_in(environment, asking, port, KEY, QUESTION)
    tokenizer, model = load_tokenizer(str(TINY)), load_model(str(TINY), torch.float32).eval()
    messages = [{"role": "system", "content": "你是中医。"}, {"role": "user", "content": QUESTION}]
    prompt = encode_prompt(tokenizer, messages)
    [answer] = generate_tokens(model, [prompt], stop_tokens(model, tokenizer), 32)
    assert "".join(found["pieces"]) == found["whole"][0] and len(found["pieces"]) > 3
    assert found["whole"][0].strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert found["stopped"] == [found["whole"][0][:2], "stop"]
    assert found["models"] == ["model_download/tiny_qwen3_tcm"]
    assert found["usage"][0] == found["usage"][1] > len(prompt)
    [key, field] = found["refused"]
    assert key[0] == 401 and "wrong or no key" in key[1]
    assert field[0] == 400 and "logprobs is not supported" in field[1]
