"""What an unread field can be, by its name and its value: conversation, media, or metadata.

In: the fields of a row or message that nobody reads. Out: those that must not be left out.
The rule, in one place:

* The last known word of a name decides: `prompt_id` is an id, `source_text_prompt` a prompt. Words about judges and
  generation (`labelling_prompt`) decide wherever they are. Words of no list decide nothing.
* Numbers, booleans, null, empty text, lists and objects are never part of a conversation.
* MEDIA names (images, audio) and CONVERSATION names (question, history, functions) are, with any other value; weak
  ones (context, problem, text) only with a value that reads as text, not as an identifier. So are lists of messages,
  under any name but a LABEL or METADATA one. An object is looked into.
* UNKNOWN names are part of the conversation only in a row without a prompt, with a value that reads as text.
* LABEL names (source, category, note, data) are, too, but only with a sentence: two words and a full stop, question or
  exclamation mark, or six words, or a line break. Short labels are none.
* A name with both (`model_name_query`) needs a value that reads as text, too.
* METADATA names (ids, addresses, models, times, languages) never are, nor are those of text about responses.

Cost: names are looked up once; values only of names that are neither LABEL nor METADATA, if the row has a prompt.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    """What a field's name says about it."""

    CONVERSATION = auto()
    MEDIA = auto()
    LABEL = auto()
    METADATA = auto()
    UNKNOWN = auto()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# In the order in which one of several is suggested as the prompt.
_STRONG = ("prompt", "question", "instruction", "query", "message", "conversation", "dialogue", "dialog", "input",
           "prefill", "prefix")  # fmt: skip
_WEAK = _words(
    "abstract article ask background caption chat choice claim code constraint context conv convo ctx demonstration "
    "developer dialogs doc document evidence example excerpt fact function history hypothesis knowledge memory msg "
    "option partial passage persona post preamble premise problem request retrieved scenario schema shot snippet "
    "story sys system table thread tool trajectory transcript turn utterance"
)
_MEDIA = _words(
    "attachment audio figure frame image img media mm modal multimodal pdf photo picture pixel screenshot sound speech "
    "video wav"
)
_FILES = _words("base64 bytes data file link name path uri url value")  # image_path is an image; a path is not
_METADATA = _words(
    "answer at author candidate chosen completion config continuation country created critique date datetime email "
    "explanation feedback file generation gold groundtruth hash hour id identifier idx index judge judgement judgment "
    "key lang language license link locale md5 model name output owner path policy prediction preference provider "
    "rationale reason reasoning reference rejected reply response review seed sha sha256 skill solution summary "
    "template time timestamp tstamp uid updated uri url uuid verdict version winner worker year"
)
_LABEL = _words(
    "ability accuracy act age api attribute available avg base64 bool bytes category class classification cluster "
    "coherence comment complexity concept confidence correct correctness cost count credit criteria cutoff data "
    "dataset difference difficulty domain edit embedding end feature fingerprint flag flair fold following format "
    "gender generator group has hate height helpfulness honesty included info intent is keyword kind label len length "
    "level logp logprob logps margin max mean meta metadata method metric min modality mode note num number order "
    "origin overlap p param perplexity position prob probability quality rank ranking rate rating region relevance "
    "reward risk rubric safety sample score seconds sentiment setting severity size source split stage star start stat "
    "statistic status std step strength style subcategory subject subreddit subset tag target taxonomy temperature "
    "test title token topic toxicity truth truthfulness type usage use validation value variant verbosity voice vote "
    "weight width window"
)
_PLAIN = _words("body content description paragraph sentence text")  # source_text is not a source
_HELD = _words("email file page review source title url")  # what has such text: source_text, email_body
_ANYWHERE = _words(
    "annotation annotator critic eval evaluation evaluator generation grader judge judging labeling labelling"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")
_READS_AS_TEXT = re.compile(r"(?=.*[^\W\d_]).*(?:\s|[^\x00-\x7f]|[?!.]$)", re.DOTALL)
_SENTENCE = re.compile(r"\S.*(?:\s.*[?!.]|[。？！]|\n.*\S)$|(?:\S+\s+){5}\S", re.DOTALL)
_NAMED = frozenset({"tool", "function", "choice", "option"})  # as text, these are names
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))


_BEGINNING = frozenset({"start", "begin", "beginning", "step"})  # of a response: response_start
_RESPONSE = frozenset({"response", "answer", "completion", "solution", "output", "assistant", "reply", "initial"})


