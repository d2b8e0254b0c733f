"""Prefix sharing or padded batches for every model type with a `*ForSequenceClassification`, and the errors of both.

In: the model types of transformers' two text mappings, each with a tiny config derived from its default one. Out: per
type a row of `tests/FAMILIES.md`; the test fails where a layout is wrong, or differs from the table.
`RMTOOL_WRITE=1 pytest tests/model/test_families.py` measures all types and writes the table.
The reference is the slow twin: each response alone through the stock model, its own attention, in evaluation mode.
Cost: about 20 seconds on one core; the families that are not in `QUICK` are slow tests.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import ROOT, VOCABULARY, gradients, random_groups
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from rmtool.errors import RmtoolError
from rmtool.model.classifier import build_classifier, disable_dropout, init_score_head
from rmtool.model.layout_choice import choose_layout
from rmtool.model.reward_model import RewardModel
from rmtool.model.stored_weights import HeadOrigin
from rmtool.packing import prefix_sharing
from rmtool.packing.attention import UnsupportedAttentionError
from rmtool.tokenization.response_group import ResponseGroup

TABLE = ROOT / "tests" / "FAMILIES.md"
WRITE = os.environ.get("RMTOOL_WRITE") == "1"
TYPES = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
WITHOUT_CLASS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(TYPES))
# What the quick tests go through: every layout, and the families that most reward models are built on.
QUICK = {"bert", "bloom", "deepseek_v3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "jamba", "llama", "mamba",
         "mistral", "mixtral", "nemotron", "gpt_oss", "phi3", "qwen2", "qwen3", "qwen3_5", "t5"}  # fmt: skip
GROUPS = random_groups(3, ((25, (7, 12)), (3, (1, 30, 5)), (0, (11,)), (40, (2, 2, 9, 1))))
MAX_LENGTH = 256

# Largest reward and gradient errors. Rewards: the largest difference over the standard deviation of the rewards.
# Gradients: of the worst parameter, the norm of the difference over the norm, or over 1% of the largest norm where
# that is more: the gradient of a key's bias is zero but for rounding. Recurrent layers (qwen3_5) amplify rounding.
BOUNDS = {"shared": (5e-6, 1e-5), "padded": (5e-5, 1e-4)}
FLOOR = 1e-2
LEAST_SHARED = 36

# ------------------------------------------------------------------------------------------------ tiny configs

# Grown together until every kind of layer occurs.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
LAYERS += ("num_decoder_layers",)
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "no_rope_layers")
BY_SIZE = {
    512: "max_position_embeddings n_positions max_seq_len",
    48: "intermediate_size ffn_hidden_size dff d_ff d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim feed_forward_size "
    "hidden_dim moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size output_embedding_size "
    "entity_emb_size word_embed_proj_dim true_hidden_size intra_bottleneck_size pooler_hidden_size d_latents "
    "cross_attention_hidden_size dim_model_base",
    64: "attention_hidden_size",  # of zamba, twice the hidden size
    16: "qk_head_dim",
    8: "head_dim d_head d_kv attention_head_size attention_head_dim kv_channels kv_lora_rank q_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim index_topk linear_key_head_dim linear_value_head_dim "
    "adapter_rank gated_norm_rank block_size chunk_size query_pre_attn_scalar "
    "sliding_window window_size local_attention attention_window keep_window_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads index_n_heads "
    "linear_num_value_heads n_routed_experts num_experts num_local_experts linear_conv_kernel_dim mamba_d_conv "
    "mamba_d_state mamba_dt_rank rotary_dim",
    2: "num_key_value_heads num_kv_heads num_query_groups num_experts_per_tok moe_topk linear_num_key_heads n_group "
    "topk_group n_mamba_heads attn_layer_period expert_layer_period no_rope_layer_interval eos_token_id sep_token_id",
    1: "first_k_dense_replace max_window_layers attn_layer_offset expert_layer_offset n_shared_experts bos_token_id "
    "eod_token_id cls_token_id decoder_start_token_id",
    0: "pad_token_id",
    VOCABULARY: "vocab_size entity_vocab_size",
}
TINY: dict[str, Any] = {name: size for size, names in BY_SIZE.items() for name in names.split()}
TINY |= {"attention_types": [[["global", "local"], 1]], "axial_pos_embds_dim": [16, 16]}
WINDOW_ON = {"sliding_window": TINY["sliding_window"], "use_sliding_window": True}

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EVERY_HEAD = {"num_key_value_heads": 4}  # these have no grouped keys and values
# Else as many as the default model has; two hybrid layers, because they share weights.
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
ADJUSTED: dict[str, dict[str, Any]] = {
    "axk1": EVERY_HEAD,
    # With 4 heads its indexer scores many keys exactly zero, and which of them it keeps is chance.
    "axk2": EVERY_HEAD | {"index_n_heads": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},  # has no default
    "deepseek_v2": EVERY_HEAD,
    "deepseek_v3": EVERY_HEAD,
    "esmc": EVERY_HEAD,
    "minicpm3": EVERY_HEAD,
    "mistral4": EVERY_HEAD | {"head_dim": 16},  # counts the part without positions too
    "zamba": HYBRID,
    "zamba2": HYBRID | {"attention_head_dim": 16, "hybrid_layer_ids": [1, 3]},
}
WITHOUT_EXTRAS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
DEFAULT_FAILS = {"gemma4_assistant": {"text_config": WITHOUT_EXTRAS}}  # refuses its own default


def tiny(model_type: str, switches: dict[str, Any]) -> Any:
    """The type's config at tiny sizes, with the fewest layers (at least 2) that have every kind of its default ones."""
    default = hf.CONFIG_MAPPING[model_type]()
    wanted = kinds(default)
    for layers in range(2, 9):
        config = shrunk(default, layers, ADJUSTED.get(model_type, {}) | switches)
        if kinds(config) >= wanted:
            return config
    raise AssertionError(f"{model_type}: 8 layers have not all of {wanted}")


