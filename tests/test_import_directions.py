"""Imports point downward only: utils root <- model <- data, training <- evaluation, chat <- scripts <- tests.

Read from the source text, so that an import inside a function counts like one at the top.
"""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# Each room of utils/, and the rooms below it that it may import beside itself. "" is the root, which stands on nothing.
MAY_IMPORT = {
    "": set(),
    "model": {""},
    "data": {"", "model"},
    "training": {"", "model"},
    "evaluation": {"", "model", "data", "training"},
    "chat": {"", "model", "data", "training"},
}
SCRIPT_FOLDERS = ("data_prepare", "model_download", "model_finetune")


def modules(root: Path) -> dict[str, Path]:
    """{dotted name: path} of every Python file of the project; a package has the name of its folder."""
    files = [
        *root.glob("*.py"),
        *(path for top in (*SCRIPT_FOLDERS, "utils", "tests") for path in (root / top).rglob("*.py")),
    ]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of `known` that the module imports, wherever in it, in whatever form."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return (found & known) - {name}


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


def room(name: str) -> str:
    """The folder of utils/ that a module is in; "" for the root."""
    return (
        name.split(".")[1] if name.count(".") > 1 or name in {f"utils.{room}" for room in MAY_IMPORT} else ""
    )


def wrong_imports(root: Path) -> list[str]:
    """["utils.model.load imports utils.data.terms", ...]: everything that points the wrong way."""
    known = modules(root)
    tests = {name for name in known if name.startswith("tests")}
    as_seen_from_tests = {
        name.rpartition(".")[2]: name for name in tests
    }  # they import one another by last name
    wrong = []
    for name, path in known.items():
        if name in tests:
            continue
        for other in imports(name, path, {*known, *as_seen_from_tests}):
            if other in tests or (other in as_seen_from_tests and other not in known):
                allowed = False
            elif is_script(known[other]):
                allowed = False
            elif name.startswith("utils"):
                own, its = room(name), room(other)
                allowed = other.startswith("utils") and (own == its or its in MAY_IMPORT[own])
            else:
                allowed = True
            if not allowed:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def circles(root: Path) -> list[list[str]]:
    """Modules of utils/ that import one another in a circle, one list a circle."""
    known = {name: path for name, path in modules(root).items() if name.startswith("utils")}
    graph = {name: imports(name, path, set(known)) for name, path in known.items()}
    found, done = [], set()

    def visit(name, way):
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_import_points_upward():
    assert not wrong_imports(ROOT)


def test_no_modules_import_one_another_in_a_circle():
    assert not circles(ROOT)


def test_every_room_is_known():
    assert {path.name for path in (ROOT / "utils").iterdir() if (path / "__init__.py").exists()} == set(
        MAY_IMPORT
    ) - {""}


# ---- A small tree, in which one arrow at a time is turned

TREE = {
    "tasks.py": "import os\n",
    "utils/__init__.py": "",
    "utils/files.py": "from utils.errors import run\n",
    "utils/errors.py": "",
    "utils/model/__init__.py": "",
    "utils/model/load.py": "from utils.files import x\n",
    "utils/data/__init__.py": "",
    "utils/data/terms.py": "from utils.model import load\n",
    "utils/training/__init__.py": "",
    "utils/training/trainer.py": "import utils.model.load\n",
    "utils/evaluation/__init__.py": "",
    "utils/evaluation/exams.py": "from utils.data.terms import x\nfrom utils.training import trainer\n",
    "utils/chat/__init__.py": "",
    "utils/chat/session.py": "def f():\n    from utils.data.terms import x\n",
    "model_finetune/finetune.py": 'from utils.chat.session import x\nif __name__ == "__main__":\n    pass\n',
    "model_finetune/parts.py": "from utils.model.load import x\n",
    "tests/helpers.py": "from model_finetune.finetune import main\n",
    "tests/test_a.py": "from helpers import x\n",
}


def tree(folder, **changed):
    for name, text in {
        **TREE,
        **{name.replace("__", "/") + ".py": text for name, text in changed.items()},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_tree_without_fault(tmp_path):
    assert not wrong_imports(tree(tmp_path)) and not circles(tmp_path)


@pytest.mark.parametrize(
    "module, text, wrong",
    [
        ("utils__files", "import utils.model.load", "utils.files imports utils.model.load"),
        ("utils__files", "from utils.model import load", "utils.files imports utils.model"),
        ("utils__files", "from .chat.session import x", "utils.files imports utils.chat.session"),
        ("utils__model__load", "from utils.data import terms", "utils.model.load imports utils.data.terms"),
        ("utils__model__load", "from ..data import terms", "utils.model.load imports utils.data.terms"),
        (
            "utils__data__terms",
            "def f():\n    import utils.training.trainer",
            "utils.data.terms imports utils.training.trainer",
        ),
        (
            "utils__training__trainer",
            "from utils.data.terms import x",
            "utils.training.trainer imports utils.data.terms",
        ),
        (
            "utils__training__trainer",
            "from utils.evaluation import exams",
            "utils.training.trainer imports utils.evaluation.exams",
        ),
        (
            "utils__chat__session",
            "from utils.evaluation.exams import x",
            "utils.chat.session imports utils.evaluation.exams",
        ),
        ("utils__evaluation__exams", "from utils import chat", "utils.evaluation.exams imports utils.chat"),
        (
            "utils__data__terms",
            "import importlib\nimportlib.import_module('utils.chat.session')",
            "utils.data.terms imports utils.chat.session",
        ),
        (
            "utils__data__terms",
            "from model_finetune.parts import x",
            "utils.data.terms imports model_finetune.parts",
        ),
        (
            "model_finetune__other",
            "from model_finetune.finetune import x",
            "model_finetune.other imports model_finetune.finetune",
        ),
        ("tasks", "def f():\n    import tests.helpers", "tasks imports tests.helpers"),
        ("model_finetune__parts", "from helpers import x", "model_finetune.parts imports helpers"),
    ],
)
def test_a_turned_arrow_is_found(tmp_path, module, text, wrong):
    assert wrong in wrong_imports(tree(tmp_path, **{module: text}))


def test_a_circle_is_found(tmp_path):
    (circle,) = circles(tree(tmp_path, utils__errors="def f():\n    from utils.files import x"))
    assert set(circle) == {"utils.errors", "utils.files"} and circle[0] == circle[-1]
