"""The tokenizer of a reward model: its chat template, and a pad token that is never its eos token.

In: a checkpoint folder. Out: a transformers tokenizer, ready for `rmtool.tokenization.encoder.Encoder`.
Cost: reads the tokenizer's files, and renders a few short conversations.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmtool.data.messages import RESULT_ROLES
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.tokenization.batch_tokenizer import refusals

# Pad tokens that model families reserve without setting them; one of these is used before a new one is added.
RESERVED_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endofpad|>")
NEW_PAD = "<|pad|>"

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the default of Llama 3's template
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(["'])((?:(?!\1)[^\\])*)\1\s*\)""")  # with one literal string
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


def load_tokenizer(folder: Path, chat_template: str | None = None, config: Any = None) -> Any:
    """Load the tokenizer of a folder, with right padding and its own chat template or a given one.

    Args:
        chat_template: "tulu" or the path of a Jinja file; None keeps the tokenizer's template.
        config: the model's transformers config, from which the tokenizer's class may follow; None reads config.json.

    Raises:
        RmtoolError: E0404 the tokenizer cannot be loaded; E0405 there is no chat template, it depends on the date, or
            it does not render a question and its answer; E0201 the template file cannot be read.
    """
    from transformers import AutoTokenizer  # imports torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "custom code" in str(error):
            what = f"the tokenizer of {folder} needs its own code, which is not run: trust_remote_code is off"
            raise RmtoolError("E0404", what, "use a tokenizer that is part of transformers") from error
        raise RmtoolError(
            "E0404", f"cannot load the tokenizer: {first_line(error)}", f"check the files in {folder}"
        ) from error
    tokenizer.padding_side = "right"
    if chat_template:
        tokenizer.chat_template = _template(chat_template)
    if not tokenizer.chat_template:
        raise RmtoolError(
            "E0405",
            "the tokenizer has no chat template",
            "set model.chat_template=tulu, or model.chat_template=FILE.jinja",
            Place(str(folder)),
        )
    _check_templates(tokenizer, Place(chat_template or str(folder)))
    name_control_tokens(tokenizer)
    return tokenizer


def _check_templates(tokenizer: Any, place: Place) -> None:
    """Pin the date in the tokenizer's templates, and check that a question and its answer can be rendered."""
    use = "set model.chat_template=FILE.jinja"
    if isinstance(tokenizer.chat_template, dict):  # by name; transformers takes "tool_use" for rows with tools
        if "default" not in tokenizer.chat_template:
            names = ", ".join(tokenizer.chat_template)
            raise RmtoolError("E0405", f"none of the tokenizer's chat templates is the default: {names}", use, place)
        named = tokenizer.chat_template.items()
        tokenizer.chat_template = {name: _pin_template_date(template, place) for name, template in named}
    else:
        tokenizer.chat_template = _pin_template_date(tokenizer.chat_template, place)
    try:
        text = tokenizer.apply_chat_template(_chat("user", "assistant"), tokenize=False)
    except refusals() as error:
        what = f"the chat template cannot render a question and its answer: {first_line(error)}"
        raise RmtoolError("E0405", what, use, place) from error
    if not text:
        raise RmtoolError("E0405", "the chat template renders a question and its answer as no text", use, place)


def _chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


def name_control_tokens(tokenizer: Any) -> None:
    """Register the control tokens that the template builds from pieces ('<|' + role + '|>').

    transformers recognizes the control tokens that are special or occur literally in the template, and would let the
    others into messages.
    """
    written = "".join(_rendered(tokenizer))
    plain = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    used = [token for token in plain if not token.isspace() and token in written]
    templates = tokenizer.chat_template
    literal = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    if any(token not in literal for token in used):
        named = set(getattr(tokenizer, "chat_control_tokens", None) or ()) | {
            token for token in plain if token in literal
        }
        tokenizer.chat_control_tokens = sorted(named | set(used))


def _rendered(tokenizer: Any) -> Iterator[str]:
    chats = [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant")]
    chats += [("developer", "user", "assistant"), *(("user", "assistant", role, "assistant") for role in RESULT_ROLES)]
    for roles in chats:
        with contextlib.suppress(*refusals()):  # not every template supports every role
            yield tokenizer.apply_chat_template(_chat(*roles), tokenize=False)


def _pin_template_date(template: str, place: Place) -> str:
    """Replace strftime_now() by a fixed date: some templates (Llama 3.2, SmolLM3) write today's date, and the same text
    would get a different reward tomorrow.

    Raises:
        RmtoolError: E0405 the template calls strftime_now() with a format that is not a literal string.
    """

    def date(match: re.Match[str]) -> str:
        return repr(TEMPLATE_DATE.strftime(match[2]))

    pinned = _CLOCK.sub(date, template)
    if "strftime_now" in _NO_CLOCK.sub("", pinned):
        raise RmtoolError(
            "E0405",
            "the chat template calls strftime_now() in an unsupported way, so rewards would depend on the date",
            "write a date, or strftime_now('%d %b %Y'), into a copy of the template, and "
            "set model.chat_template=FILE.jinja",
            place,
        )
    return pinned


def _template(name: str) -> str:
    if name == "tulu":
        return TULU_TEMPLATE
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"cannot read the chat template {name}: {reason}"
        raise RmtoolError("E0201", what, "pass a Jinja file, or tulu") from error


def ensure_pad_token(tokenizer: Any, last_id: int) -> str | None:
    """Set a pad token that ends no response; return what was changed, or None if the tokenizer has one.

    With pad == eos, a model cannot see whether a response ended: transformers takes the reward before the padding.

    Args:
        last_id: the last id of a rendered conversation; it need not be the eos token.
    """
    ends = {tokenizer.eos_token_id, last_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return None
    before = tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    reserved = next((token for token in RESERVED_PADS if vocabulary.get(token) not in {None, *ends}), None)
    tokenizer.add_special_tokens({"pad_token": reserved or NEW_PAD})
    change = f"{'using' if reserved else 'added'} {tokenizer.pad_token} (id {tokenizer.pad_token_id})"
    why = f" instead of {before}, which also ends responses" if before else "; the tokenizer had no pad token"
    return f"pad token: {change}{why}"