@functools.lru_cache(4096)
def kind_of(name: str) -> Kind:
    """Return what a name says about its field."""
    words = words_of(name)
    if name.lower() == "files" or any(word in _MEDIA for word in words):
        last = [word for word in words if word in _MEDIA or word in _METADATA or word in _LABEL or word in _FILES][-1]
        return Kind.MEDIA if last in _MEDIA or last in _FILES else Kind.LABEL if last in _LABEL else Kind.METADATA
    if any(word in _ANYWHERE for word in words):
        return Kind.METADATA
    if begins_response(name):
        return Kind.CONVERSATION
    for word in reversed(words):
        if word in _WEAK or word.endswith(_STRONG):
            return Kind.CONVERSATION
        if word in _METADATA or word in _LABEL:
            kind = Kind.METADATA if word in _METADATA else Kind.LABEL
            if words[-1] not in _PLAIN:
                return kind
            return Kind.CONVERSATION if word in _HELD else Kind.UNKNOWN
    return Kind.CONVERSATION if words and words[-1] in _PLAIN else Kind.UNKNOWN


@functools.lru_cache(1024)
def begins_response(path: str) -> bool:
    """Return whether a name is that of the beginning of a response, which the response continues."""
    words = words_of(path)
    last = words[-1] if words else ""
    return (
        last in ("prefill", "prefix")
        or (last in _BEGINNING and not _RESPONSE.isdisjoint(words))
        or ("partial" in words and last in _RESPONSE)
    )


def words_of(name: str) -> list[str]:
    """Return the words of a name, in lower case and singular: user_prompts, userPrompts."""
    return [_singular(word.lower()) for word in _WORD.findall(name)]


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-1] if word.endswith("s") and word not in _METADATA | _LABEL | _WEAK else word


def conversation_part(path: str, value: Any, kind: Kind, no_prompt: bool) -> tuple[str, Any] | None:
    """Return the path and value of what could be part of the conversation in an unread field, or None."""
    if isinstance(value, dict) and not is_message(value):
        return _part_of_object(path, value, kind, no_prompt)
    if kind is Kind.METADATA or not any(texts(value)):
        return None
    if kind is Kind.LABEL:
        held = no_prompt and (is_message(value) or any(map(_SENTENCE.match, texts(value))))
    elif is_message(value) or is_messages(value):
        held = True
    elif kind is Kind.CONVERSATION:
        held = not isinstance(value, str) or _is_text_of(path, value)
    else:
        held = no_prompt and isinstance(value, str) and reads_as_text(value)
    return (path, value) if held else None


def _part_of_object(path: str, value: dict[str, Any], kind: Kind, no_prompt: bool) -> tuple[str, Any] | None:
    for name, item in value.items():
        inner = kind_of(name)
        if inner is Kind.UNKNOWN and kind in (Kind.CONVERSATION, Kind.LABEL):
            inner = kind
        if inner is Kind.MEDIA and kind is not Kind.METADATA and holds_media(item):
            return f"{path}.{name}", item
        looked_at = no_prompt and (inner is Kind.CONVERSATION or kind is not Kind.METADATA)
        looked_at |= inner is kind is Kind.CONVERSATION
        if looked_at and (found := conversation_part(f"{path}.{name}", item, inner, no_prompt)):
            return found
    return None


def _is_text_of(path: str, value: str) -> bool:
    """Return whether text under a CONVERSATION name is more than an identifier."""
    last = words_of(path)[-1:]
    if last and last[0] in _NAMED:
        return value.lstrip().startswith(("[", "{")) or "\n" in value.strip()
    return (is_strong(path) and _METADATA.isdisjoint(words_of(path))) or begins_response(path) or reads_as_text(value)


def holds_media(value: Any) -> bool:
    """Return whether a value under a MEDIA name is more than a number of them."""
    return not isinstance(value, bool | int | float) and has_content(value)


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


def most_alike(name: str, others: Iterable[str]) -> str:
    """Return the name that has the last word of `name` and the most of its words, or COLUMN."""
    words = words_of(name)
    alike = [other for other in sorted(others) if words and words[-1:] == words_of(other)[-1:] and len(words) > 1]
    return max(alike, key=lambda other: len(set(words).intersection(words_of(other))), default="COLUMN")


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
