"""Download the base model from the Hugging Face Hub, at a pinned commit, every file verified.

    python model_download/download_model.py
    python model_download/download_model.py --model Qwen/Qwen3-1.7B
    python model_download/download_model.py --model tiny          (the built-in one, offline)

The files go to model_download/<name of the model>/, with a source.json that says where they came from and what each one's
sha256 is. Run it again after an interruption: it goes on where it stopped. A mirror is chosen with HF_ENDPOINT=https://..., a token
for gated or private models with HF_TOKEN=hf_... . Only what transformers needs is fetched: config, tokenizer, safetensors
weights and the licence, no pickled weights and no code.
"""

import datetime
import fnmatch
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import RunError, UserError, run
from utils.files import sha256_of, show_path, write_json
from utils.hub import COMMIT, HubFile, Repo, download, look_up, read_record
from utils.kept import changed_file
from utils.model.folder import check_model
from utils.settings import ROOT, read_settings
from utils.text import listed, say

# fmt: off
# ---- Settings: edit here, or override on the command line (--model Qwen/Qwen3-1.7B) ----
MODEL = "Qwen/Qwen3-0.6B"       # a model on the Hub; or tiny: the built-in one
REVISION = "c1899de289a04d12100db370d81485cdf75e47ca"   # commit, branch or tag; this is Qwen3-0.6B's, for others: main
OUTPUT_DIR = ""                 # folder for the files; empty: model_download/<name of the model>
# ----
# fmt: on

TINY_DIR = ROOT / "model_download" / "tiny_qwen3_tcm"
# What transformers needs of a model, and the licence.
MODEL_FILES = """config.json generation_config.json tokenizer*.json tokenizer.model special_tokens_map.json added_tokens.json
vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json *.safetensors *.safetensors.index.json LICENSE* NOTICE*"""

# What the default model is, whatever a mirror lists: sha256 of the large files, git blob id of the small ones.
PINNED_MODEL, PINNED_COMMIT = "Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"
PINNED_FILES = {
    "model.safetensors": "f47f71177f32bcd101b7573ec9171e6a57f4f4d31148d38e382306f42996874b",
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "config.json": "f5c3703b78ae2a478ae15b247e9f855e0ce2107b",
    "generation_config.json": "20a8a9156fc8c3f25295ca067f61fdf120d517c5",
    "tokenizer_config.json": "417d038a63fa3de29cfde265caedae14d1a58d92",
    "vocab.json": "4783fe10ac3adce15ac8f358ef5462739852c569",
    "merges.txt": "31349551d90c7606f325fe0f11bbb8bd5fa0d7c7",
}


def show_next(folder: Path) -> None:
    say(f"next: python model_download/load_local_model.py {show_path(folder)}")


def use_tiny() -> None:
    """Check the built-in model; there is nothing to download."""
    if not TINY_DIR.is_dir():
        raise UserError(f"the built-in model is missing; get it with: git checkout {show_path(TINY_DIR)}")
    check_model(str(TINY_DIR))
    say(f"the built-in model is in {show_path(TINY_DIR)}")
    show_next(TINY_DIR)


def recorded_files(folder: Path, model: str, commit: str) -> dict:
    """{name: {"size", "sha256"}} of a folder that was finished before, else {}. UserError if it holds something else."""
    return read_record(folder / "source.json", repo=model, revision=commit).get("files", {})


def check_pinned(repo: Repo) -> None:
    """RunError where the listing of the default model is not the one that this script knows."""
    if (repo.id, repo.commit) != (PINNED_MODEL, PINNED_COMMIT):
        return
    for name, digest in PINNED_FILES.items():
        listed = repo.files[name].digest if name in repo.files else "no such file"
        if listed != digest:
            other = f"the server lists another {name} for {repo.id} than this script knows"
            mend = "it does not serve the original: choose another mirror in HF_ENDPOINT"
            raise RunError(f"{other} ({listed[:12]}, wanted {digest[:12]}); {mend}")


def model_files(repo: Repo) -> dict[str, HubFile]:
    """{name: HubFile} of what transformers needs. UserError if there are no safetensors weights or no config."""
    wanted = re.compile("|".join(map(fnmatch.translate, MODEL_FILES.split())))
    plain = [name for name in repo.files if not set(name) & set("/\\:")]
    files = {name: repo.files[name] for name in plain if wanted.match(name)}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        lacks = f"{repo.id} holds no config.json with *.safetensors weights, and other kinds are not fetched"
        raise UserError(f"{lacks} (it holds {listed(sorted(repo.files))}); see {repo.page}/tree/main")
    return files


def main(argv: list[str] | None = None) -> None:
    # 1. Which model, from where, to where
    settings = read_settings(globals(), argv)
    if settings.MODEL == "tiny":
        return use_tiny()
    if settings.MODEL and Path(settings.MODEL).is_dir():
        raise UserError(f"{settings.MODEL} is a folder on this disk; wanted a model on the Hub: owner/name")
    if settings.MODEL != PINNED_MODEL and settings.REVISION == PINNED_COMMIT:
        settings.REVISION = "main"  # the pinned commit is one of the default model only
    if not settings.OUTPUT_DIR:
        settings.OUTPUT_DIR = ROOT / "model_download" / settings.MODEL.rpartition("/")[2]
    model, revision, folder = settings.MODEL, settings.REVISION, settings.OUTPUT_DIR

    # 2. Nothing to do where it is there already, whole and unchanged, known without the network
    recorded = recorded_files(folder, model, revision) if COMMIT.fullmatch(revision) else {}
    if recorded and not changed_file(folder, recorded):
        say(f"{model} at {revision[:7]} is complete in {show_path(folder)}")
        return
    settings.show()

    # 3. What the Hub lists at that commit
    repo = look_up("model", model, revision)
    check_pinned(repo)
    files = {folder / name: file for name, file in model_files(repo).items()}
    ours = {folder / name for name in recorded_files(folder, model, repo.commit)}

    # 4. Fetch, verify, move into place
    record = {}
    for path in download(repo, files, ours):
        record[path.name] = {"size": files[path].size, "sha256": sha256_of(path)}

    # 5. Record where it came from
    source = {"repo": model, "revision": repo.commit, "asked_for": revision, "licence": repo.licence}
    source["downloaded"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(folder / "source.json", {**source, "files": record})
    licence = repo.licence or "not stated"
    say(f"{model} at {repo.commit} (licence: {licence}) is complete in {show_path(folder)}")
    show_next(folder)


if __name__ == "__main__":
    sys.exit(run(main))
