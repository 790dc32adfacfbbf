"""Models named by a Hub id: brought into the Hub's local cache, every file verified, and used from there as a folder.

The cache is huggingface_hub's own (models--OWNER--NAME/snapshots/COMMIT/), so that other programs find the model, too, and what
they brought is not fetched again. A folder from the Hub is a stranger's: it is checked before anything is built from it.
"""

import contextlib
import fnmatch
import sys
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_write
from utils.hub import COMMIT, Hub, HubFile, Repo
from utils.model.folder_checks import check_files

TIMEOUT, RETRIES = 30.0, 6  # as in download_model.py
WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "LICENSE*",
    "NOTICE*",
)


def choose_files(repo: Repo) -> dict[str, HubFile]:
    """{name: HubFile} of what transformers needs. UserError where there are no safetensors weights or no config."""
    files = {
        name: file
        for name, file in repo.files.items()
        if not set(name) & set("/\\:") and any(fnmatch.fnmatchcase(name, kind) for kind in WANTED)
    }
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise UserError(
            f"{repo.id} holds no config.json with *.safetensors weights, and other kinds are not fetched "
            f"(it holds {', '.join(sorted(repo.files)[:8])}); see {repo.page}/tree/main"
        )
    return files


def local_folder(model: str) -> str:
    """The folder of a model: itself, or where the cache holds what a Hub id names. UserError where it does not."""
    if Path(model).is_dir():
        return model
    folder = _cached(model)
    if folder is None:
        raise UserError(
            f"{model} is not on this machine; get it with: python model_download/download_model.py --model {model}"
        )
    return str(folder)


def fetch(model: str) -> None:
    """Bring the model of a Hub id into the cache, unless it is there and whole, and check its folder.

    UserError or RunError, in one line, where it cannot be had or is not sound. What is in the cache needs no network.
    """
    folder = _cached(model)
    if folder is not None:
        with contextlib.suppress(UserError):
            return check_files(folder)
    with contextlib.redirect_stdout(sys.stderr):  # chat's stdout holds answers and nothing else
        repo = Hub(TIMEOUT, retries=1).look_up("model", model, "main")  # no long wait for a mistyped folder
        folder = _place(model) / "snapshots" / repo.commit
        files = {folder / name: file for name, file in choose_files(repo).items()}
        for _ in Hub(TIMEOUT, RETRIES).download(repo, files, files):
            pass
    with atomic_write(_place(model) / "refs" / "main") as file:
        file.write(repo.commit)
    check_files(folder)


def _place(model):
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"


def _cached(model):
    """The folder of the commit that main meant when the model was brought; None where there is none."""
    reference = _place(model) / "refs" / "main"
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    folder = _place(model) / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None
