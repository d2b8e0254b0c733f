"""Messages in the words of the command that was run."""

from __future__ import annotations

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
