"""From messages to token ids: the one way that train, eval and score share.

In: a `Record` and the model's tokenizer. Out: a `ResponseGroup`, or the reason why there is none.
The chat template is applied once to each complete conversation, without further special tokens; special tokens in
message text are tokenized as plain text. The reward is taken at the last id.
Cost: one template rendering and one tokenization per response (`rmtool.tokenization.batch_tokenizer`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rmtool.data.notations import has_media_token
from rmtool.data.record import Message, Messages, Record
from rmtool.errors import Place, RmtoolError
from rmtool.packages import version_of
from rmtool.tokenization.batch_tokenizer import BatchTokenizer, Conversation, NeedsTransformersError, Result
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group
from rmtool.tokenization.template_check import TemplateCheck
from rmtool.tokenization.truncation import shorten

# A tokenizer or template that differs anywhere should differ here: turns, Unicode, white space, special tokens as text.
FINGERPRINT_CONVERSATIONS: tuple[Messages, ...] = (
    (Message("user", "Hello."), Message("assistant", "Hi! How can I help?")),
    (Message("user", " two  spaces\n\nand lines\t"), Message("assistant", "")),
    (Message("user", "naïve café, 你好, Привет, 👋🏽"), Message("assistant", "été 1,000.5 %")),
    (Message("user", "<s></s><|im_end|><|eot_id|><pad>[PAD]"), Message("assistant", "<|endoftext|>")),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")),
)


BATCH = 256  # records tokenized together
PREFETCH_BATCHES = 4  # batches rendered while one is tokenized
_SLACK = 8  # tokens by which the lengths of two responses can change with the text before them, generously


@dataclass(frozen=True)
class EncodeResult:
    """The result for one record: its group, what happened to it, or its error; see `Encoder.encode`.

    changes: counts of what is different from the row: "continued", "assistant_twice", "media_token", "ends_in_token",
        "truncated_messages", "truncated_tokens"
    """

    record: Record
    group: ResponseGroup | None
    event: str | None
    error: RmtoolError | None
    changes: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        return ({self.event: 1} if self.event else {}) | self.changes


@dataclass(frozen=True)
class Encoder:
    """The tokenization of one model: tokenizer, chat template and limits.

    tokenizer:  a transformers tokenizer with a chat template
    max_length: the limit in tokens, prompt and response together
    on_long:    "error", "drop", or "truncate_prompt" (shorten the prompt until the longest response of the row fits:
                all its responses get the same prompt, and stay comparable); see `rmtool.tokenization.truncation`
    on_empty:   "error", "drop" or "keep" responses without text
    strip_trailing_id: an id removed from the end of every sequence: the checkpoint's pad id, because transformers
                takes the reward at the last token that is not padding. Models trained by rmtool never end in it
    vocabulary: the number of ids that the model has an embedding for
    """

    tokenizer: Any
    max_length: int
    on_long: str = "error"
    on_empty: str = "error"
    strip_trailing_id: int | None = None
    vocabulary: int | None = None

    def ids(self, conversation: Sequence[Message], tools: str = "") -> list[int]:
        """Render and tokenize one conversation; `tools` is JSON, as in a `Record`.

        Raises:
            jinja2.TemplateError: the template does not support the conversation (role order, system message, ...).
        """
        result = self.batch_tokenizer.read([[Conversation(tuple(conversation), tools)]])[0][0]
        if isinstance(result, Exception):
            raise result
        return self._without_tail(result).tolist()

    @functools.cached_property
    def batch_tokenizer(self) -> BatchTokenizer:
        return BatchTokenizer(self.tokenizer)

    @functools.cached_property
    def template_check(self) -> TemplateCheck:
        return TemplateCheck(self.tokenizer)

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special and token.content.strip())

    def _without_tail(self, ids: Ids) -> Ids:
        if self.strip_trailing_id is not None:
            while len(ids) > 1 and ids[-1] == self.strip_trailing_id:
                ids = ids[:-1]
        return ids

    def identity(self) -> str | None:
        """Return the sha256 of everything that ids depend on; None if the tokenizer cannot be serialized."""
        vocabulary = self.batch_tokenizer.serialized()
        if vocabulary is None:
            return None
        options = [self.max_length, self.on_long, self.on_empty, self.strip_trailing_id, self.vocabulary]
        versions = [version_of(name) for name in ("transformers", "tokenizers", "jinja2")]
        digest = hashlib.sha256(json.dumps([vocabulary, options, versions]).encode())
        for folder in ("data", "tokenization"):  # a different version of this code finds no entries
            for file in sorted((Path(__file__).parent.parent / folder).glob("*.py")):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return two sha256 of ids, the same for tokenizers that give the same: of all FINGERPRINT_CONVERSATIONS, empty
        where transformers cannot tokenize all, and of those without control tokens.
        """
        plain = [chat for chat in FINGERPRINT_CONVERSATIONS if "<" not in chat[0].content]
        try:
            every = self._digest(FINGERPRINT_CONVERSATIONS)
        except NeedsTransformersError:
            every = ""
        return f"{every}:{self._digest(plain)}"

    def _digest(self, conversations: Sequence[Messages]) -> str:
        from jinja2 import TemplateError

        digest = hashlib.sha256()
        for conversation in conversations:
            try:
                digest.update(json.dumps(self.ids(conversation)).encode())
            except TemplateError:  # a template may refuse an empty message; then it always does
                digest.update(b"refused")
        return digest.hexdigest()

    def matches(self, fingerprint: str) -> bool | None:
        """Return whether a fingerprint is that of this encoder; None if they have no part in common to compare."""
        parts = zip(self.fingerprint().split(":"), fingerprint.split(":"), strict=False)
        equal = [one == other for one, other in parts if one and other]
        return all(equal) if equal else None

    def encode(self, record: Record) -> tuple[ResponseGroup | None, str | None]:
        """Return the record's group and what happened to it: None, "truncated", or, without a group, "too_long" or
        "empty_response".

        Raises:
            RmtoolError: E0305 longer than max length; E0306 an empty response; E0307 the conversation cannot be
                rendered or tokenized.
        """
        (result,) = self.encode_many([record])
        if result.error:
            raise result.error
        return result.group, result.event

    def encode_many(self, records: Iterable[Record], skip_unlabeled: bool = False) -> Iterator[EncodeResult]:
        """Encode records in order, errors as results; the next records are rendered while some are tokenized.

        With `skip_unlabeled`, records without preferences are not tokenized; their event is "no_preference".
        """
        with ThreadPoolExecutor(1) as pool:
            waiting = deque[tuple[list[Record], Future[list[list[Result]]]]]()
            for batch in _batches(records):
                drafts = self.batch_tokenizer.render(self._wanted(record, skip_unlabeled) for record in batch)
                waiting.append((batch, pool.submit(self.batch_tokenizer.tokenize, drafts)))
                while waiting and (len(waiting) > PREFETCH_BATCHES or waiting[0][1].done()):
                    yield from self._results(*waiting.popleft(), skip_unlabeled)
            for work in waiting:
                yield from self._results(*work, skip_unlabeled)

    def _conversations(self, record: Record) -> list[Conversation]:
        given = record.tools, record.template_kwargs
        return [Conversation(record.conversation(at), *given) for at in range(len(record.responses))]

    def _wanted(self, record: Record, skip_unlabeled: bool) -> list[Conversation]:
        """Return the conversations of a record to tokenize: none if it is dropped, or invalid, anyway."""
        skip = (skip_unlabeled and not record.preferences) or (self.on_empty != "keep" and _empty(record))
        return [] if skip else self._conversations(record)

    def _results(
        self, records: list[Record], results: Future[list[list[Result]]], skip_unlabeled: bool
    ) -> Iterator[EncodeResult]:
        for record, sequences in zip(records, results.result(), strict=True):
            if skip_unlabeled and not record.preferences:
                yield EncodeResult(record, None, "no_preference", None)
                continue
            try:
                yield self._group(record, sequences)
            except RmtoolError as error:
                yield EncodeResult(record, None, None, error)

    def _group(self, record: Record, sequences: list[Result]) -> EncodeResult:
        if not sequences and self.on_empty == "drop":
            return EncodeResult(record, None, "empty_response", None)
        if not sequences:
            hint = "remove the row, or set data.on_empty=keep"
            raise RmtoolError("E0306", "a response is empty", hint, record.place_of(_empty(record)[0]))
        group = self._require_group(record, sequences)
        responses = range(len(sequences))
        changes = {"continued": 1} if any(map(record.continues, responses)) else {}
        if any(map(record.repeats_assistant, responses)):
            changes["assistant_twice"] = 1
        if any(has_media_token(message.content) for message in record.prompt):
            changes["media_token"] = 1
        if any(response[-1].content.rstrip().endswith(self.special_tokens) for response in record.responses):
            changes["ends_in_token"] = 1
        if group.longest <= self.max_length:
            return EncodeResult(record, group, None, None, changes)
        if self.on_long == "drop":
            return EncodeResult(record, None, "too_long", None)
        prompt = self._short_prompt(record, group) if self.on_long == "truncate_prompt" else None
        if prompt is None or (short := self._encode_with(record, prompt)).longest > self.max_length:
            raise self._too_long(record, group)
        changes["truncated_messages"] = len(record.prompt) - len(prompt)
        changes["truncated_tokens"] = group.longest - short.longest
        return EncodeResult(record, short, "truncated", None, changes)

    def _require_group(self, record: Record, sequences: list[Result]) -> ResponseGroup:
        ids = list[Ids]()
        for at, (result, conversation) in enumerate(zip(sequences, self._conversations(record), strict=True)):
            ids.append(self._require_ids(record.place_of(at), result, conversation))
            if loss := self.template_check.loss(conversation):
                raise RmtoolError("E0307", *loss, record.place_of(at))
        return build_group(ids)

    def _require_ids(self, place: Place, ids: Result, conversation: Conversation) -> Ids:
        if isinstance(ids, ValueError):
            hint = "remove that text from the row, or use a different tokenizer"
            raise RmtoolError("E0307", f"cannot tokenize this conversation: {ids}", hint, place) from ids
        if isinstance(ids, Exception):
            general = "the chat template does not support this conversation", "fix the roles or tool calls"
            what, hint = self.template_check.unsupported_role(conversation.messages) or general
            raise RmtoolError("E0307", f"{what}: {ids}", hint, place) from ids
        if not len(ids):
            raise RmtoolError("E0307", "the chat template produced no text", "fix the template", place)
        if self.vocabulary is not None and (largest := int(ids.max())) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            what = f"token {token!r} has id {largest}, but the model has only {self.vocabulary} embeddings"
            raise RmtoolError("E0307", what, "remove the row, or use the tokenizer of this model", place)
        return self._without_tail(ids)

    def _encode_with(self, record: Record, prompt: Messages) -> ResponseGroup:
        """Encode a record with a different prompt."""
        record = replace(record, prompt=prompt)
        return self._require_group(record, self.batch_tokenizer.read([self._conversations(record)])[0])

    def _short_prompt(self, record: Record, group: ResponseGroup) -> Messages | None:
        """Return the prompt with which the longest responses fit: they decide, whatever the number of responses."""
        sized = zip(map(len, group.responses), record.responses, strict=True)
        long = [response for size, response in sized if size + len(group.prompt) > group.longest - _SLACK]
        record = replace(record, responses=tuple(long), places=())
        return shorten(record.prompt, lambda prompt: self._encode_with(record, prompt).longest <= self.max_length)

    def _too_long(self, record: Record, group: ResponseGroup) -> RmtoolError:
        truncate = self.on_long == "truncate_prompt"
        what = f"{group.longest} tokens exceed the max length of {self.max_length}"
        raises = "raise data.max_length"
        return RmtoolError(
            "E0305",
            f"{what}, and the prompt cannot be truncated enough" if truncate else what,
            raises if truncate else f"{raises}, or set data.on_long=truncate_prompt",
            record.place_of(max(range(len(group.responses)), key=lambda at: len(group.responses[at]))),
        )


def _empty(record: Record) -> list[int]:
    """Return the indices of the responses with neither text nor a tool call."""
    return [at for at, response in enumerate(record.responses) if response[-1].is_empty()]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield small batches first, so that a single record does not wait and an error in the first ones shows soon."""
    records, size = iter(records), 16
    while batch := list(itertools.islice(records, size)):
        yield batch
        size = min(2 * size, BATCH)
