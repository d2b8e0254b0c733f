"""Ten chat templates and three kinds of tokenizers, as models have them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmtool.tokenization.tokenizer import TULU_TEMPLATE, name_control_tokens

LOOP, END = "{% for m in messages %}", "{% endfor %}"


BY_ROLE = "{% if m.role == 'assistant' %}A{% else %}U{% endif %}"


# Ten ways in which models write turns: what is said around them, and the tokens it is said with.
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ChatML": (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END, ("<|im_start|>", "<|im_end|>")),
    "Llama 3": (
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>" + END,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Llama 2": (
        LOOP + "{% if m.role == 'assistant' %} {{ m.content }} </s>{% else %}<s>[INST] {{ m.content }} [/INST]"
        "{% endif %}" + END,
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "Gemma": (
        "<bos>" + LOOP + "<start_of_turn>{{ m.role }}\n{{ m.content.strip() }}<end_of_turn>\n" + END,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "Tulu": (TULU_TEMPLATE, ("<|user|>", "<|assistant|>", "<|system|>")),
    "roles from pieces": (LOOP + "{{ '<|' + m.role + '|>' }}{{ m.content }}<|end|>" + END, ("<|end|>",)),
    "Command R": (
        LOOP + "<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>{% else %}<|CHATBOT_TOKEN|>{% endif %}"
        "{{ m.content }}<|END_OF_TURN_TOKEN|>" + END,
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "DeepSeek": (
        LOOP + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
        "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}" + END,
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "</think>"),
    ),
    "Mistral": (
        LOOP + "{% if m.role == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}"
        + END,
        ("[INST]", "[/INST]", "</s>"),
    ),
    "Vicuna": (LOOP + BY_ROLE + ": {{ m.content }} </s>" + END, ("</s>",)),
}  # fmt: skip


def published(tokenizer: Any, name: str) -> Any:
    """Return the tokenizer with the chat template of a model, as TRL ships it; TRL itself is not imported."""
    spec = importlib.util.find_spec("trl")
    assert spec
    assert spec.origin
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


# Letters, a few pieces longer than one, and bytes for all the rest.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<|>[]/_;:.,!?'(){}▁\n"


PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "us", "er", "st", "end", "▁a", "<|", "|>"]


def bytewise(tokenizer: Any) -> Any:
    return copy.deepcopy(tokenizer)


def finished(backend: Tokenizer) -> Any:
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece(tokenizer: Any) -> Any:
    """Pieces with blanks as ▁, one put before the text, as Llama 2 has them."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    merges = [("u", "s"), ("e", "r"), ("s", "t"), ("▁", "a"), ("<", "|"), ("|", ">")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return finished(backend)


def unigram(tokenizer: Any) -> Any:
    """Text is normalized (NFKC) before it is cut, as in T5 and XLM-R."""
    backend = Tokenizer(models.Unigram([(piece, -len(piece) / 9) for piece in PIECES], 0, True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return finished(backend)


KINDS = {"byte-level BPE": bytewise, "sentencepiece BPE": sentencepiece, "normalizing Unigram": unigram}


def with_template(tokenizer: Any, name: str) -> Any:
    template, tokens = TEMPLATES[name]
    special = name != "roles from pieces"
    roles = () if special else ("<|user|>", "<|assistant|>", "<|system|>")
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token in (*tokens, *roles)], special_tokens=special
    )
    tokenizer.chat_template = template
    name_control_tokens(tokenizer)
    return tokenizer
