"""What a recipe may say: every key, its kind, its default and its meaning.

Frozen, and never written to: what is computed from a recipe (steps, packs, addresses) lives elsewhere. `recipe.py`
reads recipes and refuses what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    path: str  # a Hub id, a local folder, or bundled:...
    revision: str | None = None  # a branch, tag or commit of the Hub repository
    weights: Literal["pretrained", "random"] = "pretrained"  # random: only the folder's config.json is read
    head: Literal["auto", "new"] = "auto"  # auto: go on with the checkpoint's score head if it has one
    chat_template: str | None = None  # a .jinja file or "tulu"; default: the tokenizer's own


@dataclass(frozen=True)
class Source:
    """One part of a mixture; without `fraction` and `rows`, all of it."""

    path: str  # a file (.jsonl .json .parquet, .gz) or a Hub dataset (owner/name or owner/name:split)
    fraction: float | None = None  # of its prompts; above 1, some stand in it several times
    rows: int | None = None  # so many of its prompts


@dataclass(frozen=True)
class DataConfig:
    """What it is trained and evaluated on."""

    train: tuple[str | Source, ...]  # paths, or mappings with path and fraction or rows
    eval: tuple[str | Source, ...] = ()  # likewise
    holdout: int | float = 0  # without `eval`: so many training pairs, or this share of them, are held out by prompt
    columns: dict[str, str] = field(default_factory=dict)  # our field name: the data's; dots lead into objects
    rating_margins: bool = False  # a pair's margin is the difference of its ratings, or of score_chosen and _rejected
    on_bad_row: Literal["fail", "skip"] = "fail"  # skip: bad rows are set aside in rejects.jsonl
    max_length: int = 2048  # tokens of prompt and response together
    on_long: Literal["error", "drop", "truncate_prompt"] = "error"
    on_empty: Literal["error", "drop", "keep"] = "error"  # a response without text
    cache: bool = True  # token ids are kept for later runs, in $RMTOOL_CACHE or ~/.cache/rmtool
    on_identical: Literal["error", "drop"] = "error"  # a pair whose two responses are the same


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. Numbers of pairs are global: they mean the same on any number of processes."""

    batch_size: int  # pairs per optimizer step, over all processes
    learning_rate: float
    epochs: int = 1
    max_steps: int | None = None  # stop earlier, after this many optimizer steps
    seed: int = 0
    tokens_per_pack: int = 8192  # unique tokens per forward on one device; bounds memory, changes no result
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0  # in optimizer steps
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-5
    max_grad_norm: float | None = 1.0
    use_margins: bool = True  # rows with a "margin": it is taken off the difference of their rewards
    loss: Literal["bradley_terry", "hinge"] = "bradley_terry"
    label_smoothing: float = 0.0  # share of the labels that are taken to be wrong; for bradley_terry
    center_rewards_coefficient: float = (
        0.0  # what the square of a pair's summed rewards counts in its loss: rewards stay around 0
    )
    freeze: Literal["none", "backbone"] = "none"  # backbone: only the score head is trained
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    liger: Literal["auto", "off"] = "auto"  # auto: on CUDA devices
    compile: bool = False  # torch.compile for the decoder layers; its start takes longer than short runs gain
    eval_every: int | None = None  # optimizer steps; evaluation at the end happens in any case
    keep: Literal["last", "best"] = "last"  # which weights are saved: of the last step, or of the best evaluation
    metric_for_best: Literal["accuracy", "loss"] = "accuracy"
    early_stopping_patience: int | None = None  # evaluations without a better one, after which training stops
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # of the final checkpoint


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; the score head is always trained and saved with them."""

    rank: int = 0  # 0: train all weights
    alpha: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    quantize: Literal["none", "4bit"] = "none"  # 4bit: QLoRA, frozen weights in NF4; on CUDA devices


@dataclass(frozen=True)
class LaunchConfig:
    """On what it is trained."""

    nodes: int = 1
    gpus_per_node: int = 1  # one per GPU
    engine: Literal["auto", "single", "ddp", "zero2", "zero3"] = "auto"  # auto: single or, for several processes, ddp
    offload_optimizer: bool = False  # zero2 and zero3: optimizer states wait in the CPU's memory
    peak_tflops: float = 989.0  # of one device, for the plan's estimate of time; an H100 in bf16, dense
    expected_mfu: float = 0.4  # what share of it the plan counts on
    main_address: str | None = None  # of the first node; default: $MASTER_ADDR
    main_port: int | None = None  # on it; default: $MASTER_PORT, else 29500, or on one node any that is free


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics go besides the run's own files."""

    wandb: bool = False
    project: str = "rmtool"
    name: str | None = None  # default: the recipe's name


@dataclass(frozen=True)
class HubConfig:
    """Publishing at the end of training; off unless repo_id is set."""

    repo_id: str | None = None
    public: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    hub: HubConfig = field(default_factory=HubConfig)
