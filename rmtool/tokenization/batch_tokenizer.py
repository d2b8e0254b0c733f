"""Conversations to token ids, many at once.

In: groups of conversations that share a beginning (the responses of one prompt), and a transformers tokenizer with a
chat template. Out: int32 ids of each, or the exception of one that cannot be read: what
`apply_chat_template(..., sanitize_control_tokens=True)` gives, where added tokens inside messages are only text.
Cost: one rendering per conversation. A group's common beginning is tokenized once, where the template writes a special
token at its end; all texts of a call are tokenized together, by the tokenizer's own threads.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmtool.data.messages import Message, Messages
from rmtool.tokenization.response_group import Ids

Result = Ids | Exception  # a jinja2.TemplateError, or a ValueError where text cannot be told from a control token

# transformers' marks around control tokens in messages; it takes them out of what users write.
_NONE = np.zeros(0, dtype=np.int32)
_MARKS = "\U000f0000\U000f0001"
_PLAIN: tuple[Messages, ...] = tuple(
    (Message("user", ask), Message("assistant", answer), Message("user", answer), Message("assistant", ask))[:turns]
    for ask, answer in (("Hello.", "Hi!"), (" a  b\n\n", "\n c\t"), ("naïve 你好 👋🏽", "1,000.5 %"), ("'s", " 's "))
    for turns in (2, 4)
)


@dataclass(frozen=True)
class Conversation:
    """`tools` is JSON of a list, or empty."""

    messages: Messages
    tools: str = ""


@dataclass(frozen=True)
class Draft:
    """A rendered group: what follows `head` in each text; or an error; or a conversation that is read by itself."""

    head: str
    tails: tuple[str | Conversation | Exception, ...]


def refusals() -> tuple[type[Exception], ...]:
    """What a chat template raises for a conversation that it was not written for: its own refusal, or what an
    expression in it does to a value of another kind.
    """
    from jinja2 import TemplateError

    return TemplateError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, ValueError


class BatchTokenizer:
    """Reads conversations as one tokenizer does; the tokenizer must not be changed afterwards."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # settings of the tokenizer change while it reads
        self._suspect = _any_of([token for token in tokenizer.get_added_vocab() if not token.isspace()], *_MARKS)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._folded = self._find_folded()
        self._cuts: tuple[str, ...] = ()
        if self._backend is not None and not self._agrees():
            self._backend = None
        if self._backend is not None:
            self._cuts = self._find_cuts()
            if not self._agrees():
                self._cuts = ()

    def read(self, groups: Iterable[Sequence[Conversation]]) -> list[list[Result]]:
        """The ids of every conversation."""
        return self.tokenize(self.render(groups))

    def written(self) -> list[Any] | None:
        """All that ids depend on, as JSON takes it; None where the tokenizer has no such form."""
        if self._backend is None:
            return None
        return [self._backend.to_str(), self.tokenizer.chat_template, self.tokenizer.special_tokens_map]

    def render(self, groups: Iterable[Sequence[Conversation]]) -> list[Draft]:
        """The groups as text. Computes in Python, beside `tokenize` in another thread."""
        groups = list(groups)
        flat = [conversation for group in groups for conversation in group]
        texts = iter(self._render_all(flat))
        return [self._draft([next(texts) for _ in group]) for group in groups]

    def tokenize(self, drafts: Sequence[Draft]) -> list[list[Result]]:
        """The ids of drafts; most of the time other Python threads may run."""
        texts = [text for draft in drafts for text in (draft.head, *draft.tails) if isinstance(text, str)]
        with self._lock:
            known = iter(self._ids(texts))
            return [self._results(draft, known) for draft in drafts]

    def _results(self, draft: Draft, known: Iterator[Ids]) -> list[Result]:
        head, results = next(known), list[Result]()
        for tail in draft.tails:
            if isinstance(tail, str):
                results.append(np.concatenate((head, next(known))))
            else:
                results.append(self._sanitised(tail) if isinstance(tail, Conversation) else tail)
        return results

    def _ids(self, texts: list[str]) -> list[Ids]:
        if self._backend is None:
            assert not any(texts)
            return [_NONE] * len(texts)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(item.ids, dtype=np.int32) for item in found]

    def _render_all(self, conversations: Sequence[Conversation]) -> list[str | Conversation | Exception]:
        plain = [conversation for conversation in conversations if self._is_plain(conversation)]
        texts = iter(self._render_plain(plain))
        kept = {id(conversation) for conversation in plain}
        return [next(texts) if id(conversation) in kept else conversation for conversation in conversations]

    def _is_plain(self, conversation: Conversation) -> bool:
        """Whether nothing in it could be taken for a control token."""
        messages = conversation.messages
        return (
            self._backend is not None
            and not self._folded
            and not conversation.tools
            and not any(message.extra for message in messages)
            and not self._suspect.search("\n".join([message.content for message in messages]))
        )

    def _render_plain(self, conversations: Sequence[Conversation]) -> list[str | Exception]:
        chats = [[message.as_dict() for message in conversation.messages] for conversation in conversations]
        if not chats:
            return []
        try:
            return list(self.tokenizer.apply_chat_template(chats, tokenize=False))
        except refusals() as error:  # one of them; the others are rendered all the same
            if len(chats) == 1:
                return [error]
            middle = len(chats) // 2
            return self._render_plain(conversations[:middle]) + self._render_plain(conversations[middle:])

    def _sanitised(self, conversation: Conversation) -> Result:
        if self._folded and any(self._hides(message.content) for message in conversation.messages):
            return ValueError("once normalized, its text holds a control token of the tokenizer")
        try:
            ids = self.tokenizer.apply_chat_template(
                [message.as_dict() for message in conversation.messages],
                tools=json.loads(conversation.tools) if conversation.tools else None,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        except refusals() as error:  # or a ValueError, where text cannot be told from a control token
            return error
        return np.array(ids, dtype=np.int32)

    def _draft(self, texts: list[str | Conversation | Exception]) -> Draft:
        plain = [text for text in texts if isinstance(text, str)]
        if len(plain) < len(texts) or len(texts) < 2 or not self._cuts:
            return Draft("", tuple(texts))
        shared = functools.reduce(lambda length, text: _common(plain[0], text, length), plain[1:], len(plain[0]))
        cut = max(plain[0].rfind(token, 0, shared) for token in self._cuts)
        return Draft(plain[0][:cut], tuple(text[cut:] for text in plain)) if cut > 0 else Draft("", tuple(texts))

    def _find_cuts(self) -> tuple[str, ...]:
        """Special tokens that the template writes and at which text may be cut without another reading of either part:
        the tokenizer looks for them first, in the text as it is, and reads what lies between them by itself.
        """
        assert self._backend is not None
        every = self._backend.get_added_tokens_decoder()
        written = {
            int(token)
            for (result,) in self.read([[Conversation(messages)] for messages in _PLAIN])
            if isinstance(result, np.ndarray)
            for token in result
        }
        contents = [token.content for token in every.values()]
        return tuple(
            token.content
            for number, token in every.items()
            if number in written
            and not (token.normalized or token.lstrip or token.single_word or token.content[0].isspace())
            and not any(_overlap(other, token.content) for other in contents)
        )

    def _find_folded(self) -> re.Pattern[str] | None:
        """What added tokens look like that the tokenizer looks for in normalized text only."""
        if self._backend is None or self._backend.normalizer is None:
            return None
        added = self._backend.get_added_tokens_decoder().values()
        folded = [self._backend.normalizer.normalize_str(token.content) for token in added if token.normalized]
        return _any_of(hidden) if (hidden := [token for token in folded if token and not token.isspace()]) else None

    def _hides(self, text: str) -> bool:
        """Whether text holds such a token though not in its own letters, so that transformers would miss it."""
        assert self._backend is not None
        assert self._folded
        visible = self._suspect.sub("\n", text)
        return bool(self._folded.search(self._backend.normalizer.normalize_str(visible)))

    def _agrees(self) -> bool:
        """Whether plain conversations have the ids that transformers gives them one by one."""
        groups = [[Conversation(messages), Conversation((*messages[:-1], messages[0]))] for messages in _PLAIN]
        for group, found in zip(groups, self.read(groups), strict=True):
            for conversation, ids in zip(group, found, strict=True):
                expected = self._sanitised(conversation)
                if isinstance(expected, Exception):
                    continue
                if isinstance(ids, Exception) or not np.array_equal(expected, ids):
                    return False
        return True


def _any_of(texts: Sequence[str], *more: str) -> re.Pattern[str]:
    """Finds the longest of the texts; without any, nothing."""
    return re.compile("|".join(map(re.escape, [*sorted(texts, key=len, reverse=True), *more])) or "(?!)")


def _common(a: str, b: str, limit: int) -> int:
    """Length of the longest common prefix, at most `limit`."""
    low, high = 0, min(limit, len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _overlap(other: str, token: str) -> bool:
    """Whether a match of `other` can cover a part of a match of `token`."""
    if other == token:
        return any(token.endswith(token[:size]) for size in range(1, len(token)))
    return token in other or any(other.endswith(token[:size]) for size in range(1, len(token)))
