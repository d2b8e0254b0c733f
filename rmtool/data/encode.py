"""From messages to token ids: the one function that train, eval and score all use.

In: a `Record` and the model's tokenizer. Out: a `TokenTree`, or why there is none.
The chat template is applied once to each whole conversation, without further special tokens; special tokens inside
the messages are encoded as ordinary text. The reward is read at the last id.
Cost: one template rendering and one tokenisation per response.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rmtool.data.formats import Record
from rmtool.data.messages import Message, Messages
from rmtool.data.rejects import Rejects
from rmtool.errors import RmtoolError
from rmtool.tree import TokenTree, build_tree, common_prefix

# Whatever reads these differently reads everything differently: turns, Unicode, blanks, and tokens that are only text.
CANNED: tuple[Messages, ...] = (
    (Message("user", "Hello."), Message("assistant", "Hi! How can I help?")),
    (Message("user", " two  spaces\n\nand lines\t"), Message("assistant", "")),
    (Message("user", "naïve café, 你好, Привет, 👋🏽"), Message("assistant", "été 1,000.5 %")),
    (Message("user", "<s></s><|im_end|><|eot_id|><pad>[PAD]"), Message("assistant", "<|endoftext|>")),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")),
)


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
        ids: list[int] = self.tokenizer.apply_chat_template(
            [message.as_dict() for message in conversation],
            tools=json.loads(tools) if tools else None,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        if self.drop_tail is not None:
            while len(ids) > 1 and ids[-1] == self.drop_tail:
                ids = ids[:-1]
        return ids

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
            RmtoolError: E0305 too long, E0306 an empty response, E0307 the template refuses the conversation.
        """
        if any(not response[-1].content.strip() for response in record.responses):
            if self.on_empty == "error":
                raise RmtoolError(
                    "E0306",
                    "a response is empty",
                    "remove the row, or allow it: data.on_empty=keep, --allow-empty",
                    record.place,
                )
            if self.on_empty == "drop":
                return None, "empty"
        return self._fit(record, build_tree([self._render(record, response) for response in record.responses]))

    def _render(self, record: Record, response: Messages) -> list[int]:
        from jinja2 import TemplateError

        try:
            ids = self.ids((*record.prompt, *response), record.tools)
        except TemplateError as error:
            raise RmtoolError(
                "E0307", f"the chat template refuses this conversation: {error}", "mend the row's roles", record.place
            ) from error
        if not ids:
            raise RmtoolError("E0307", "the chat template renders nothing", "mend the template", record.place)
        return ids

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
            record.place,
        )

    def _cuttable(self, record: Record, tree: TokenTree) -> int:
        """Tokens that may go: those before the responses differ; with one response, those of its prompt."""
        if len(tree.responses) > 1:
            return len(tree.prompt)
        empty = self._render(record, (Message("assistant", ""),))
        return common_prefix([np.asarray(empty, dtype=np.int32), tree.responses[0]])

    @staticmethod
    def _cut(tree: TokenTree, excess: int) -> TokenTree:
        return (
            tree.drop_left(excess) if len(tree.prompt) >= excess else build_tree([tree.responses[0][excess:].tolist()])
        )


@dataclass
class Encoded:
    """Records that have a tree, in order, and a count of what was dropped or changed, by reason."""

    records: list[Record] = field(default_factory=list)
    trees: list[TokenTree] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def encode_all(
    encoder: Encoder,
    records: Iterable[Record],
    on_identical: str,
    advance: Callable[[], None],
    rejects: Rejects | None = None,
) -> Encoded:
    """Encode preference records; calls `advance` once per record. Bad ones go to `rejects`; without it, the first
    one raises.

    Args:
        on_identical: "error", "drop" or "keep" (to evaluate: a tie) pairs whose two responses have the same ids.

    Raises:
        RmtoolError: as `Encoder.encode`, and E0304 for a pair whose two responses have the same ids.
    """
    encoded = Encoded()
    for record in records:
        advance()
        if not record.preferences:
            encoded.counts["tied"] += 1
            continue
        try:
            tree, event = encoder.encode(record)
            if tree is not None and on_identical != "keep":
                record, event = _without_identical(record, tree, on_identical, event)
        except RmtoolError as error:
            if rejects is None:
                raise
            rejects.add(error, _shown(record))
            continue
        if event:
            encoded.counts[event] += 1
        if tree is not None and record.preferences:
            encoded.records.append(record)
            encoded.trees.append(tree)
    return encoded


def _shown(record: Record) -> dict[str, Any]:
    """The record as JSON shows it: its prompt, and its responses."""
    return {
        "prompt": [message.as_dict() for message in record.prompt],
        "responses": [[message.as_dict() for message in response] for response in record.responses],
    }


def _without_identical(
    record: Record, tree: TokenTree, on_identical: str, event: str | None
) -> tuple[Record, str | None]:
    """The record without the preferences between responses that have the same ids, and what happened to it.

    Raises:
        RmtoolError: E0304 there is one, and `on_identical` is "error".
    """
    kept = [
        at for at, (a, b) in enumerate(record.preferences) if not np.array_equal(tree.responses[a], tree.responses[b])
    ]
    if len(kept) == len(record.preferences):
        return record, event
    if on_identical == "error":
        raise RmtoolError(
            "E0304",
            "chosen and rejected have the same token ids, so nothing can be learned from this row",
            "remove the row, or set data.on_identical=drop",
            record.place,
        )
    preferences = tuple(record.preferences[at] for at in kept)
    margins = tuple(record.margins[at] for at in kept)
    return replace(record, preferences=preferences, margins=margins), "identical"