def kinds(config: Any) -> set[tuple[str, str]]:
    text = config.get_text_config()
    return {(name, str(kind)) for name in KINDS for kind in getattr(text, name, None) or ()}


def shrunk(default: Any, layers: int, changes: dict[str, Any]) -> Any:
    # A window that is switched off by default stays off: `WINDOW_ON` makes a row of its own.
    known = {name: value for name, value in default.to_dict().items() if not (name in WINDOW_ON and value is None)}
    sizes = TINY | dict.fromkeys(LAYERS, layers) | changes
    values = {name: value for name, value in sizes.items() if name in known or name in changes}
    rope = known.get("rope_parameters") or {}
    if "original_max_position_embeddings" in rope and rope["rope_type"] not in prefix_sharing.BATCH_DEPENDENT_ROPE:
        values["rope_parameters"] = rope | {"original_max_position_embeddings": 16}
    for name in getattr(default, "sub_configs", {}):
        if isinstance(part := getattr(default, name, None), hf.PreTrainedConfig):
            values[name] = shrunk(part, layers, {}).to_dict()
    return type(default)(**values)


def variants(model_type: str) -> dict[str, dict[str, Any]]:
    """Names of rows and what to switch on for them: where a window is off by default, a second row has it on."""
    default = hf.CONFIG_MAPPING[model_type]().to_dict()
    off = {name: value for name, value in WINDOW_ON.items() if name in default and not default[name]}
    if off and "sliding_window" in default:
        return {model_type: {}, f"{model_type} (window)": off}
    return {model_type: {}}


# -------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """One line of the table; errors are None where nothing runs, `forced` where no check failed."""

    name: str
    layout: str
    errors: tuple[float, float] | None = None
    note: str = ""
    forced: tuple[float, float] | None = None

    def line(self) -> str:
        shown = [f"{error:.0e}" for error in self.errors] if self.errors else ["", ""]
        return "| " + " | ".join([self.name, self.layout, *shown, self.verdict()]) + " |"

    def verdict(self) -> str:
        if self.forced is None:
            return self.note
        if within(self.forced, "shared"):
            return f"{self.note}; forced: exact"
        return f"{self.note}; forced: {self.forced[0]:.0e}, {self.forced[1]:.0e}"


def within(errors: tuple[float, float], layout: str) -> bool:
    return all(error <= bound for error, bound in zip(errors, BOUNDS[layout], strict=True))


