"""Truncation of prompts: whole turns, the oldest first; then the beginning of the last user message.

In: the messages of a prompt, and whether a shorter one fits. Out: the longest that fits, or None.
What is left is a conversation for the chat template: system messages stay, wherever they are; a turn begins with a user
message, so that roles still alternate; a tool call and its results, after the last user message, are removed together.
An assistant message at the end of the prompt belongs to the response (`Record.continues`).
Cost: `fits` is called once for each halving of the number of turns, and of the number of words.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

from rmtool.data.messages import INSTRUCTION_ROLES
from rmtool.data.record import Message, Messages

_WORD = re.compile(r"\S{1,32}")  # longer ones (Chinese text, base64) are cut anywhere


def _is_instruction(message: Message) -> bool:
    return message.role in INSTRUCTION_ROLES


def shorten(prompt: Messages, fits: Callable[[Messages], bool]) -> Messages | None:
    """Return the prompt without its oldest turns, and without the first words of its last user message if that is not
    enough; None if not even its last word fits.
    """
    asked = max((at for at, message in enumerate(prompt) if message.role == "user"), default=None)
    if asked is None:
        return None
    first = next(at for at, message in enumerate(prompt) if not _is_instruction(message))
    end = len(prompt) - (prompt[-1].role == "assistant")

    def without(turns: int) -> Messages:
        """Return the prompt without the messages before `turns`, but for the system messages and the last question."""
        before = (message for at, message in enumerate(prompt[:turns]) if at == asked or _is_instruction(message))
        return (*before, *prompt[turns:])

    begins = [at for at in range(first + 1, end) if prompt[at].role == ("user" if at <= asked else "assistant")]
    begins = [*(at for at in begins if at != asked + 1), end]
    if (count := bisect_left(begins, True, key=lambda at: fits(without(at)))) < len(begins):
        return without(begins[count])

    def cut(start: int) -> Messages:
        question = prompt[asked]._replace(content=prompt[asked].content[start:])
        return tuple(question if each is prompt[asked] else each for each in without(end))

    words = [match.start() for match in _WORD.finditer(prompt[asked].content)]
    count = bisect_left(words, True, key=lambda start: fits(cut(start)))
    return cut(words[count]) if count < len(words) else None
