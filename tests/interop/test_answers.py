"""20 greedy answers of every kind of finished folder, in every tool, against those that chat gives."""

import pytest
from interop.conftest import MODELS

# environment, script, what is asked ("": the run itself), its number format, answers that have to be the same. In bfloat16 a tool
# decides now and then otherwise between two likely tokens.
TOOLS = {
    "transformers 4": ("transformers4", "ask_transformers.py", "", "", 20),
    "transformers 5": ("", "ask_transformers.py", "", "", 20),
    "PEFT": ("", "ask_transformers.py", "adapter", "", 20),
    "mlx-lm": ("mlx", "ask_mlx.py", "", "", 20),
    "mlx-lm, export": ("mlx", "ask_mlx.py", "folder", "", 18),
    "vLLM": ("vllm", "ask_vllm.py", "folder", "", 20),
    "llama.cpp, f16": ("llamacpp", "ask_llamacpp.py", "gguf", "f16", 20),
    "llama.cpp, bf16": ("llamacpp", "ask_llamacpp.py", "gguf", "bf16", 18),
    "llama.cpp, q8_0": ("llamacpp", "ask_llamacpp.py", "gguf", "q8_0", 18),
}
ASKED = [(tool, name) for tool in TOOLS for name in MODELS if tool != "PEFT" or name == "lora"]


@pytest.mark.parametrize("tool, name", ASKED)
def test_a_tool_answers_as_chat_does(run_in, exported, finished, questions, expected, tool, name):
    environment, script, kind, precision, least = TOOLS[tool]
    run = finished(name)
    whole = run / "merged" if (run / "merged").is_dir() else run
    asked = exported(name, kind, precision) if kind else whole
    file = next(asked.glob("*.gguf")) if kind == "gguf" else asked
    answers = run_in(environment, script, file, questions)
    wanted = expected(asked if kind == "folder" else whole)
    assert len(answers) == len(wanted) == 20 and len(set(wanted)) > 10
    assert sum(one == other for one, other in zip(answers, wanted)) >= least
