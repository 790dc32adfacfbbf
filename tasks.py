"""The project's commands for any machine: the environment, the demo, the tests. With make, `make demo` is the same.

    python3.11 tasks.py demo        (in PowerShell: py -3.11 tasks.py demo)

Needs nothing but Python. The commands make the environment .venv where it is missing, and run in it: nothing has to be
activated. `python3.11 tasks.py help` lists them.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # what the packages in requirements.txt have builds for
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"  # builds of torch for NVIDIA GPUs, also for Windows
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
INSTALLED = VENV / ".installed"  # a copy of the requirements.txt that the environment was made from

# ---- The demo: the commands that a user would type, each with its title above it
TINY = "model_download/tiny_qwen3_tcm"
DEMO = "trainer_output/demo"
DATA = DEMO + "/qwen3"
# A model of 5.2 M parameters takes far larger rates than one of 0.6 B, and shorter rows.
SMALL = "--max-length 512 --rows-per-step 2"
QUESTION = "牛膝有哪些功效？"
# About what the demo's rows never asked about.
SUGGESTED = """\
牛膝有哪些功效？
白术的功效是什么？
三阴交穴主治哪些病症？
命门穴在身体哪里？
麻黄归哪些经？
陈皮是什么味道的药？
麻黄汤出自哪部医书？
天麻是什么性的药？
请说出肝郁脾虚证的治则。
请问陈皮是哪类药？"""
INTRODUCTION = f"""\
This demo fine-tunes a tiny Qwen3 of 5.2 M parameters, pre-trained on the built-in sample, not Qwen3-0.6B: the same
scripts, the same steps, minutes instead of hours. Everything lands in {DEMO}/."""
STEPS = f"""\
# the built-in TCM sample, as if downloaded
python data_prepare/download_tcm_data.py --dataset sample --output-dir {DEMO}/raw

# convert it to Qwen3's chat format
python data_prepare/convert_to_qwen3_format.py --input-files {DEMO}/raw --output-dir {DATA} --tokenizer-model {TINY}

# full fine-tuning (SFT)
python model_finetune/finetune_sft.py --model {TINY} --output-dir {DEMO}/sft_finetuned
    --train-file {DATA}/sft_train.jsonl --eval-file {DATA}/sft_eval.jsonl
    {SMALL} --epochs 1 --join-single 0.3 --learning-rate 5e-4 --train-embeddings False

# LoRA fine-tuning of the same base, on half of the rows
python model_finetune/finetune_lora.py --model {TINY} --output-dir {DEMO}/lora_finetuned
    --train-file {DATA}/sft_train.jsonl --eval-file {DATA}/sft_eval.jsonl
    {SMALL} --epochs 0.5 --join-single 0.3 --learning-rate 2e-3

# DPO, from the SFT result: who asks what a herb does is to be told its caution, too
python model_finetune/finetune_dpo.py --model {DEMO}/sft_finetuned --output-dir {DEMO}/dpo_finetuned
    --train-file {DATA}/dpo_train.jsonl --eval-file {DATA}/dpo_eval.jsonl
    {SMALL} --rows-per-step 1 --learning-rate 5e-5 --sft-weight 5

# compare them on held-out herbs, formulas, points and syndromes
python model_finetune/compare_models.py --output-dir {DEMO}
    --models {TINY} {DEMO}/sft_finetuned {DEMO}/lora_finetuned {DEMO}/dpo_finetuned
    --eval-file {DATA}/sft_eval.jsonl --exam-file {DATA}/exam.jsonl --pairs-file {DATA}/dpo_eval.jsonl
    --general-file "" --eval-rows 400 --letter-rows -1 --generate 400 --follow-ups 150 --batch-size 128

# ask the SFT result a question
# > {QUESTION}
python model_download/load_local_model.py {DEMO}/sft_finetuned --prompt {QUESTION}

# ask the DPO result the same
# > {QUESTION}
python model_download/load_local_model.py {DEMO}/dpo_finetuned --prompt {QUESTION}
"""


def demo_steps() -> list:
    """[(title, [script, argument, ...]), ...] of STEPS."""
    steps = []
    for block in STEPS.split("\n\n"):
        lines = block.splitlines()
        title = "\n".join(line[2:] for line in lines if line.startswith("# "))
        command = " ".join(line for line in lines if not line.startswith("# "))
        steps.append((title, shlex.split(command)[1:]))
    return steps


def demo() -> None:
    """Go the whole way on the built-in sample and the tiny base model: minutes, offline after the installation."""
    install()
    began = time.monotonic()
    os.environ["RUN_BY_DEMO"] = "1"  # the scripts do not say which command comes next
    print(INTRODUCTION)
    steps = demo_steps()
    count = len(steps) + 1
    for number, (title, command) in enumerate(steps, start=1):
        print(f"\n== {number}/{count} {title}")
        run(PYTHON, *command)
    print(f"\n== {count}/{count} done in {time.monotonic() - began:.0f} s. Look at:")
    for pattern in ("*/report.html", "*/loss_curve.png", "comparison.png", "comparison.md"):
        for path in sorted((ROOT / DEMO).glob(pattern)):
            print(path.relative_to(ROOT))
    print(f"\nChat: {PYTHON.relative_to(ROOT)} model_download/load_local_model.py {DEMO}/dpo_finetuned")
    print(f"Its answers are the likeliest ones (greedy). Ask it, for example:\n{SUGGESTED}")


def demo_clean() -> None:
    """Remove the demo's results, so that the next demo trains again."""
    remove(ROOT / DEMO)


