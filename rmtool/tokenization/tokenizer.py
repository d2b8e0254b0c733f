"""The tokenizer of a reward model: its chat template, and a pad token that is never its eos token.

In: a checkpoint folder. Out: a transformers tokenizer, ready for `data.encode.Encoder`.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rmtool.errors import Place, RmtoolError

# Pad tokens that model families reserve and do not set; taken before a new one is added.
RESERVED_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endofpad|>")
NEW_PAD = "<|pad|>"

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # Llama 3's own, for templates that ask for today's
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(["'])((?:(?!\1)[^\\])*)\1\s*\)""")  # one string, as it stands there
_NO_CLOCK = re.compile(r"\{#.*?#\}|strftime_now\s+is\s+(?:not\s+)?defined", re.DOTALL)

# The template that Tulu and Open Instruct use, for models that come without one (arXiv 2411.15124).
TULU_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The folder's tokenizer, padding on the right, with its own chat template or the one named.

    Args:
        chat_template: "tulu" or the path of a Jinja file; None keeps the tokenizer's own.

    Raises:
        RmtoolError: E0404 no tokenizer, E0405 no chat template, or one that asks for the time, E0201 no such
            template file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RmtoolError("E0404", "the tokenizer cannot be loaded", f"look at the files in {folder}") from error
    tokenizer.padding_side = "right"
    if chat_template:
        tokenizer.chat_template = _template(chat_template)
    if not tokenizer.chat_template:
        raise RmtoolError(
            "E0405",
            "the tokenizer has no chat template, so nobody knows how the model wants to read a conversation",
            "give one: --set model.chat_template=tulu (or a .jinja file) to train, --chat-template to eval or score",
            Place(str(folder)),
        )
    tokenizer.chat_template = _pin_template_date(tokenizer.chat_template, Place(chat_template or str(folder)))
    name_control_tokens(tokenizer)
    return tokenizer


def name_control_tokens(tokenizer: Any) -> None:
    """Name the added tokens that the template builds from pieces ('<|' + role + '|>'): transformers knows those for
    control tokens that are special or stand in the template as they are, and lets the others into messages.
    """
    written = "".join(_rendered(tokenizer))
    plain = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    used = [token for token in plain if not token.isspace() and token in written]
    if any(token not in str(tokenizer.chat_template) for token in used):
        named = set(tokenizer.chat_control_tokens or ()) | {
            token for token in plain if token in tokenizer.chat_template
        }
        tokenizer.chat_control_tokens = sorted(named | set(used))


def _rendered(tokenizer: Any) -> Iterator[str]:
    from jinja2 import TemplateError

    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
    for chat in (turns[1:3], turns[:3], turns):
        with contextlib.suppress(TemplateError):  # not every template knows every role
            yield tokenizer.apply_chat_template(chat, tokenize=False)


def _pin_template_date(template: str, place: Place) -> str:
    """Some templates (Llama 3.2, SmolLM3) write today's date: the same text would get another reward tomorrow, and the
    saved checkpoint in another tool another one still. The date is written into the template instead.

    Raises:
        RmtoolError: E0405 the template asks for the time in a form that it makes up while it renders.
    """

    def date(match: re.Match[str]) -> str:
        return repr(TEMPLATE_DATE.strftime(match[2]))

    pinned = _CLOCK.sub(date, template)
    if "strftime_now" in _NO_CLOCK.sub("", pinned):
        raise RmtoolError(
            "E0405",
            "the chat template asks for the time, and not in one plain form: the same text would get another reward "
            "each time",
            "write the date, or strftime_now('%d %b %Y'), into a copy of the template, and give that: "
            "--set model.chat_template=FILE.jinja to train, --chat-template to eval or score",
            place,
        )
    return pinned


def _template(name: str) -> str:
    if name == "tulu":
        return TULU_TEMPLATE
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RmtoolError("E0201", f"the chat template {name} cannot be read", "name a Jinja file, or tulu") from error


def ensure_pad_token(tokenizer: Any, last_id: int) -> str | None:
    """Give the tokenizer a pad token of its own; returns what was done, or None if it had one.

    Args:
        last_id: the id that a rendered conversation ends with; it need not be the eos token.

    With pad == eos a model cannot see whether a response ended: transformers reads the reward before the padding.
    """
    ends = {tokenizer.eos_token_id, last_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return None
    before = "it had none" if tokenizer.pad_token_id is None else f"it was {tokenizer.pad_token}, which ends a response"
    vocabulary = tokenizer.get_vocab()
    reserved = next((token for token in RESERVED_PADS if vocabulary.get(token) not in {None, *ends}), None)
    tokenizer.add_special_tokens({"pad_token": reserved or NEW_PAD})
    verb = "taken as" if reserved else "added as"
    return f"{tokenizer.pad_token} (id {tokenizer.pad_token_id}) is {verb} the pad token; {before}"
