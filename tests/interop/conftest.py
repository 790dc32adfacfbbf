"""Finished folders of all kinds, and the other tools in their own environments, asked from another working directory."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from interop.environments import NODE, PLACE, python_of, reason_not_to

from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.model.chat_format import encode_prompt
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import generate_tokens, stop_tokens

TINY = ROOT / "model_download/tiny_qwen3_tcm"
SMALL = "--epochs 1 --max-length 512 --rows-per-step 2 --max-steps 160 --eval-rows 100".split()
MODELS = ("sft", "lora", "dpo", "thinking")
PIPES = {"capture_output": True, "text": True, "encoding": "utf-8"}


def pytest_collection_modifyitems(items):
    """All are slow ones, and wait for `make test-interop`: they train four models before the first tool is asked."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if not PLACE.is_dir():
                item.add_marker(pytest.mark.skip(reason="make test-interop makes the environments first"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Data as the demo has it (raw/, qwen3/), the same rows with reasoning (thinking/), and what is exported."""
    place = tmp_path_factory.mktemp("interop")
    data, raw = place / "qwen3", place / "raw"
    script("data_prepare/download_tcm_data.py", "--dataset", "sample", "--output-dir", raw)
    words = ["--input-files", raw, "--output-dir", data, "--tokenizer-model", TINY]
    script("data_prepare/convert_to_qwen3_format.py", *words)
    words = ["--input-dir", data, "--output-dir", data, "--max-train", 300, "--max-eval", 50]
    script("data_prepare/build_preference_pairs.py", *words)
    for split in ("train", "eval"):
        rows = list(read_jsonl(data / f"sft_{split}.jsonl"))
        for row in rows:
            question, answer = row["messages"][-2:]
            answer["reasoning_content"] = f"问的是：{question['content'].splitlines()[0]}"
        write_jsonl(place / f"thinking/sft_{split}.jsonl", rows)
    return place


@pytest.fixture(scope="session")
def finished(place):
    """finished("dpo") -> the folder of a finished run, trained once a session."""

    @functools.cache
    def finished(name):
        data, method = (
            place / ("thinking" if name == "thinking" else "qwen3"),
            name.replace("thinking", "sft"),
        )
        base, rate, more = TINY, {"lora": 2e-3, "dpo": 1e-4}.get(name, 5e-4), []
        if name == "dpo":
            base, more = finished("sft"), ["--sft-weight", 1]
        rows = "dpo" if name == "dpo" else "sft"
        words = ["--train-file", data / f"{rows}_train.jsonl", "--eval-file", data / f"{rows}_eval.jsonl"]
        words += ["--model", base, "--output-dir", place / name, "--learning-rate", rate, *SMALL, *more]
        script(f"model_finetune/finetune_{method}.py", *words)
        return place / name

    return finished


@pytest.fixture(scope="session")
def exported(place, finished):
    """exported("dpo", "gguf", "f16") -> the folder of an export. gguf comes from llama.cpp's environment."""

    def exported(name, kind, precision=""):
        if kind == "gguf" and reason_not_to("llamacpp"):
            pytest.skip(reason_not_to("llamacpp"))
        output = place / f"{name}-{kind}-{precision}"
        if not output.is_dir():
            words = [finished(name), "--format", kind, "--output-dir", output, "--eval-file", ""]
            words += ["--precision", precision] if precision else []
            script("model_download/export_model.py", *words)
        return output

    return exported


@pytest.fixture(scope="session")
def questions(place):
    """20 held-out questions, in a file for the tools."""
    rows = list(read_jsonl(place / "qwen3/sft_eval.jsonl"))[:200:10]
    write_json(place / "questions.json", [row["messages"][-2]["content"] for row in rows])
    return place / "questions.json"


@pytest.fixture(scope="session")
def expected(questions):
    """expected(folder) -> the greedy answers that chat gives with that folder, in float32."""

    def expected(folder):
        tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.float32).eval()
        asked = [[{"role": "user", "content": question}] for question in read_json(questions)]
        prompts = [encode_prompt(tokenizer, messages) for messages in asked]
        answers = generate_tokens(model, prompts, stop_tokens(model, tokenizer), 64)
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    return expected


@pytest.fixture
def run_in(tmp_path):
    """run_in("mlx", "ask_mlx.py", argument, ...) -> what that script prints as JSON, in the tool's environment; "" is ours."""

    def run_in(environment, name, *arguments):
        if environment and reason_not_to(environment):
            pytest.skip(reason_not_to(environment))
        python = python_of(environment) if environment else sys.executable
        command = [python, Path(__file__).with_name(name), *arguments]
        if environment in NODE:
            command = ["node", Path(__file__).with_name(name), PLACE / environment, *arguments]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        # GiB; vLLM logs on stdout
        quiet |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env={**os.environ, **quiet}, **PIPES)
        assert done.returncode == 0, done.stderr[-3000:]
        # vLLM logs on stdout as well, before and after
        return json.loads([line for line in done.stdout.splitlines() if line.startswith(("[", "{"))][-1])

    return run_in


def script(name, *arguments):
    """A script of ours in a process of its own, which also finds gguf where only llama.cpp's environment has it."""
    sites = [str(path) for path in (PLACE / "llamacpp").glob("[Ll]ib/**/site-packages")]
    start = f"import runpy, sys; sys.path += {sites}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, ROOT / name, *arguments]
    done = subprocess.run([*map(str, command)], **PIPES)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