# tests/conftest.py says which test runs on which of the two cores.
PYTEST = "-m pytest -q -n 2 --no-loadscope-reorder --ignore=tests/interop tests".split()


def test() -> None:
    """Run all tests: minutes."""
    install()
    run(PYTHON, *PYTEST)


def test_fast() -> None:
    """Run the tests that take under a minute together."""
    install()
    run(PYTHON, *PYTEST, "-m", "not slow")


def test_interop() -> None:
    """Ask finished folders in other tools (llama.cpp, mlx-lm, vLLM, ...): makes environments of several GB, then takes minutes."""
    install()
    run(PYTHON, "tests/interop/environments.py")
    run(PYTHON, "-m", "pytest", "-q", "-rs", "tests/interop")


def lint() -> None:
    """Check style, formatting and the direction of imports (pyproject.toml)."""
    install()
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", "--quiet", ".")
    run(PYTHON, "-c", "import sys, importlinter.cli as linter; sys.exit(linter.lint_imports(no_cache=True))")


def bench() -> None:
    """Time training against TRL on Qwen3-0.6B's shape: under two hours on 2 cores with nothing else running."""
    install()
    run(PYTHON, "tests/benchmarks/bench_training.py")


def sample() -> None:
    """Make the built-in sample again from its fact tables."""
    install()
    run(PYTHON, "data_prepare/sample/make_sample.py")


def tiny() -> None:
    """Make the sample, and pre-train the tiny base model again: about 20 minutes on 2 cores."""
    sample()
    run(PYTHON, "model_download/pretrain_tiny_model.py")


def clean() -> None:
    """Remove the environment and all caches, not the models that you trained."""
    remove(VENV)
    for name in ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"):
        for path in list(ROOT.rglob(name)):
            remove(path)


def install() -> None:
    """Make the environment (.venv) and nothing else."""
    wanted = (ROOT / "requirements.txt").read_bytes()
    if PYTHON.exists() and INSTALLED.exists() and INSTALLED.read_bytes() == wanted:
        return
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:  # pip would name torch instead
        better = "py -3.11 tasks.py" if os.name == "nt" else "python3.11 tasks.py, or make PYTHON=python3.11"
        versions = (*sys.version_info[:2], *OLDEST_PYTHON, *NEWEST_PYTHON)
        refuse("Python {}.{}, wanted {}.{} to {}.{}: ".format(*versions) + better)
    if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
        refuse("torch has no builds for Macs with an Intel processor any more; take another machine")
    print("installing the packages of requirements.txt into .venv: some minutes, once")
    if not has_pip():
        run(sys.executable, "-m", "venv", "--clear", VENV)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt")
    run(PYTHON, "-m", "pip", "check")
    INSTALLED.write_bytes(wanted)
    if os.name == "nt" and shutil.which("nvidia-smi"):
        [torch] = [
            line.split()[0] for line in wanted.decode("utf-8").splitlines() if line.startswith("torch==")
        ]
        pip = f"{PYTHON.relative_to(ROOT)} -m pip install --force-reinstall {torch} --index-url {TORCH_INDEX}"
        print("PyPI's torch for Windows does not use NVIDIA GPUs; for yours: " + pip)


def has_pip() -> bool:
    """Tell whether packages can be installed in the environment: one left half made has no pip."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return PYTHON.exists() and subprocess.call([str(PYTHON), "-m", "pip", "--version"], **quiet) == 0


def run(*words: object) -> None:
    """Run a program in the repository. Where it fails or Ctrl-C stops it, end with its exit code."""
    sys.stdout.flush()
    program = subprocess.Popen([str(word) for word in words], cwd=str(ROOT))
    code, stopped = None, False
    while code is None:
        try:
            code = program.wait()
        except KeyboardInterrupt:  # the terminal told the program, too: it ends in its own way
            stopped = True
    if code or stopped:
        sys.exit(128 - code if code < 0 else code or 130)  # below 0: ended by that signal


def remove(path: Path) -> None:
    if path.exists():
        try:
            shutil.rmtree(str(path))
        except OSError as error:
            held = f"{error.filename} cannot be removed ({error.strerror})"
            refuse(f"{held}; close the program that uses it", 1)


def show_help() -> None:
    """List the commands."""
    print("python3.11 tasks.py COMMAND, on Windows py -3.11 tasks.py COMMAND, or make COMMAND:\n")
    for name, task in TASKS.items():
        print(f"{name:12s} {task.__doc__}")


def refuse(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


TASKS = {
    "help": show_help,
    "install": install,
    "demo": demo,
    "demo-clean": demo_clean,
    "test": test,
    "test-fast": test_fast,
    "test-interop": test_interop,
    "lint": lint,
    "bench": bench,
    "sample": sample,
    "tiny": tiny,
    "clean": clean,
}


def main(names: list) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # a pipe on Windows may not hold Chinese
    if [name for name in names if name not in TASKS]:
        refuse(f"unknown command in {' '.join(names)!r}; wanted one of: {', '.join(TASKS)}")
    try:
        for name in names or ["help"]:
            TASKS[name]()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
