"""What README, docs, --help, comments and code say agrees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from helpers import ROOT

from rmtool.cli.main import app
from rmtool.config import RENAMED_KEYS
from rmtool.errors import ExitCode
from rmtool.recipe import as_dict, load_recipe, recipes_folder

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {option for command in COMMANDS.values() for item in command.params for option in item.opts} | {"--help"}
# Of other programs: pytest, torchrun.
FOREIGN = {"--hf-overrides", "--numprocesses", "--dist", "--no-loadscope-reorder", "--nproc-per-node", "--master-addr"}
SECTIONS = {name: set(keys) for name, keys in as_dict(load_recipe("debug")).items() if isinstance(keys, dict)}
KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)")
MISTAKE = "train.learning_rat"  # README's example of an error
FILES = {"py", "sh", "sbatch", "log", "md", "safetensors", "jsonl", "parquet"}  # train.py and model.safetensors


def documents() -> list[Path]:
    return [ROOT / "README.md", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def texts() -> Iterator[tuple[str, str]]:
    """Every text that may name a recipe key, with its origin."""
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".sh", ".sbatch", ".md")]
    for path in [*documents(), *scripts, *(ROOT / "recipes").glob("*.yaml")]:
        yield str(path), path.read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        yield f"{name} --help", command.get_help(command.make_context(name, [], resilient_parsing=True))
    for path in (ROOT / "rmtool").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{path}:{node.lineno}", node.value


def test_every_option_in_the_documents_exists() -> None:
    for path in documents():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
        assert named - OPTIONS - FOREIGN == set(), path


def test_every_recipe_key_that_a_text_names_exists() -> None:
    unknown = {
        f"{section}.{key}: {origin}"
        for origin, text in texts()
        for section, key in KEY.findall(text)
        if key not in SECTIONS[section] | FILES and f"{section}.{key}" not in {*RENAMED_KEYS, MISTAKE}
    }
    assert unknown == set()


def test_every_recipe_key_has_a_comment() -> None:
    path = ROOT / "rmtool" / "config.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [
        item
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    ]
    assert len(keys) > 50
    for item in keys:
        own, above = lines[item.lineno - 1], lines[item.lineno - 2].strip()
        assert "  # " in own or above.startswith("# "), f"{path}:{item.lineno}: {own.strip()} has no comment"


def test_help_lists_the_bundled_recipes() -> None:
    [option] = [item for item in COMMANDS["train"].params if item.name == "recipe"]
    listed = re.search(r"\((.*?)\)", option.help)
    assert listed
    assert listed[1].split(", ") == sorted(path.stem for path in recipes_folder().glob("*.yaml"))


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_exit_code_is_in_the_readme(code: ExitCode) -> None:
    assert re.search(rf"^\| (\d+, )?{int(code)}[ ,]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_help_says_which_loss_is_which() -> None:
    for name in ("train", "eval"):
        text = " ".join((COMMANDS[name].help or "").split())
        assert "train/rm/loss" in text
        assert "eval/rm/loss" in text