def measure(name: str, switches: dict[str, Any], folder: Path) -> Row:
    tiny(name.split()[0], switches).save_pretrained(folder)
    torch.manual_seed(0)
    try:
        classifier, _ = build_classifier(folder, dtype=torch.float32, random_weights=True)
    except RmtoolError as error:
        return Row(name, "refused", note=f"{error.id} {error}")
    stir(classifier)
    init_score_head(classifier, 0)
    disable_dropout(classifier)
    model = RewardModel(classifier, pad_id=0).eval()
    try:
        layout = choose_layout(model, model, MAX_LENGTH)
    except RmtoolError as error:
        return Row(name, "refused", note=f"{error.id} {error}")
    expected = alone(model, GROUPS)
    truth = expected.detach(), gradients(model, expected)
    errors = compare(model, layout.shared, truth)
    if layout.shared:
        return Row(name, "shared", errors)
    try:
        return Row(name, "padded", errors, str(layout.reason), compare(model, True, truth))
    except (UnsupportedAttentionError, TypeError):  # axk2 needs its mask
        return Row(name, "padded", errors, str(layout.reason))


def stir(classifier: torch.nn.Module) -> None:
    """Draw all weights wide: at their usual size attention is all but uniform, gates are shut and norms are ones, and
    an error of positions or masks would hardly show.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(module.weight) for module in classifier.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in classifier.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise if id(parameter) in embeddings else noise / parameter.shape[-1] ** 0.5)


def alone(model: RewardModel, groups: list[ResponseGroup]) -> torch.Tensor:
    model.eval()
    model.share_prompts(False)
    rows = [torch.from_numpy(ids.astype("int64"))[None] for group in groups for ids in group.sequences()]
    return torch.stack([model.classifier(input_ids=row, use_cache=False).logits[0, 0] for row in rows])


def compare(
    model: RewardModel, shares: bool, truth: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Errors of all groups in one batch, as training runs them, of rewards and of the worst parameter's gradient."""
    expected, expected_gradients = truth
    model.share_prompts(shares)
    model.train()
    rewards = model(model.collate(GROUPS))
    found = gradients(model, rewards)
    floor = FLOOR * max(float(gradient.norm()) for gradient in expected_gradients.values())
    worst = 0.0
    for name in found.keys() | expected_gradients.keys():
        want, got = (part.get(name, torch.zeros(())) for part in (expected_gradients, found))
        worst = max(worst, float((got - want).norm()) / max(float(want.norm()), floor))
    return float((rewards.detach() - expected).abs().max() / expected.std()), worst


# -------------------------------------------------------------------------------------------------- the table

SHARED, PADDED = ("{:.0e} (rewards) and {:.0e} (gradients)".format(*BOUNDS[name]) for name in ("shared", "padded"))
INTRO = f"""\
# Model families

Generated by `RMTOOL_WRITE=1 pytest tests/model/test_families.py`, which without that variable compares every layout
with this file. It tests all {len(TYPES)} model types that have a `*ForSequenceClassification` class in
transformers {hf.__version__}, at tiny sizes, with random weights large enough to show errors of positions and masks.
Where a sliding window is off by default, a second row has it on.

* **shared**: prefix sharing is on. Errors are at most {SHARED}.
* **padded**: padded batches are used, for the reason in the note. Errors are at most {PADDED}.
* **refused**: not supported; an error before anything is computed.

Errors are in fp32, on a CPU, relative to each response alone through the stock model: for rewards the largest
difference over their standard deviation; for gradients the worst parameter's difference over its norm, or over
{FLOOR:.0%} of the largest norm where that is more. "Forced" shows the errors with prefix sharing enabled despite the
failed check.
"""
HEADER = "| model type | layout | reward error | gradient error | note |\n|---|---|---|---|---|\n"
OUTRO = (
    f"## Refused (E0406): {len(WITHOUT_CLASS)} causal language model types without a "
    "`*ForSequenceClassification` class\n\n"
)


