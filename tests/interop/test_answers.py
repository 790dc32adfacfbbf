"""20 greedy answers of every kind of finished folder, in every tool, against those that chat gives."""

import pytest
from interop.conftest import MODELS

pytestmark = pytest.mark.parametrize("name", MODELS)


def same(answers, expected):
    assert len(answers) == len(expected) == 20 and len(set(expected)) > 10
    return sum(one == other for one, other in zip(answers, expected))


def whole(folder):
    """The stand-alone model of a run: of a LoRA run, merged/."""
    return folder / "merged" if (folder / "merged").is_dir() else folder


@pytest.mark.parametrize("environment", ["transformers4", ""], ids=["4.57", "5.23"])
def test_transformers(run_in, finished, questions, expected, name, environment):
    folder = whole(finished(name))
    assert same(run_in(environment, "ask_transformers.py", folder, questions), expected(folder)) == 20


def test_mlx_lm_with_the_run_itself(run_in, finished, questions, expected, name):
    folder = whole(finished(name))
    assert same(run_in("mlx", "ask_mlx.py", folder, questions), expected(folder)) == 20


def test_mlx_lm_with_the_export(run_in, exported, questions, expected, name):
    """It computes in bfloat16 here, which decides now and then between two likely tokens."""
    folder = exported(name, "folder")
    assert same(run_in("mlx", "ask_mlx.py", folder, questions), expected(folder)) >= 18


def test_vllm(run_in, exported, questions, expected, name):
    folder = exported(name, "folder")
    assert same(run_in("vllm", "ask_vllm.py", folder, questions), expected(folder)) == 20


@pytest.mark.parametrize("precision, least", [("f16", 20), ("bf16", 18), ("q8_0", 18)])
def test_llama_cpp(run_in, exported, finished, questions, expected, name, precision, least):
    [file] = exported(name, "gguf", precision).glob("*.gguf")
    answers = run_in("llamacpp", "ask_llamacpp.py", file, questions)
    assert same(answers, expected(whole(finished(name)))) >= least


def test_peft_from_another_working_directory(run_in, exported, questions, expected, finished, name):
    if name != "lora":
        pytest.skip("not an adapter")
    folder = exported(name, "adapter")
    assert same(run_in("", "ask_peft.py", folder, questions), expected(finished(name))) == 20
