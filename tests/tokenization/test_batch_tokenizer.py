"""Many conversations at once have the ids that transformers gives them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import KINDS, TEMPLATES, with_template
from helpers import pair_rows, sanitizing, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rmtool.config import Source
from rmtool.data.record import PLAIN, Message
from rmtool.data.rejects import Rejects
from rmtool.data.sources import select
from rmtool.tokenization import encoder as encode
from rmtool.tokenization.batch_tokenizer import BatchTokenizer, Conversation
from rmtool.tokenization.encoder import Encoder

TEXT = st.text(alphabet=st.sampled_from("ab \n\tü你👋'<|im_startend>.,1"), max_size=25)
SAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def slow(tokenizer: Any, conversation: Conversation) -> list[int]:
    chat = [message.as_dict() for message in conversation.messages]
    ids: list[int] = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, sanitize_control_tokens=True)
    return ids


@sanitizing
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Llama 2", "Tulu", "DeepSeek"])
@SAMPLES
@given(st.lists(st.lists(TEXT, min_size=2, max_size=4), min_size=1, max_size=3))
def test_ids_are_those_of_transformers(tokenizer: Any, name: str, kind: str, groups: list[list[str]]) -> None:
    reader = with_template(KINDS[kind](tokenizer), name)
    prompt = (Message("user", "Hello, 你."), Message("assistant", " a "), Message("user", groups[0][0]))
    conversations = [[Conversation((*prompt, Message("assistant", text))) for text in group] for group in groups]
    for group, results in zip(conversations, BatchTokenizer(reader).read(conversations), strict=True):
        for conversation, ids in zip(group, results, strict=True):
            assert list(ids) == slow(reader, conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_common_beginning_is_tokenized_once(tokenizer: Any, name: str) -> None:
    batch_tokenizer = BatchTokenizer(with_template(KINDS["byte-level BPE"](tokenizer), name))
    prompt = (Message("user", "a " * 50), Message("assistant", "b " * 50), Message("user", "c " * 50))
    group = [Conversation((*prompt, Message("assistant", text))) for text in ("yes", "no")]
    (draft,) = batch_tokenizer.render([group])
    assert sum(map(len, (draft.head, *draft.tails))) < 1.8 * len(batch_tokenizer.tokenizer.apply_chat_template(
        [message.as_dict() for message in group[0].messages], tokenize=False
    ))  # fmt: skip


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("\n<|im_start|>", normalized=False),
        AddedToken("<|im_start|> y", normalized=False),
        AddedToken("q<", normalized=False),
        AddedToken("<|im_start|>", normalized=False, lstrip=True),
        AddedToken("<|im_start|>", normalized=False, single_word=True),
        AddedToken("<|im_start|>", normalized=False, rstrip=True),
    ],
    ids=str,
)
def test_text_is_cut_only_where_the_tokenizer_would(tokenizer: Any, token: AddedToken) -> None:
    reader = KINDS["byte-level BPE"](tokenizer)
    reader.add_tokens([token])
    reader.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    prompt = (Message("user", "Hello q"), Message("assistant", "q \n"), Message("user", " more q"))
    for count in (1, 2, 3):
        group = [Conversation((*prompt[:count], Message("assistant", text))) for text in (" yes", " no")]
        for conversation, ids in zip(group, BatchTokenizer(reader).read([group])[0], strict=True):
            assert list(ids) == slow(reader, conversation)


@sanitizing
def test_batches_end_anywhere_and_errors_stay_in_their_place(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 16)
    rows = pair_rows(70)
    rows[33]["chosen"] = " "
    rows[69]["rejected"] = "<|im_end|>"
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    selection = select([Source(str(source))], PLAIN, 0, Rejects())
    encoder = Encoder(tokenizer, 512)
    outcomes = list(encoder.encode_many(selection.records()))
    assert [outcome.record.place.line for outcome in outcomes] == list(range(1, 71))
    assert [at for at, outcome in enumerate(outcomes) if outcome.error] == [33]
    for outcome in outcomes[:33] + outcomes[34:]:
        assert outcome.group is not None
        alone, _ = encoder.encode(outcome.record)
        assert alone is not None
        assert all(map(np.array_equal, outcome.group.sequences(), alone.sequences()))