def document(rows: list[Row]) -> str:
    counts = {layout: len(types_with(rows, layout)) for layout in ("shared", "padded", "refused")}
    rest = len(TYPES) - sum(counts.values())
    summary = "\n" + ", ".join(f"{count} types {layout}" for layout, count in counts.items())
    summary += f", {rest} shared or padded, depending on the window.\n\n"
    names = textwrap.fill(", ".join(WITHOUT_CLASS), 118, break_on_hyphens=False)
    lines = "".join(row.line() + "\n" for row in sorted(rows, key=lambda row: row.name))
    return INTRO + summary + HEADER + lines + "\n" + OUTRO + names + "\n"


def types_with(rows: list[Row], layout: str) -> list[str]:
    """Model types that have this layout in every row."""
    ruled_out = {row.name.split()[0] for row in rows if row.layout != layout}
    return sorted({row.name.split()[0] for row in rows} - ruled_out)


def committed() -> list[Row]:
    cells = re.findall(r"^\| ([^|]+) \| (shared|padded|refused) \|", TABLE.read_text(), re.MULTILINE)
    return [Row(name, layout) for name, layout in cells]


def another_transformers() -> bool:
    """Whether the table is of another version, which may know other types, and more or fewer that can share."""
    return f"transformers {hf.__version__}, " not in TABLE.read_text()


@pytest.fixture(scope="module")
def measured() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    if WRITE and {row.name.split()[0] for row in rows} == set(TYPES):
        TABLE.write_text(document(rows))


# ------------------------------------------------------------------------------------------------------ tests


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if WRITE or name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", marked(TYPES))
def test_a_model_type_has_the_layout_of_the_table_and_it_is_exact(
    model_type: str, measured: list[Row], tmp_path: Path
) -> None:
    rows = [measure(name, switches, tmp_path) for name, switches in variants(model_type).items()]
    measured += rows
    for row in rows:
        assert row.errors is None or within(row.errors, row.layout), f"{row.line()} is wrong"
    listed = {row.name: row.layout for row in committed() if row.name.split()[0] == model_type}
    assert WRITE or another_transformers() or listed == {row.name: row.layout for row in rows}, (
        "tests/FAMILIES.md differs; to update it: RMTOOL_WRITE=1 pytest tests/model/test_families.py"
    )


@pytest.mark.parametrize("model_type", marked(sorted(set(TYPES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))))
def test_nothing_of_a_language_model_is_unread_but_its_head(model_type: str, tmp_path: Path) -> None:
    config = tiny(model_type, {"is_decoder": True} if model_type == "reformer" else {})
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    try:
        _, head = build_classifier(tmp_path, dtype=torch.float32)
    except RmtoolError as error:
        assert "no last-token score head" in error.what  # noqa: PT017 - an encoder
    else:
        assert head == HeadOrigin()


@pytest.mark.parametrize("model_type", marked(WITHOUT_CLASS))
def test_a_causal_model_without_a_classifier_is_refused(model_type: str, tmp_path: Path) -> None:
    config = hf.AutoConfig.for_model(model_type, **DEFAULT_FAILS.get(model_type, {}))
    config.save_pretrained(tmp_path)
    with pytest.raises(RmtoolError) as caught:
        build_classifier(tmp_path, dtype=torch.float32, random_weights=True)
    assert caught.value.id == "E0406"


@pytest.mark.skipif(WRITE, reason="the table is being written")
@pytest.mark.skipif(another_transformers(), reason="the table is of another version of transformers")
def test_the_table_has_every_type_and_enough_of_them_share() -> None:
    rows = committed()
    assert len(types_with(rows, "shared")) >= LEAST_SHARED
    assert {row.name.split()[0] for row in rows} == set(TYPES)
    listed = TABLE.read_text().split(OUTRO)[1]
    assert listed.replace("\n", " ").strip().split(", ") == WITHOUT_CLASS


@pytest.mark.parametrize("name", marked(["bloom", "falcon", "jamba", "qwen2_moe (window)", "phimoe (window)"]))
def test_a_layout_accepted_wrongly_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefix_sharing, "declared_reason", lambda *_: None)
    monkeypatch.setattr(prefix_sharing, "probe_failure", lambda *_: None)
    row = measure(name, variants(name.split()[0])[name], tmp_path)
    assert row.layout == "shared"
    assert row.errors is not None
    assert not within(row.errors, "shared")
