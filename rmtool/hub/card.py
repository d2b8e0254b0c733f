"""Model card: the README.md that describes a checkpoint and shows how to compute its rewards.

In: the checkpoint folder, its repo id, and the fields of its manifest (all optional). Out: the card's text.
A local path is shown by its last component and never linked in the metadata; access tokens are masked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmtool.checkpoint import LOADED_IN_BF16, is_hub_id, public_name
from rmtool.redaction import redact

_LABELS = {"recipe": "recipe", "max_length": "max length", "precision": "precision", "versions": "versions"}
_PAGE = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }} It reads a conversation and returns a scalar reward: higher means a better last response.
Rewards have no unit and no zero; compare those of responses to the same prompt.

## Score responses

```bash
rmtool score responses.jsonl --model {{ repo_id }}
```

## Score with transformers alone

{% if has_template -%}
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

repo_id = "{{ repo_id }}"
tokenizer = AutoTokenizer.from_pretrained(repo_id)
model = AutoModelForSequenceClassification.from_pretrained(repo_id).eval()

conversation = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
inputs = tokenizer.apply_chat_template(
    conversation, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
)
with torch.no_grad():
    reward = model(**inputs).logits[0, 0].item()
print(reward)
```

- The reward is the raw logit, without a sigmoid.
{%- if raw %} `problem_type` in `config.json` says so to `pipeline("text-classification")` and vLLM.
{%- else %} Pass `function_to_apply="none"` to `pipeline("text-classification")`,
  and `--hf-overrides '{"problem_type": "regression"}'` to vLLM.
{%- endif %}
  Pass `activation_fn=torch.nn.Identity()` to sentence-transformers' `CrossEncoder`.
- The chat template adds the special tokens: tokenize rendered text with `add_special_tokens=False`.
- `sanitize_control_tokens` (transformers 5.23 or later) tokenizes special tokens in messages as plain text.
- For full precision pass `dtype=torch.float32`. {{ bf16 }}
{%- else -%}
The tokenizer has no chat template; format the text as in the model's training.
{%- endif %}
{% for title, columns, rows in tables if rows %}
## {{ title }}

| {{ columns }} | value |
| --- | --- |
{% for label, value in rows -%}
| {{ label }} | {{ value }} |
{% endfor %}{% endfor %}"""


def model_card(folder: Path, repo_id: str, facts: Mapping[str, object]) -> str:
    """Return the text of README.md for the checkpoint in `folder`.

    Args:
        facts: the manifest's fields that are known: base_model, train_data, recipe, max_length, settings, metrics, ...
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, train_data, metrics = str(facts.get("base_model") or ""), facts.get("train_data"), facts.get("metrics")
    data = [str(source) for source in train_data] if isinstance(train_data, list | tuple) else []
    datasets = dict.fromkeys(name for name in (source.partition(":")[0] for source in data) if is_hub_id(name))
    settings = [(label, facts[key]) for key, label in _LABELS.items() if facts.get(key)]
    settings += sorted(_flat(facts.get("settings") or {}, ""))
    numbers = metrics.items() if isinstance(metrics, Mapping) else ()
    computed = f" (computed in {facts['eval_precision']})" if facts.get("eval_precision") else ""
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-classification",
            tags=["reward-model", "rmtool"],
            base_model=base if is_hub_id(base) else None,
            datasets=list(datasets) or None,
        ),
        template_str=_PAGE,
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        summary=_summary(base, data, dict(settings).get("loss")),
        has_template=_has_template(folder),
        raw=_config(folder, "config.json").get("problem_type") == "regression",
        bf16=_bf16_note(facts.get("fidelity")),
        tables=[
            ("Training", "setting", [(label, _shown(value)) for label, value in settings]),
            (f"Evaluation{computed}", "metric", [(k, f"{v:.4f}") for k, v in numbers if isinstance(v, int | float)]),
        ],
    )
    return redact(str(card)).rstrip() + "\n"


def _bf16_note(fidelity: object) -> str:
    """Say what loading in bf16 does to rewards: as measured in training, if that is known."""
    measured = fidelity.get(LOADED_IN_BF16) if isinstance(fidelity, Mapping) else None
    names = ("responses", "rms", "max", "reordered", "pairs")
    if not isinstance(measured, Mapping) or not all(isinstance(measured.get(name), int | float) for name in names):
        return "In bfloat16, rewards near 4 are 0.03 apart."
    responses, rms, largest, reordered, pairs = (measured[name] for name in names)
    return (
        f"Loaded in bfloat16, rewards of {responses} responses of the eval pairs differ by {rms:.2g} standard "
        f"deviations (root mean square; {largest:.2g} at most), and {reordered:,} of {pairs:,} pairs of any two of "
        "them change their order."
    )


def _shown(value: object) -> str:
    """Format a value as inline Markdown, without the folders of a path and without what would break a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    text = public_name(str(value)) if re.search(r"[/\\]", str(value)) else str(value)
    return "`" + re.sub(r"[`|\s]+", " ", text).strip() + "`"


def _summary(base: str, data: list[str], loss: object) -> str:
    if not base:
        return "A reward model."
    pairs = f"the preference pairs of {_shown(data)}" if data else "preference pairs"
    named = "hinge" if loss == "hinge" else "Bradley-Terry"
    return f"A reward model, trained with rmtool from {_shown(base)} on {pairs} ({named} loss)."


def _flat(settings: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Yield nested settings under dotted names."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool(_config(folder, "tokenizer_config.json").get("chat_template"))


def _config(folder: Path, name: str) -> dict[str, Any]:
    """Read a configuration file; empty if it cannot be read."""
    try:
        return dict(json.loads((folder / name).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
