"""Limits of a model on what it is given: token ids with an embedding, and positions that it was trained with.

In: a config, a tokenizer and a max length. Out: None or a notice; an error for ids that would index past the embedding.
Cost: one pass over the vocabulary, and the tokenization of a few short conversations.
"""

from __future__ import annotations

from typing import Any

from rmtool.data.record import Message
from rmtool.errors import RmtoolError
from rmtool.packing.prefix_sharing import rope_parameters
from rmtool.tokenization.batch_tokenizer import Conversation
from rmtool.tokenization.encoder import FINGERPRINT_CONVERSATIONS, Encoder

_SYSTEM = (Message("system", "a"), Message("user", "b"), Message("assistant", "c"))


def embedding_rows(config: Any) -> int | None:
    """Return the number of token ids that have an embedding."""
    return getattr(config.get_text_config(), "vocab_size", None)


def require_embedded(encoder: Encoder) -> None:
    """Check that every token that text or the chat template can produce has an embedding. Special tokens that neither
    produces may have none: a pad token that was added for batches only, and what a template writes for some rows only,
    which the encoder checks.

    Raises:
        RmtoolError: E0415 one has none.
    """
    tokenizer, rows = encoder.tokenizer, encoder.vocabulary
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if rows is not None and id >= rows}
    if not beyond:
        return
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    chats = [[Conversation(chat)] for chat in (*FINGERPRINT_CONVERSATIONS, _SYSTEM)]
    rendered = [ids for (ids,) in encoder.batch_tokenizer.read(chats) if not isinstance(ids, Exception)]
    written = {int(id) for ids in rendered for id in ids}
    if produced := sorted(id for id in beyond if id not in special or id in written):
        more = f" (and {len(produced) - 1} more)" if produced[1:] else ""
        raise RmtoolError(
            "E0415",
            f"the tokenizer has {beyond[produced[0]]!r} with id {produced[0]}{more}, but the model has only {rows} "
            "embeddings",
            "use the tokenizer of this model, or add embeddings to it with resize_token_embeddings",
        )


def trained_positions(config: Any) -> int | None:
    """Return the number of positions that a model was trained with, as far as its config says.

    With a RoPE scaling, the original length times the factor: `max_position_embeddings` may say either.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 0
    scaled = [
        (rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1)
        for rope in rope_parameters(text)
    ]
    return int(max([limit, *scaled])) or None


def positions_notice(config: Any, max_length: int, trained: int = 0) -> list[str]:
    """Return a notice for a max length beyond the positions of the config and those `trained`, else nothing."""
    limit = max(trained_positions(config) or max_length, trained)
    if max_length <= limit:
        return []
    return [
        f"max length {max_length} exceeds the {limit} positions that the model was trained with; "
        "rewards of longer conversations may be wrong"
    ]
