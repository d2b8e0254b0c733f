"""What an unread field can be, by its name and its value: conversation, media, or metadata.

In: the fields of a row or message that nobody reads. Out: those that must not be left out.
The rule, in one place:

* The last known word of a name decides: `prompt_id` is an id, `source_text_prompt` a prompt. Words about judges and
  generation (`labelling_prompt`) decide wherever they are. Words of no list decide nothing.
* Numbers, booleans, null, empty text, lists and objects are never part of a conversation.
* MEDIA names (images, audio) and CONVERSATION names (question, history, functions) are, with any other value; weak
  ones (context, problem) only with a value that reads as text, not as an identifier. So are lists of messages, under
  any name but a METADATA one. An object is looked into.
* METADATA names (ids, sources, scores, models, lengths) are not, nor are those of responses.
* UNKNOWN names are part of the conversation only in a row without a prompt, with a value that reads as text.

Cost: names are looked up once; values only of names that are not METADATA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    """What a field's name says about it."""

    CONVERSATION = auto()
    MEDIA = auto()
    METADATA = auto()
    UNKNOWN = auto()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# In the order in which one of several is suggested as the prompt.
_STRONG = ("prompt", "question", "instruction", "query", "message", "conversation", "dialogue", "dialog", "input")
_WEAK = _words(
    "article ask background chat context conv convo ctx demonstration developer dialogs document function history "
    "memory msg passage persona post premise problem request scenario sys system thread tool trajectory turn "
    "utterance"
)
_MEDIA = _words(
    "attachment audio image img media modal multimodal photo picture pixel screenshot sound speech video voice wav"
)
_FILES = _words("base64 bytes data file link name path uri url value")  # image_path is an image; a path is not
_METADATA = _FILES | _words(
    "ability accuracy age answer attribute author avg bool candidate category chosen class cluster coherence "
    "comment completion complexity confidence config continuation correct correctness cost count country created "
    "criteria critique dataset date datetime difference difficulty domain edit email embedding end explanation "
    "feedback fingerprint flag fold following format gender generation generator gold groundtruth group has hash "
    "hate height helpfulness honesty hour id identifier idx index info is judge judgement judgment key keyword "
    "kind label lang language len length level license locale logprob logps margin max md5 mean meta metadata "
    "method metric min mode model name note num number order origin output overlap owner p param perplexity "
    "policy position prediction preference prob probability provider quality rank ranking rate rating rationale "
    "reason reasoning reference region rejected relevance reply response review reward risk safety sample score "
    "seconds seed sentiment setting severity sha sha256 size skill solution source split stage star start stat "
    "statistic status std step strength style subcategory subreddit subset summary tag target taxonomy "
    "temperature template test time timestamp token toxicity truth truthfulness tstamp type uid updated usage "
    "uuid validation value variant verbosity verdict version vote weight width winner worker year"
)
_PLAIN = _words("body content paragraph sentence text")  # source_text is not a source
_ANYWHERE = _words(
    "annotation annotator critic eval evaluation evaluator generation grader judge judging labeling labelling rubric"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")
_READS_AS_TEXT = re.compile(r"(?=.*[^\W\d_]).*(?:\s|[^\x00-\x7f]|[?!.]$)", re.DOTALL)
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))


@functools.lru_cache(4096)
def kind_of(name: str) -> Kind:
    """Return what a name says about its field."""
    words = words_of(name)
    if any(word in _MEDIA for word in words):
        last = [word for word in words if word in _MEDIA or word in _METADATA][-1]
        return Kind.MEDIA if last in _MEDIA or last in _FILES else Kind.METADATA
    if any(word in _ANYWHERE for word in words):
        return Kind.METADATA
    for word in reversed(words):
        if word in _WEAK or word.endswith(_STRONG):
            return Kind.CONVERSATION
        if word in _METADATA:
            return Kind.UNKNOWN if words[-1] in _PLAIN else Kind.METADATA
    return Kind.UNKNOWN


def words_of(name: str) -> list[str]:
    """Return the words of a name, in lower case and singular: user_prompts, userPrompts."""
    return [_singular(word.lower()) for word in _WORD.findall(name)]


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-1] if word.endswith("s") and word not in _METADATA and word not in _WEAK else word


def conversation_part(path: str, value: Any, kind: Kind, no_prompt: bool) -> tuple[str, Any] | None:
    """Return the path and value of what could be part of the conversation in an unread field, or None."""
    if isinstance(value, dict) and not is_message(value):
        if kind is not Kind.CONVERSATION and not no_prompt:
            return None
        for name, item in value.items():
            inner = kind_of(name)
            if inner is Kind.UNKNOWN and kind is Kind.CONVERSATION:
                inner = kind
            if inner is Kind.CONVERSATION and (found := conversation_part(f"{path}.{name}", item, inner, no_prompt)):
                return found
        return None
    if kind is Kind.METADATA or not any(texts(value)):
        return None
    if is_message(value) or is_messages(value):
        return path, value
    if kind is Kind.CONVERSATION:
        held = not isinstance(value, str) or is_strong(path) or reads_as_text(value)
    else:
        held = no_prompt and isinstance(value, str) and reads_as_text(value)
    return (path, value) if held else None


def is_message(value: Any) -> bool:
    """Return whether a value is one message: an object with a role and its content."""
    return isinstance(value, dict) and any({role, text} <= value.keys() for role, text in _MESSAGE_KEYS)


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def is_strong(path: str) -> bool:
    """Return whether even a single word under this name is part of the conversation."""
    return any(word.endswith(_STRONG) for word in words_of(path))


def by_likelihood(path: str) -> int:
    """Return the place of a path among several that could be the prompt."""
    words = words_of(path)
    unknown = kind_of(path) is Kind.UNKNOWN
    return next((at for at, strong in enumerate(_STRONG) if strong in words), len(_STRONG) + unknown)


def target_of(path: str) -> str:
    """Return our field that could be mapped to it: prompt, system or tools."""
    words = set(words_of(path))
    if words & {"system", "sys", "developer"}:
        return "system"
    return "tools" if words & {"tool", "function"} else "prompt"


def reads_as_text(value: str) -> bool:
    """Return whether a string is a phrase, not an identifier, a date or a number."""
    return _READS_AS_TEXT.match(value.strip()) is not None


def texts(value: Any) -> Iterator[str]:
    """Return the strings in a value, stripped, without empty ones and the roles of messages."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if text := item.strip():
                yield text
        elif isinstance(item, dict):
            waiting += [each for key, each in item.items() if key not in ("role", "from", "type")]
        elif isinstance(item, list | tuple):
            waiting += item


def has_content(value: Any) -> bool:
    """Return whether a value is something else than null and empty text, lists and objects."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif item is not None and item is not False and not (isinstance(item, str | bytes) and not item.strip()):
            return True
    return False
