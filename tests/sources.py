"""The text of every Python file of the project, for tests that read instead of run."""

from conftest import ROOT

FOLDERS = ("data_prepare", "model_download", "model_finetune", "utils", "tests")
OURS = sorted([ROOT / "tasks.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in OURS}
FOR_USERS = {name: text for name, text in SOURCES.items() if not name.startswith("tests/")}
