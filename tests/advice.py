"""Check of an error's advice: the options and recipe keys that it names exist in the command that was run."""

from __future__ import annotations

import re

import typer

from rmtool.cli.main import app
from rmtool.recipe import as_dict, load_recipe

OPTIONS = {
    name: {option for item in command.params for option in item.opts} | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
OTHER_PROGRAMS = {
    "--ntasks-per-node": "srun",
    "--nproc-per-node": "torchrun",
    "--safe_serialization": "zero_to_fp32.py",
}
KEYS = {name: set(keys) for name, keys in as_dict(load_recipe("debug")).items() if isinstance(keys, dict)}
_KEY = re.compile(rf"(?<![\w./-])({'|'.join(KEYS)})\.(\w+)(?!\.?\w)|(?<![\w./-])(data)\.(columns)\.")


def impossible(command: str, shown: str) -> list[str]:
    """Return what the hints on the terminal advise that cannot be done: after `rmtool NAME`, with that command."""
    found = []
    for hint in re.findall(r"^  hint: (.*)$", shown, re.MULTILINE):
        hint = re.sub(r"\S+ is now|run (?!rmtool).*?(?=, then|;|$)", "", hint)  # a renamed key, another program
        own, *others = re.split(r"rmtool (?=train|eval|score|push)", hint)
        parts = [(command, own), *((other.split()[0], other) for other in others)]
        for name, text in parts:
            options = [
                option
                for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text)
                if option not in OPTIONS.get(name, ()) and OTHER_PROGRAMS.get(option, "\n") not in text
            ]
            keys = [".".join(filter(None, key)) for key in _KEY.findall(text)]
            wrong = keys if name != "train" else [key for key in keys if not _exists(key)]
            found += [f"{name} has no {item}: {hint}" for item in (*options, *wrong)]
    return found


def _exists(key: str) -> bool:
    section, name = key.split(".")[:2]
    return name in KEYS[section]
