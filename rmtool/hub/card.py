"""The model card: a README.md that says what a checkpoint is and how to get its rewards.

In: the checkpoint folder, its repo id, and the facts of its manifest (all of them optional). Out: the card's text.
Nothing about this machine gets in: a path is shown by its last component, and is no link in the metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from string import Template
from typing import Any

import yaml

SCORE_COMMAND = "rmtool score responses.jsonl --model"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".yaml", ".yml")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_PAGE = Template("""\
---
$metadata---

# $name

$what It reads a conversation and returns one number, the reward: the higher, the better the last response.
Rewards have no unit and no zero; compare those of responses to the same prompt.

## Score responses

```bash
$score_command $repo_id
```

## Score with transformers alone

$plain
$training$metrics""")
_PLAIN = Template("""\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

repo_id = "$repo_id"
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

- The reward is the raw logit. Do not apply a sigmoid (`pipeline("text-classification")` does).
- The chat template writes the special tokens itself; a second tokenization of its text would double them.
- `sanitize_control_tokens` (transformers 5.23 or later) reads special tokens inside messages as ordinary text.
- For full precision pass `dtype=torch.float32`: in bfloat16, rewards near 4 are 0.03 apart.
""")
_NO_TEMPLATE = "The tokenizer has no chat template; format the text as the model was trained to read it.\n"


def model_card(folder: Path, repo_id: str, facts: Mapping[str, object]) -> str:
    """The text of README.md for the checkpoint in `folder`.

    Args:
        facts: what is known, e.g. from the manifest: base_model, train_data, recipe, max_length, settings, metrics,
            versions.
    """
    base = str(facts.get("base_model") or "")
    data = [str(source) for source in _items(facts.get("train_data"))]
    settings = facts.get("settings")
    card = _PAGE.substitute(
        metadata=_metadata(base, data),
        name=repo_id.rpartition("/")[2],
        what=_what(base, data, settings.get("loss") if isinstance(settings, Mapping) else None),
        score_command=SCORE_COMMAND,
        repo_id=repo_id,
        plain=_PLAIN.substitute(repo_id=repo_id) if _has_template(folder) else _NO_TEMPLATE,
        training=_training(facts),
        metrics=_metrics(facts.get("metrics")),
    )
    return _TOKEN.sub("hf_***", card).rstrip() + "\n"


def _metadata(base: str, data: list[str]) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "rmtool"],
    }
    if _is_hub_id(base):
        fields["base_model"] = base
    datasets = [source.partition(":")[0] for source in data if _is_hub_id(source.partition(":")[0])]
    if datasets:
        fields["datasets"] = list(dict.fromkeys(datasets))
    return yaml.safe_dump(fields, sort_keys=False)


def _is_hub_id(text: str) -> bool:
    """`owner/name` that is not a file or folder here. A bare name may be either, so it is none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1 and not text.lower().endswith(DATA_SUFFIXES) and not os.path.exists(text)


def _shown(value: object) -> str:
    """A value as inline Markdown, without the folders of a path and without what would break a table."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
        return ", ".join(_shown(item) if key is None else f"{key} {_shown(item)}" for key, item in items) or "none"
    text = str(value)
    if not _is_hub_id(text.partition(":")[0]) and re.search(r"[/\\]", text):
        text = PureWindowsPath(text.rstrip("/\\")).name or "a local path"  # parts at / and at \
    return "`" + re.sub(r"[`|\s]+", " ", text).strip() + "`"


def _what(base: str, data: list[str], loss: object) -> str:
    if not base:
        return "A reward model."
    source = f" from {_shown(base)}"
    pairs = f" on the preferences of {_shown(data)}" if data else " on preference pairs"
    named = "hinge" if loss == "hinge" else "Bradley-Terry"
    return f"A reward model, trained with rmtool{source}{pairs} ({named} loss)."


def _training(facts: Mapping[str, object]) -> str:
    labels = {"recipe": "recipe", "max_length": "tokens allowed", "precision": "precision", "versions": "versions"}
    rows = [(label, facts[key]) for key, label in labels.items() if facts.get(key)]
    settings = facts.get("settings")
    rows += sorted(_flat(settings)) if isinstance(settings, Mapping) else []
    return _table("Training", ("setting", "value"), [(str(label), _shown(value)) for label, value in rows])


def _flat(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _metrics(metrics: object) -> str:
    found = metrics.items() if isinstance(metrics, Mapping) else ()
    numbers = [(str(name), f"{value:.4f}") for name, value in found if isinstance(value, int | float)]
    return _table("Evaluation", ("metric", "value"), numbers)


def _table(title: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {value} |" for name, value in (columns, ("---", "---"), *rows)]
    return "\n".join(("", f"## {title}", "", *lines, ""))


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
