"""The house: imports go downwards, siblings stay apart, files and functions are short, --help imports little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, scored, write_jsonl

PACKAGE = ROOT / "rmtool"
# README's drawing, from the roof down. A folder imports only from those below it; folders on one line stay apart.
HOUSE = (
    ("cli",),
    ("launch",),
    ("planning",),
    ("training",),
    ("evaluation", "scoring", "hub"),
    ("dataset",),
    ("model",),
    ("packing",),
    ("tokenization",),
    ("data",),
    ("recipe", "config", "ui", "errors", "redaction", "checkpoint", "dist", "packages"),
)
GROUND = set(HOUSE[-1])
FLOOR = {name: floor for floor, names in enumerate(HOUSE) for name in names}
TORCH_FREE = ("tokenization", "data", "dataset")

MAX_FILE, MAX_FUNCTION = 300, 40
LONG_FILES = {}
LONG_FUNCTIONS = {
    "cli/eval.py:eval_": "its options, one after the other",
    "cli/score.py:score": "its options, one after the other",
    "cli/train.py:train": "its options, one after the other",
}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    """The folder of a module, or its own name on the ground."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names below rmtool that a file imports, inside functions and for types, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmtool":
            inner = (node.module or "").removeprefix("rmtool").removeprefix(".")
            yield from (inner,) if inner else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("rmtool.") for alias in node.names if alias.name.startswith("rmtool."))


def test_imports_go_downwards_and_siblings_stay_apart() -> None:
    wrong = []
    for path in modules():
        own = room(path)
        for name in imports(path):
            other = name.split(".")[0]
            if other in (own, "__version__") or (other in GROUND and own in GROUND):
                continue
            if FLOOR[other] <= FLOOR[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_every_folder_stands_in_the_house() -> None:
    assert {room(path) for path in modules()} == set(FLOOR)


def test_readme_has_the_drawing() -> None:
    drawing = (ROOT / "README.md").read_text(encoding="utf-8").partition("```\ncli/")[2].partition("```")[0]
    floors = [tuple(re.findall(r"(\w+)/ ", line)) for line in f"cli/{drawing}".splitlines()]
    assert [floor for floor in floors if floor] == list(HOUSE[:-1])
    assert set(re.findall(r"\w+", drawing)) >= GROUND


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= {*FLOOR, "scripts", "field"}  # field: whole commands, on what others wrote
    for path in (ROOT / "tests").rglob("*.py"):
        shared = re.findall(r"^from (test_\w+|conftest) import", path.read_text(), re.MULTILINE)
        assert not shared, f"{path} imports from {shared}: what tests share is in helpers.py"


def test_data_tokenization_and_dataset_do_not_import_torch() -> None:
    """What the launcher imports to read and plan must not wait for torch."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules() if room(path) in TORCH_FREE]
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.split()[-1] == "False"


def test_no_two_modules_import_each_other() -> None:
    below = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            name for name in imports(path) if (PACKAGE / (name.replace(".", "/") + ".py")).exists()
        }
        for path in modules()
    }
    while leaves := [name for name, names in below.items() if not names & set(below)]:
        for name in leaves:
            del below[name]
    assert not below, "these modules import each other"


def test_files_and_functions_are_short() -> None:
    files, functions = {}, {}
    for path in modules():
        name, text = str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE:
            files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION:
                functions[f"{name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert files.keys() == LONG_FILES.keys(), files
    assert functions.keys() == LONG_FUNCTIONS.keys(), functions


HELP = """if True:
    import sys, typer
    def loaded():
        return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
    base = loaded()
    sys.argv = ["rmtool", "--help"]
    import rmtool.cli.main
    try:
        rmtool.cli.main.main()
    finally:
        own = sorted(name for name in sys.modules if name.partition(".")[0] == "rmtool")
        print("loaded:", *sorted(loaded() - base), *own)
"""


def test_help_imports_nothing_but_the_command_line_parser() -> None:
    """What makes --help slow is imports, so they are listed: a time would be the machine's as much as rmtool's."""
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(command in shown for command in ("train", "eval", "score", "push"))
    command_line = {f"rmtool.cli.{name}" for name in ("main", "train", "eval", "score", "push", "options", "inference")}
    assert set(shown.splitlines()[-1].split()) == {
        "loaded:",
        "rmtool",
        "rmtool.cli",
        "rmtool.errors",
        "rmtool.redaction",
        *command_line,
    }


WITHOUT = """if True:
    import importlib, pathlib, sys
    for name in ("deepspeed", "wandb", "liger_kernel", "matplotlib"):
        sys.modules[name] = None  # makes its import fail
    for name in sys.argv[1].split():
        importlib.import_module(name)
    from rmtool.cli.main import main
    main(sys.argv[2:])
"""


def test_every_module_imports_and_score_works_without_what_only_training_uses(checkpoint: Path, tmp_path: Path) -> None:
    names = " ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules())
    names = names.replace(".__init__", "")
    rows = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "Hello?", "response": "Hi."}])
    command = [sys.executable, "-c", WITHOUT, names, "score", str(rows), "--model", str(checkpoint)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert isinstance(scored(tmp_path / "r.scored.jsonl")[0]["reward"], float)


@pytest.mark.parametrize("command", ["train", "eval", "score", "push"])
def test_every_command_explains_itself(command: str) -> None:
    program = Path(sys.executable).parent / "rmtool"
    shown = subprocess.run([program, command, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in shown.stdout
