"""The shape of the package: imports go downwards, the command line answers at once, the bundled recipes are sound."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# DESIGN: a module imports only from rows below it; within a row only what is named here.
ROWS = (
    {"errors", "data", "tree", "config", "recipe"},
    {
        "attention",
        "attention_check",
        "cache",
        "cluster",
        "compat",
        "forest",
        "fp32",
        "layers",
        "packing",
        "products",
        "ranks",
        "readout",
        "spool",
        "status",
        "steps",
        "tokenizer",
    },
    {
        "model",
        "loss",
        "metrics",
        "checkpoint",
        "engine",
        "ui",
        "loading",
        "optim",
        "tracking",
        "split",
        "report",
        "weights",
    },
    {
        "card",
        "evaluate",
        "forecast",
        "hub",
        "hub_errors",
        "launch",
        "memory",
        "plan",
        "score",
        "train",
        "trainer",
    },
    {"commands", "cli"},
)
WITHIN = {
    ("tree", "errors"), ("data", "config"), ("data", "errors"), ("data", "tree"), ("data", "data"),
    ("recipe", "errors"), ("recipe", "config"),
    ("packing", "forest"), ("attention", "forest"), ("attention", "packing"), ("compat", "attention"),
    ("attention_check", "attention"), ("attention_check", "forest"), ("attention_check", "packing"),
    ("readout", "layers"), ("cache", "spool"),
    ("model", "ui"), ("checkpoint", "ui"), ("tracking", "ui"), ("split", "ui"), ("report", "split"),
    ("weights", "model"), ("engine", "model"), ("engine", "weights"), ("loading", "model"), ("optim", "model"),
    ("train", "trainer"), ("trainer", "evaluate"), ("loading", "checkpoint"),
    ("train", "evaluate"), ("hub", "card"), ("hub", "hub_errors"), ("launch", "plan"), ("forecast", "memory"),
    ("cli", "commands"),
}  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, by the name of the module or sub-package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rmtool":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rmtool."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rmtool.")}
    return names - {"__version__"}


def test_imports_go_downwards() -> None:
    wrong = []
    for path in sorted((ROOT / "rmtool").rglob("*.py")):
        own = path.relative_to(ROOT / "rmtool").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(path):
            if LEVEL[name] > LEVEL[own] or (LEVEL[name] == LEVEL[own] and (own, name) not in WITHIN):
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


HELP = """if True:
    import sys, typer
    def loaded():
        return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
    base = loaded()
    sys.argv = ["rmtool", "--help"]
    import rmtool.cli
    try:
        rmtool.cli.main()
    finally:
        own = sorted(name for name in sys.modules if name.partition(".")[0] == "rmtool")
        print("loaded:", *sorted(loaded() - base), *own)
"""


def test_help_imports_nothing_but_the_command_line_parser() -> None:
    """What makes --help slow is imports, so they are listed: a time would be the machine's as much as rmtool's."""
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(command in shown for command in ("train", "eval", "score", "push"))
    assert shown.splitlines()[-1].split() == ["loaded:", "rmtool", "rmtool", "rmtool.cli", "rmtool.errors"]


@pytest.mark.parametrize("command", ["train", "eval", "score", "push"])
def test_every_command_explains_itself(command: str) -> None:
    program = Path(sys.executable).parent / "rmtool"
    shown = subprocess.run([program, command, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in shown.stdout
