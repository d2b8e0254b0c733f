"""From messages to token ids: the one function that train, eval and score all use.

In: a `Record` and the model's tokenizer. Out: a `ResponseGroup`, or why there is none.
The chat template is applied once to each whole conversation, without further special tokens; special tokens inside
the messages are encoded as ordinary text. The reward is read at the last id.
Cost: one template rendering and one tokenization per response (data.tokenize).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from rmtool.data.messages import Message, Messages
from rmtool.data.record import PairMetadata, Record
from rmtool.data.rejects import Rejects
from rmtool.errors import Place, RmtoolError
from rmtool.tokenization.batch_tokenizer import BatchTokenizer, Conversation, Result
from rmtool.tokenization.response_group import Ids, ResponseGroup, build_group, common_prefix

# Whatever reads these differently reads everything differently: turns, Unicode, blanks, and tokens that are only text.
FINGERPRINT_CONVERSATIONS: tuple[Messages, ...] = (
    (Message("user", "Hello."), Message("assistant", "Hi! How can I help?")),
    (Message("user", " two  spaces\n\nand lines\t"), Message("assistant", "")),
    (Message("user", "naïve café, 你好, Привет, 👋🏽"), Message("assistant", "été 1,000.5 %")),
    (Message("user", "<s></s><|im_end|><|eot_id|><pad>[PAD]"), Message("assistant", "<|endoftext|>")),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")),
)


BATCH = 256  # records that are tokenized together
PREFETCH_BATCHES = 4  # batches that are rendered while one is tokenized


@dataclass(frozen=True)
class EncodeResult:
    """What became of a record: `group` and `event` as `Encoder.encode` returns them, or the error it raises."""

    record: Record
    group: ResponseGroup | None
    event: str | None
    error: RmtoolError | None


@dataclass(frozen=True)
class Encoder:
    """How one model reads conversations.

    tokenizer:  a transformers tokenizer with a chat template
    max_length: tokens of the longest sequence allowed
    on_long:    "error", "drop", or "truncate_prompt" (cut the prompt's left side, by what the longest response of
                the row needs: all its responses lose the same, and stay comparable)
    on_empty:   "error", "drop" or "keep" a response without text
    strip_trailing_id: an id cut from the end of every sequence: the checkpoint's pad id, because transformers reads the
                reward at the last token that is not pad. What rmtool trains never ends in it
    """

    tokenizer: Any
    max_length: int
    on_long: str = "error"
    on_empty: str = "error"
    strip_trailing_id: int | None = None

    def ids(self, conversation: Sequence[Message], tools: str = "") -> list[int]:
        """The ids of one conversation, rendered and tokenized; `tools` is JSON, as in a `Record`.

        Raises:
            jinja2.TemplateError: the template refuses the conversation (role order, no system turn, ...).
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
        """sha256 of all that ids depend on; None where the tokenizer cannot be written down."""
        vocabulary = self.batch_tokenizer.written()
        if vocabulary is None:
            return None
        options = [self.max_length, self.on_long, self.on_empty, self.strip_trailing_id]
        versions = [importlib.metadata.version(name) for name in ("rmtool", "transformers", "tokenizers", "jinja2")]
        return hashlib.sha256(json.dumps([vocabulary, options, versions]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 over the ids of the canned conversations: equal for two tokenizers that read alike."""
        from jinja2 import TemplateError

        digest = hashlib.sha256()
        for conversation in FINGERPRINT_CONVERSATIONS:
            try:
                digest.update(json.dumps(self.ids(conversation)).encode())
            except TemplateError:  # a template may refuse an empty turn; then it always does
                digest.update(b"refused")
        return digest.hexdigest()

    def encode(self, record: Record) -> tuple[ResponseGroup | None, str | None]:
        """The record's group, and what happened to it: None, "truncated", or, without a group, "too_long" or
        "empty_response".

        Raises:
            RmtoolError: E0305 too long, E0306 an empty response, E0307 the conversation cannot be rendered or read.
        """
        (outcome,) = self.encode_many([record])
        if outcome.error:
            raise outcome.error
        return outcome.group, outcome.event

    def encode_many(self, records: Iterable[Record], skip_unlabeled: bool = False) -> Iterator[EncodeResult]:
        """As `encode`, in order, with errors as outcomes. While some records are tokenized, the next are rendered.

        With `skip_unlabeled`, records without preferences are not tokenized; their event is "no_preference".
        """
        with ThreadPoolExecutor(1) as pool:
            waiting = deque[tuple[list[Record], Future[list[list[Result]]]]]()
            for batch in _batches(records):
                drafts = self.batch_tokenizer.render(self._conversations(record, skip_unlabeled) for record in batch)
                waiting.append((batch, pool.submit(self.batch_tokenizer.tokenize, drafts)))
                while waiting and (len(waiting) > PREFETCH_BATCHES or waiting[0][1].done()):
                    yield from self._outcomes(*waiting.popleft(), skip_unlabeled)
            for work in waiting:
                yield from self._outcomes(*work, skip_unlabeled)

    def _conversations(self, record: Record, skip_unlabeled: bool) -> list[Conversation]:
        if (skip_unlabeled and not record.preferences) or (self.on_empty != "keep" and _empty(record)):
            return []
        return [Conversation((*record.prompt, *response), record.tools) for response in record.responses]

    def _outcomes(
        self, records: list[Record], results: Future[list[list[Result]]], skip_unlabeled: bool
    ) -> Iterator[EncodeResult]:
        for record, sequences in zip(records, results.result(), strict=True):
            if skip_unlabeled and not record.preferences:
                yield EncodeResult(record, None, "no_preference", None)
                continue
            try:
                group, event = self._tree(record, sequences)
            except RmtoolError as error:
                yield EncodeResult(record, None, None, error)
            else:
                yield EncodeResult(record, group, event, None)

    def _tree(self, record: Record, sequences: list[Result]) -> tuple[ResponseGroup | None, str | None]:
        if not sequences and self.on_empty == "drop":
            return None, "empty_response"
        if not sequences:
            hint = "remove the row, or allow it: data.on_empty=keep, --allow-empty"
            raise RmtoolError("E0306", "a response is empty", hint, record.place_of(_empty(record)[0]))
        ids = [self._require_ids(record.place_of(at), result) for at, result in enumerate(sequences)]
        return self._fit(record, build_group(ids))

    def _require_ids(self, place: Place, ids: Result) -> Ids:
        if isinstance(ids, ValueError):
            hint = "take that text out of the row, or use another tokenizer"
            raise RmtoolError("E0307", f"this conversation cannot be read as text: {ids}", hint, place) from ids
        if isinstance(ids, Exception):
            what = f"the chat template refuses this conversation: {ids}"
            raise RmtoolError("E0307", what, "mend the row's roles", place) from ids
        if not len(ids):
            raise RmtoolError("E0307", "the chat template renders nothing", "mend the template", place)
        return self._without_tail(ids)

    def _fit(self, record: Record, group: ResponseGroup) -> tuple[ResponseGroup | None, str | None]:
        excess = group.longest - self.max_length
        if excess <= 0:
            return group, None
        if self.on_long == "drop":
            return None, "too_long"
        if self.on_long == "truncate_prompt" and excess <= self._cuttable(record, group):
            return self._cut(group, excess), "truncated"
        raise RmtoolError(
            "E0305",
            f"{group.longest} tokens, and the limit is {self.max_length}",
            "raise the limit (data.max_length, --max-length), or see data.on_long, --on-long",
            record.place_of(max(range(len(group.responses)), key=lambda at: len(group.responses[at]))),
        )

    def _cuttable(self, record: Record, group: ResponseGroup) -> int:
        """Tokens that may go: those before the responses differ; with one response, those of its prompt."""
        if len(group.responses) > 1:
            return len(group.prompt)
        empty = Conversation((*record.prompt, Message("assistant", "")), record.tools)
        ids = self._require_ids(record.place, self.batch_tokenizer.read([[empty]])[0][0])
        return common_prefix([ids, group.responses[0]])

    @staticmethod
    def _cut(group: ResponseGroup, excess: int) -> ResponseGroup:
        return (
            group.truncate_prompt(excess)
            if len(group.prompt) >= excess
            else build_group([group.responses[0][excess:].tolist()])
        )


def _empty(record: Record) -> list[int]:
    """Which responses have no text."""
    return [at for at, response in enumerate(record.responses) if not response[-1].content.strip()]


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Few at first, so that a single one does not wait, and a mistake in the first shows soon."""
    records, size = iter(records), 16
    while batch := list(itertools.islice(records, size)):
        yield batch
        size = min(2 * size, BATCH)


class Trees(Protocol):
    """Where groups go: a list, or a file."""

    def append(self, group: ResponseGroup, /) -> None: ...


@dataclass
class TokenizedDataset:
    """Of the records that have a group: their labels, and where they stood among all; and what became of the others.

    counts: records that were dropped or changed, by reason
    failed: where records stood that have an error
    """

    metadata: list[PairMetadata] = field(default_factory=list)
    groups: Sequence[ResponseGroup] = ()
    kept: array[int] = field(default_factory=lambda: array("q"))
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)


def encode_all(
    encoder: Encoder,
    records: Iterable[Record],
    on_identical: str,
    advance: Callable[[], None],
    rejects: Rejects | None = None,
    groups: Trees | None = None,
    known: Iterable[PairMetadata] | None = None,
) -> TokenizedDataset:
    """Encode preference records; calls `advance` once per record. Bad ones go to `rejects`; without it, the first
    one raises.

    Args:
        known: the records' labels, where they are held already.
        on_identical: "error", "drop" or "keep" (to evaluate: a tie) pairs whose two responses have the same ids.
        groups: gets the groups; without it they are held in memory, in the result.

    Raises:
        RmtoolError: as `Encoder.encode`, and E0304 for a pair whose two responses have the same ids.
    """
    held = list[ResponseGroup]()
    tokenized, sink = TokenizedDataset(groups=held), held if groups is None else groups
    known = iter(known) if known is not None else None
    for at, outcome in enumerate(encoder.encode_many(records, skip_unlabeled=True)):
        advance()
        metadata = next(known) if known else outcome.record.metadata()
        group, event, error = outcome.group, outcome.event, outcome.error
        if group is not None and on_identical != "keep":
            try:
                metadata, event = without_identical(metadata, group, on_identical, event)
                event = (
                    "identical_after_rendering"
                    if event == "identical_text" and not _same_text(outcome.record)
                    else event
                )
            except RmtoolError as found:
                error = found
        if error:
            if rejects is None:
                raise error
            rejects.add(error, outcome.record.row)
            tokenized.failed.append(at)
            continue
        if event:
            tokenized.counts[event] += 1
        if group is not None and metadata.preferences:
            tokenized.metadata.append(metadata)
            tokenized.kept.append(at)
            sink.append(group)
    return tokenized


def _same_text(record: Record) -> bool:
    """Whether two responses that are compared are the same before they are rendered and cut."""
    return any(record.responses[winner] == record.responses[loser] for winner, loser in record.preferences)


def without_identical(
    metadata: PairMetadata, group: ResponseGroup, on_identical: str, event: str | None
) -> tuple[PairMetadata, str | None]:
    """The labels without the preferences between responses that have the same ids, and what happened to the record.

    Raises:
        RmtoolError: E0304 there is one, and `on_identical` is "error".
    """
    same = [np.array_equal(group.responses[a], group.responses[b]) for a, b in metadata.preferences]
    if not any(same):
        return metadata, event
    if on_identical == "error":
        raise RmtoolError(
            "E0304",
            "chosen and rejected have the same token ids, so nothing can be learned from this row",
            "remove the row, or set data.on_identical=drop",
            metadata.place,
        )
    preferences = tuple(itertools.compress(metadata.preferences, (not equal for equal in same)))
    margins = tuple(itertools.compress(metadata.margins, (not equal for equal in same)))
    return replace(metadata, preferences=preferences, margins=margins), "identical_text"
