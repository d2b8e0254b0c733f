"""Messages in the words of the command that was run, and what every command sets for torch."""

from __future__ import annotations

import os
from typing import Any

import pytest
from advice import OPTIONS as COMMANDS

from rmtool.cli.options import OPTIONS, in_words_of


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("train", "raise data.max_length, or set data.on_long=drop", "raise data.max_length, or set data.on_long=drop"),
        ("eval", "raise data.max_length, or set data.on_long=drop", "raise --max-length, or pass --on-long drop"),
        ("eval", "set data.on_empty=keep", "pass --allow-empty"),
        ("score", '"q" is missing (data.columns.prompt)', '"q" is missing (--column prompt)'),
        ("eval", "set data.columns.prompt=COLUMN", "pass --column prompt=COLUMN"),
        ("push", "set hub.public=true", "pass --public"),
    ],
)
def test_a_recipe_key_is_an_option_where_there_is_no_recipe(command: str, text: str, words: str) -> None:
    assert in_words_of(command, text) == words


def test_the_options_exist() -> None:
    for key, option in OPTIONS.items():
        commands = ["push"] if key.startswith("hub.") else ["eval", "score"]
        for command in commands:
            assert option.strip() in COMMANDS[command], f"{command} has no {option}"


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("names", "default"), [(ALLOCATOR, "expandable_segments:True"), (SPINNING, "5000")], ids=["allocator", "spinning"]
)
@pytest.mark.parametrize("given", [None, 0, 1])
def test_torch_finds_our_settings_unless_the_user_has_set_them(
    names: tuple[str, ...], default: str, given: int | None, rmtool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in names:
        monkeypatch.setenv(each, "")  # so that it is restored
        monkeypatch.delenv(each)
    if given is not None:
        monkeypatch.setenv(names[given], "own")
    assert rmtool("--version").code == 0
    set_ = {name: os.environ[name] for name in names if name in os.environ}
    assert set_ == ({names[0]: default} if given is None else {names[given]: "own"})
