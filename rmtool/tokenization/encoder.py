"""From messages to token ids: the one function that train, eval and score all use.

In: a `Record` and the model's tokenizer. Out: a `TokenTree`, or why there is none.
The chat template is applied once to each whole conversation, without further special tokens; special tokens inside
the messages are encoded as ordinary text. The reward is read at the last id.
Cost: one template rendering and one tokenisation per response (data.tokenise).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from rmtool.data.messages import Message, Messages
from rmtool.data.record import Labels, Record
from rmtool.data.rejects import Rejects
from rmtool.errors import Place, RmtoolError
from rmtool.tokenization.batch_tokenizer import Conversation, Result, Tokeniser
from rmtool.tokenization.response_group import Ids, TokenTree, build_tree, common_prefix

# Whatever reads these differently reads everything differently: turns, Unicode, blanks, and tokens that are only text.
CANNED: tuple[Messages, ...] = (
    (Message("user", "Hello."), Message("assistant", "Hi! How can I help?")),
    (Message("user", " two  spaces\n\nand lines\t"), Message("assistant", "")),
    (Message("user", "naïve café, 你好, Привет, 👋🏽"), Message("assistant", "été 1,000.5 %")),
    (Message("user", "<s></s><|im_end|><|eot_id|><pad>[PAD]"), Message("assistant", "<|endoftext|>")),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")),
)


BATCH = 256  # records that are tokenised together
AHEAD = 4  # batches that are rendered while one is tokenised


@dataclass(frozen=True)
class Outcome:
    """What became of a record: `tree` and `event` as `Encoder.encode` returns them, or the error it raises."""

    record: Record
    tree: TokenTree | None
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
    drop_tail:  an id cut from the end of every sequence: the checkpoint's pad id, because transformers reads the
                reward at the last token that is not pad. What rmtool trains never ends in it
    """

    tokenizer: Any
    max_length: int
    on_long: str = "error"
    on_empty: str = "error"
    drop_tail: int | None = None

    def ids(self, conversation: Sequence[Message], tools: str = "") -> list[int]:
        """The ids of one conversation, rendered and tokenised; `tools` is JSON, as in a `Record`.

        Raises:
            jinja2.TemplateError: the template refuses the conversation (role order, no system turn, ...).
        """
        result = self.tokeniser.read([[Conversation(tuple(conversation), tools)]])[0][0]
        if isinstance(result, Exception):
            raise result
        return self._without_tail(result).tolist()

    @functools.cached_property
    def tokeniser(self) -> Tokeniser:
        return Tokeniser(self.tokenizer)

    def _without_tail(self, ids: Ids) -> Ids:
        if self.drop_tail is not None:
            while len(ids) > 1 and ids[-1] == self.drop_tail:
                ids = ids[:-1]
        return ids

    def identity(self) -> str | None:
        """sha256 of all that ids depend on; None where the tokenizer cannot be written down."""
        vocabulary = self.tokeniser.written()
        if vocabulary is None:
            return None
        options = [self.max_length, self.on_long, self.on_empty, self.drop_tail]
        versions = [metadata.version(name) for name in ("rmtool", "transformers", "tokenizers", "jinja2")]
        return hashlib.sha256(json.dumps([vocabulary, options, versions]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 over the ids of the canned conversations: equal for two tokenizers that read alike."""
        from jinja2 import TemplateError

        digest = hashlib.sha256()
        for conversation in CANNED:
            try:
                digest.update(json.dumps(self.ids(conversation)).encode())
            except TemplateError:  # a template may refuse an empty turn; then it always does
                digest.update(b"refused")
        return digest.hexdigest()

    def encode(self, record: Record) -> tuple[TokenTree | None, str | None]:
        """The record's tree, and what happened to it: None, "truncated", or (tree None) "long" or "empty".

        Raises:
            RmtoolError: E0305 too long, E0306 an empty response, E0307 the conversation cannot be rendered or read.
        """
        (outcome,) = self.encode_many([record])
        if outcome.error:
            raise outcome.error
        return outcome.tree, outcome.event

    def encode_many(self, records: Iterable[Record], judged: bool = False) -> Iterator[Outcome]:
        """As `encode`, in order, with errors as outcomes. While some records are tokenised, the next are rendered.

        With `judged`, records without preferences are not tokenised; their event is "tied".
        """
        with ThreadPoolExecutor(1) as pool:
            waiting = deque[tuple[list[Record], Future[list[list[Result]]]]]()
            for batch in _batches(records):
                drafts = self.tokeniser.render(self._conversations(record, judged) for record in batch)
                waiting.append((batch, pool.submit(self.tokeniser.tokenise, drafts)))
                while waiting and (len(waiting) > AHEAD or waiting[0][1].done()):
                    yield from self._outcomes(*waiting.popleft(), judged)
            for work in waiting:
                yield from self._outcomes(*work, judged)

    def _conversations(self, record: Record, judged: bool) -> list[Conversation]:
        if (judged and not record.preferences) or (self.on_empty != "keep" and _empty(record)):
            return []
        return [Conversation((*record.prompt, *response), record.tools) for response in record.responses]

    def _outcomes(self, records: list[Record], results: Future[list[list[Result]]], judged: bool) -> Iterator[Outcome]:
        for record, sequences in zip(records, results.result(), strict=True):
            if judged and not record.preferences:
                yield Outcome(record, None, "tied", None)
                continue
            try:
                tree, event = self._tree(record, sequences)
            except RmtoolError as error:
                yield Outcome(record, None, None, error)
            else:
                yield Outcome(record, tree, event, None)

    def _tree(self, record: Record, sequences: list[Result]) -> tuple[TokenTree | None, str | None]:
        if not sequences and self.on_empty == "drop":
            return None, "empty"
        if not sequences:
            hint = "remove the row, or allow it: data.on_empty=keep, --allow-empty"
            raise RmtoolError("E0306", "a response is empty", hint, record.place_of(_empty(record)[0]))
        ids = [self._require_ids(record.place_of(at), result) for at, result in enumerate(sequences)]
        return self._fit(record, build_tree(ids))

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

    def _fit(self, record: Record, tree: TokenTree) -> tuple[TokenTree | None, str | None]:
        excess = tree.longest - self.max_length
        if excess <= 0:
            return tree, None
        if self.on_long == "drop":
            return None, "long"
        if self.on_long == "truncate_prompt" and excess <= self._cuttable(record, tree):
            return self._cut(tree, excess), "truncated"
        raise RmtoolError(
            "E0305",
            f"{tree.longest} tokens, and the limit is {self.max_length}",
            "raise the limit (data.max_length, --max-length), or see data.on_long, --on-long",
            record.place_of(max(range(len(tree.responses)), key=lambda at: len(tree.responses[at]))),
        )

    def _cuttable(self, record: Record, tree: TokenTree) -> int:
        """Tokens that may go: those before the responses differ; with one response, those of its prompt."""
        if len(tree.responses) > 1:
            return len(tree.prompt)
        empty = Conversation((*record.prompt, Message("assistant", "")), record.tools)
        ids = self._require_ids(record.place, self.tokeniser.read([[empty]])[0][0])
        return common_prefix([ids, tree.responses[0]])

    @staticmethod
    def _cut(tree: TokenTree, excess: int) -> TokenTree:
        return (
            tree.drop_left(excess) if len(tree.prompt) >= excess else build_tree([tree.responses[0][excess:].tolist()])
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
    """Where trees go: a list, or a file."""

    def append(self, tree: TokenTree, /) -> None: ...


@dataclass
class Encoded:
    """Of the records that have a tree: their labels, and where they stood among all; and what became of the others.

    counts: records that were dropped or changed, by reason
    failed: where records stood that have an error
    """

    labels: list[Labels] = field(default_factory=list)
    trees: Sequence[TokenTree] = ()
    kept: array[int] = field(default_factory=lambda: array("q"))
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)


def encode_all(
    encoder: Encoder,
    records: Iterable[Record],
    on_identical: str,
    advance: Callable[[], None],
    rejects: Rejects | None = None,
    trees: Trees | None = None,
    known: Iterable[Labels] | None = None,
) -> Encoded:
    """Encode preference records; calls `advance` once per record. Bad ones go to `rejects`; without it, the first
    one raises.

    Args:
        known: the records' labels, where they are held already.
        on_identical: "error", "drop" or "keep" (to evaluate: a tie) pairs whose two responses have the same ids.
        trees: gets the trees; without it they are held in memory, in the result.

    Raises:
        RmtoolError: as `Encoder.encode`, and E0304 for a pair whose two responses have the same ids.
    """
    held = list[TokenTree]()
    encoded, sink = Encoded(trees=held), held if trees is None else trees
    known = iter(known) if known is not None else None
    for at, outcome in enumerate(encoder.encode_many(records, judged=True)):
        advance()
        labels = next(known) if known else outcome.record.labels()
        tree, event, error = outcome.tree, outcome.event, outcome.error
        if tree is not None and on_identical != "keep":
            try:
                labels, event = without_identical(labels, tree, on_identical, event)
                event = "alike" if event == "identical" and not _same_text(outcome.record) else event
            except RmtoolError as found:
                error = found
        if error:
            if rejects is None:
                raise error
            rejects.add(error, outcome.record.row)
            encoded.failed.append(at)
            continue
        if event:
            encoded.counts[event] += 1
        if tree is not None and labels.preferences:
            encoded.labels.append(labels)
            encoded.kept.append(at)
            sink.append(tree)
    return encoded


def _same_text(record: Record) -> bool:
    """Whether two responses that are compared are the same before they are rendered and cut."""
    return any(record.responses[winner] == record.responses[loser] for winner, loser in record.preferences)


def without_identical(
    labels: Labels, tree: TokenTree, on_identical: str, event: str | None
) -> tuple[Labels, str | None]:
    """The labels without the preferences between responses that have the same ids, and what happened to the record.

    Raises:
        RmtoolError: E0304 there is one, and `on_identical` is "error".
    """
    same = [np.array_equal(tree.responses[a], tree.responses[b]) for a, b in labels.preferences]
    if not any(same):
        return labels, event
    if on_identical == "error":
        raise RmtoolError(
            "E0304",
            "chosen and rejected have the same token ids, so nothing can be learned from this row",
            "remove the row, or set data.on_identical=drop",
            labels.place,
        )
    preferences = tuple(itertools.compress(labels.preferences, (not equal for equal in same)))
    margins = tuple(itertools.compress(labels.margins, (not equal for equal in same)))
    return replace(labels, preferences=preferences, margins=margins), "identical"
