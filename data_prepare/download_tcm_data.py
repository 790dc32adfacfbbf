"""Download a Chinese-medicine data set from the Hugging Face Hub, at a pinned commit, every file verified.

    python data_prepare/download_tcm_data.py
    python data_prepare/download_tcm_data.py --dataset Monor/hwtcm-sft-v1
    python data_prepare/download_tcm_data.py --dataset sample     (the built-in one, offline)

Each file goes to data_prepare/raw/ as it is, with a .source.json beside it that says where it came from. Run it again after
an interruption: it goes on where it stopped. A mirror is chosen with HF_ENDPOINT=https://..., a token for gated or private
sets with HF_TOKEN=hf_... .
"""

import datetime
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, run
from utils.files import atomic_write, require_file, sha256_of, show_path, write_json
from utils.hub import COMMIT, Repo, download, look_up, read_record
from utils.kept import changed_file
from utils.settings import ROOT, command, read_settings
from utils.text import listed, say, say_next

# fmt: off
# ---- Settings: edit here, or override on the command line (--dataset Monor/hwtcm-sft-v1) ----
DATASET = "michaelwzhu/ShenNong_TCM_Dataset"            # a data set on the Hub; or sample: the built-in one
REVISION = "7356f4f786b87c6bcb3c38d8b6d4b5e75aadb718"   # commit, branch or tag; this is ShenNong's, for others: main
FILES = ["ChatMed_TCM-v0.2.json"]                       # files of it; empty, or for another data set: all its data files
OUTPUT_DIR = "data_prepare/raw"                         # the folder that the conversion reads
# ----
# fmt: on

PINNED_DATASET, PINNED_COMMIT = "michaelwzhu/ShenNong_TCM_Dataset", "7356f4f786b87c6bcb3c38d8b6d4b5e75aadb718"
PINNED_FILES = ["ChatMed_TCM-v0.2.json"]
OUTPUT_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")  # what the conversion reads
NOT_DATA = ("dataset_info.json", "dataset_infos.json")  # descriptions that the datasets library writes
SAMPLE_DIR = ROOT / "data_prepare" / "sample"
SAMPLE_FILES = ("tcm_sample.jsonl", "tcm_preferences.jsonl", "tcm_exam.jsonl")
CONVERT = "data_prepare/convert_to_qwen3_format.py"


def source_of(path: Path) -> Path:
    return path.with_suffix(".source.json")


def write_source(path: Path, **origin: str | None) -> None:
    """Write <name>.source.json for a file that is whole, and tell about it."""
    record = {
        **origin,
        "sha256": sha256_of(path),
        "size": path.stat().st_size,
        "downloaded": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_json(source_of(path), record)
    say(f"{show_path(path)}: {record['size']:,} bytes, licence: {record['licence'] or 'not stated'}")


def copy_sample(folder: Path) -> None:
    """Put the built-in files into `folder`, offline."""
    for name in SAMPLE_FILES:
        sample = require_file(SAMPLE_DIR / name, f"git checkout {show_path(SAMPLE_DIR / name)}")
        with atomic_write(folder / name, "wb") as copy:
            copy.write(sample.read_bytes())
        origin = {"repo": "sample", "revision": None, "file": show_path(sample)}
        write_source(folder / name, **origin, licence="that of this project")
    say_next(command(CONVERT, INPUT_FILES=folder))


def choose_files(repo: Repo, wanted: list[str]) -> list[str]:
    """The names in `wanted`, or those of all data files. UserError where a name is not there or is of no known kind."""
    there = sorted(repo.files)
    data = [name for name in there if name.endswith(OUTPUT_FILES) and Path(name).name not in NOT_DATA]
    if not data:
        raise UserError(f"{repo.id} holds no {' '.join(OUTPUT_FILES)} file (it holds {listed(there)})")
    for name in wanted:
        if name not in data:
            raise UserError(
                f"{repo.id} has no data file {name} (it has {listed(data)}); see {repo.page}/tree/main"
            )
    return wanted or data


def disk_paths(folder: Path, dataset: str, names: list[str]) -> dict[Path, str]:
    """{path on disk: name in the data set}: the set's name and the whole path of the file make its name here.

    UserError where two files would get the same name, by letter case or by ending too.
    """
    prefix = dataset.rpartition("/")[2]
    paths = {folder / re.sub(r'[\\/:*?"<>|]', "-", f"{prefix}-{name}"): name for name in names}
    if len({source_of(path).name.casefold() for path in paths}) < len(set(names)):
        raise UserError(f"some of {listed(sorted(names))} would get the same name here; choose with --files")
    return paths


def record_of(path: Path, dataset: str, commit: str, name: str) -> dict[str, Any]:
    """The record of an earlier run that brought `path` as this file at this commit, else {}. UserError if it came from elsewhere."""
    return read_record(source_of(path), repo=dataset, revision=commit, file=name) if path.exists() else {}


def main(argv: list[str] | None = None) -> None:
    # 1. Which data set, from where, to where
    settings = read_settings(globals(), argv)
    if settings.DATASET == "sample":
        return copy_sample(settings.OUTPUT_DIR)
    if Path(settings.DATASET).is_file():
        here = f"{settings.DATASET} is a file on this disk"
        raise UserError(f"{here}; copy it into {show_path(settings.OUTPUT_DIR)}")
    if settings.DATASET != PINNED_DATASET:  # the pinned values are those of the default data set only
        settings.REVISION = "main" if settings.REVISION == PINNED_COMMIT else settings.REVISION
        settings.FILES = [] if settings.FILES == PINNED_FILES else settings.FILES
    dataset, revision = settings.DATASET, settings.REVISION
    names, folder = settings.FILES, settings.OUTPUT_DIR

    # 2. Nothing to do where it is there already, whole and unchanged, known without the network
    if names and COMMIT.fullmatch(revision):
        paths = disk_paths(folder, dataset, names)
        records = {path.name: record_of(path, dataset, revision, name) for path, name in paths.items()}
        if all(records.values()) and not changed_file(folder, records):
            say(f"{dataset} at {revision[:7]} is complete in {show_path(folder)}: {', '.join(records)}")
            return
    settings.show()

    # 3. What the Hub lists at that commit
    repo = look_up("dataset", dataset, revision)
    paths = disk_paths(folder, dataset, choose_files(repo, names))
    ours = {path for path, name in paths.items() if record_of(path, dataset, repo.commit, name)}

    # 4. Fetch, verify, move into place, and record where each file came from
    for path in download(repo, {path: repo.files[name] for path, name in paths.items()}, ours):
        origin = {"repo": dataset, "revision": repo.commit, "asked_for": revision, "file": paths[path]}
        write_source(path, **origin, licence=repo.licence)
    say_next(command(CONVERT, INPUT_FILES=folder))


if __name__ == "__main__":
    sys.exit(run(main))
