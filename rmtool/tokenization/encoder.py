"""From messages to token ids: the one way that train, eval and score share.

In: a `Record` and the model's tokenizer. Out: a `ResponseGroup`, or the reason why there is none.
The chat template is applied once to each complete conversation, without further special tokens; special tokens in
message text are tokenized as plain text. The reward is taken at the last id.
Cost: one template rendering and one tokenization per response (`rmtool.tokenization.batch_tokenizer`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rmtool.data.record import Message, Messages, Record
from rmtool.errors import Place, RmtoolError
from rmtool.tokenization.batch_tokenizer import BatchTokenizer, Conversation, Result
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group, shared_ids

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


@dataclass(frozen=True)
class EncodeResult:
    """The result for one record: its group, what happened to it, or its error; see `Encoder.encode`."""

    record: Record
    group: ResponseGroup | None
    event: str | None
    error: RmtoolError | None


@dataclass(frozen=True)
class Encoder:
    """The tokenization of one model: tokenizer, chat template and limits.

    tokenizer:  a transformers tokenizer with a chat template
    max_length: the limit in tokens, prompt and response together
    on_long:    "error", "drop", or "truncate_prompt" (truncate the left side of the prompt by what the longest
                response of the row needs: all its responses lose the same tokens, and stay comparable)
    on_empty:   "error", "drop" or "keep" responses without text
    strip_trailing_id: an id removed from the end of every sequence: the checkpoint's pad id, because transformers
                takes the reward at the last token that is not padding. Models trained by rmtool never end in it
    """

    tokenizer: Any
    max_length: int
    on_long: str = "error"
    on_empty: str = "error"
    strip_trailing_id: int | None = None

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
        options = [self.max_length, self.on_long, self.on_empty, self.strip_trailing_id]
        versions = [importlib.metadata.version(name) for name in ("rmtool", "transformers", "tokenizers", "jinja2")]
        return hashlib.sha256(json.dumps([vocabulary, options, versions]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Return the sha256 of the ids of FINGERPRINT_CONVERSATIONS: equal for tokenizers that give the same ids."""
        from jinja2 import TemplateError

        digest = hashlib.sha256()
        for conversation in FINGERPRINT_CONVERSATIONS:
            try:
                digest.update(json.dumps(self.ids(conversation)).encode())
            except TemplateError:  # a template may refuse an empty message; then it always does
                digest.update(b"refused")
        return digest.hexdigest()

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
                drafts = self.batch_tokenizer.render(self._conversations(record, skip_unlabeled) for record in batch)
                waiting.append((batch, pool.submit(self.batch_tokenizer.tokenize, drafts)))
                while waiting and (len(waiting) > PREFETCH_BATCHES or waiting[0][1].done()):
                    yield from self._results(*waiting.popleft(), skip_unlabeled)
            for work in waiting:
                yield from self._results(*work, skip_unlabeled)

    def _conversations(self, record: Record, skip_unlabeled: bool) -> list[Conversation]:
        if (skip_unlabeled and not record.preferences) or (self.on_empty != "keep" and _empty(record)):
            return []
        return [Conversation((*record.prompt, *response), record.tools) for response in record.responses]

    def _results(
        self, records: list[Record], results: Future[list[list[Result]]], skip_unlabeled: bool
    ) -> Iterator[EncodeResult]:
        for record, sequences in zip(records, results.result(), strict=True):
            if skip_unlabeled and not record.preferences:
                yield EncodeResult(record, None, "no_preference", None)
                continue
            try:
                group, event = self._group(record, sequences)
            except RmtoolError as error:
                yield EncodeResult(record, None, None, error)
            else:
                yield EncodeResult(record, group, event, None)

    def _group(self, record: Record, sequences: list[Result]) -> tuple[ResponseGroup | None, str | None]:
        if not sequences and self.on_empty == "drop":
            return None, "empty_response"
        if not sequences:
            hint = "remove the row, or allow it: data.on_empty=keep, --allow-empty"
            raise RmtoolError("E0306", "a response is empty", hint, record.place_of(_empty(record)[0]))
        ids = [self._require_ids(record.place_of(at), result) for at, result in enumerate(sequences)]
        return self._fit(record, build_group(ids))

    def _require_ids(self, place: Place, ids: Result) -> Ids:
        if isinstance(ids, ValueError):
            hint = "remove that text from the row, or use a different tokenizer"
            raise RmtoolError("E0307", f"cannot tokenize this conversation: {ids}", hint, place) from ids
        if isinstance(ids, Exception):
            what = f"the chat template does not support this conversation: {ids}"
            raise RmtoolError("E0307", what, "fix the message roles", place) from ids
        if not len(ids):
            raise RmtoolError("E0307", "the chat template produced no text", "fix the template", place)
        return self._without_tail(ids)

    def _fit(self, record: Record, group: ResponseGroup) -> tuple[ResponseGroup | None, str | None]:
        excess = group.longest - self.max_length
        if excess <= 0:
            return group, None
        if self.on_long == "drop":
            return None, "too_long"
        if self.on_long == "truncate_prompt" and excess <= self._removable(record, group):
            return _truncate(group, excess), "truncated"
        raise RmtoolError(
            "E0305",
            f"{group.longest} tokens exceed the max length of {self.max_length}",
            "raise data.max_length (--max-length), or set data.on_long (--on-long)",
            record.place_of(max(range(len(group.responses)), key=lambda at: len(group.responses[at]))),
        )

    def _removable(self, record: Record, group: ResponseGroup) -> int:
        """Return how many tokens can be truncated: those before the responses differ, or the prompt of a single one."""
        if len(group.responses) > 1:
            return len(group.prompt)
        empty = Conversation((*record.prompt, Message("assistant", "")), record.tools)
        ids = self._require_ids(record.place, self.batch_tokenizer.read([[empty]])[0][0])
        return shared_ids([ids, group.responses[0]])


def _truncate(group: ResponseGroup, excess: int) -> ResponseGroup:
    if len(group.prompt) >= excess:
        return group.truncate_prompt(excess)
    return build_group([group.responses[0][excess:].tolist()])  # a single response, with its prompt


def _empty(record: Record) -> list[int]:
    """Return the indices of the responses with neither text nor a tool call."""
    return [at for at, response in enumerate(record.responses) if response[-1].is_empty()]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield small batches first, so that a single record does not wait and an error in the first ones shows soon."""
    records, size = iter(records), 16
    while batch := list(itertools.islice(records, size)):
        yield batch
        size = min(2 * size, BATCH)
