"""Recipe sections: the type, default, limits and meaning of every key.

In: mappings, as YAML gives them (`recipe.py` reads them). Out: frozen sections with valid values, or an error.
Nothing is cast but lists to tuples and integers to floats. Values computed from a recipe (steps, packs, addresses) are
not stored in it.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

RENAMED_KEYS = {
    "train.center": "train.center_rewards_coefficient",
    "train.best_by": "train.metric_for_best",
    "train.patience": "train.early_stopping_patience",
    "launch.utilisation": "launch.expected_mfu",
    "launch.utilization": "launch.expected_mfu",
    "launch.processes_per_node": "launch.gpus_per_node",
}


def _float_from_text(value: object) -> object:
    """Convert text to a float: YAML 1.1 reads 1e-5 as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


_FLOAT = BeforeValidator(_float_from_text)
_ONE_OR_MORE = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
_OFF = BeforeValidator(lambda value: "off" if value is False else value)  # YAML 1.1 reads a bare off as false
_NO_OTHER_KEYS = ConfigDict(extra="forbid")

Count = Annotated[StrictInt, Field(ge=1, lt=2**64)]
Size = Annotated[StrictInt, Field(ge=0, lt=2**64)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), _FLOAT]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), _FLOAT]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False), _FLOAT]
BelowHalf = Annotated[float, Field(strict=True, ge=0, lt=0.5, allow_inf_nan=False), _FLOAT]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]


_DURATION = re.compile("(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")


def seconds_of(duration: str) -> int:
    """Return the seconds of a duration such as 3h55m; 0 if it is not one."""
    found = _DURATION.fullmatch(duration)
    parts = zip(found.groups(), (86_400, 3_600, 60, 1), strict=True) if found else ()
    return sum(int(count or 0) * unit for count, unit in parts)


def _require_duration(value: object) -> object:
    if not isinstance(value, str) or not seconds_of(value):
        raise PydanticCustomError("duration", "Input should be a duration above 0 such as 3h55m, 90m or 1d12h")
    return value


Duration = Annotated[str, BeforeValidator(_require_duration)]
CONFLICT = "conflict"  # type of pydantic's error for values that are valid alone but not together


def _refuse(*conflicts: tuple[object, str, str]) -> None:
    """Refuse values that are valid alone but not together: each conflict is (whether it exists, what, hint)."""
    found = [(what, hint) for broken, what, hint in conflicts if broken]
    if found:
        raise PydanticCustomError(CONFLICT, "conflict", {"found": found})


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class ModelConfig:
    """The base model."""

    path: str  # a Hub id, a local folder, or bundled:NAME
    revision: str | None = None  # branch, tag or commit of the Hub repository
    weights: Literal["pretrained", "random"] = "pretrained"  # random: use only config.json and the tokenizer
    head: Literal["auto", "new"] = "auto"  # score head; auto: load it if the checkpoint has one; new: reinitialize it
    chat_template: str | None = None  # a .jinja file or "tulu"; default: the tokenizer's


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class Source:
    """One source of a data mixture: all of it, unless `fraction` or `rows` is set."""

    path: str  # a file (.jsonl, .json, .parquet, each also as .gz) or a Hub dataset (owner/name or owner/name:split)
    fraction: Positive | None = None  # fraction of the source to use; above 1, rows are repeated
    rows: Count | None = None  # number of rows to use (of prompts, in formats that are grouped by prompt)

    @model_validator(mode="after")
    def _check(self) -> Source:
        both = self.fraction is not None and self.rows is not None
        _refuse((both, f"fraction and rows of {self.path} cannot both be set", "remove one of them"))
        return self


Sources = Annotated[tuple[str | Source, ...], _ONE_OR_MORE]


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class DataConfig:
    """The training set and the eval set."""

    train: Annotated[Sources, Field(min_length=1)]  # training data: paths, or mappings with path and fraction or rows
    eval: Sources = ()  # eval data, in the same form
    holdout: Size | Fraction = 0  # number or fraction of training pairs to hold out, split by prompt; excludes `eval`
    columns: dict[str, str] = field(default_factory=dict)  # field name: column name; dots for nested columns
    rating_margins: StrictBool = False  # use differences of ratings, or of score_chosen and score_rejected, as margins
    max_pairs_per_prompt: Count = 1000  # of rated, ranked or listed responses; if there are more, they are drawn from
    on_bad_row: Literal["fail", "skip"] = "fail"  # invalid rows; skip: write them to rejects.jsonl
    max_length: Annotated[StrictInt, Field(ge=2, lt=2**64)] = 2048  # max tokens of prompt and response together
    on_long: Literal["error", "drop", "truncate_prompt"] = "error"  # pairs longer than max_length
    on_empty: Literal["error", "drop", "keep"] = "error"  # pairs with an empty response
    cache: StrictBool = True  # store parsed rows and token ids in $RMTOOL_CACHE or ~/.cache/rmtool
    on_identical: Literal["error", "drop"] = "error"  # pairs whose two responses are the same

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        hint = "set data.holdout=0, or data.eval=[]"
        _refuse((self.eval and self.holdout, "data.eval and data.holdout cannot both be set", hint))
        return self


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class TrainConfig:
    """The optimization. Numbers of pairs and steps are global: the same on any number of processes."""

    batch_size: Count  # global batch size: pairs per optimizer step, over all processes
    learning_rate: Positive  # peak learning rate, after warmup
    epochs: Count = 1  # passes over the training set
    max_steps: Count | None = None  # stop after this many optimizer steps
    time_limit: Duration | None = None  # e.g. 3h55m: in time before it, save a snapshot and exit with 75
    seed: Size = 0  # random seed
    # max unique tokens per forward pass and device; limits memory, does not change results
    tokens_per_pack: Count = 8192
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # learning rate schedule after warmup
    warmup_steps: Size = 0  # optimizer steps of linear warmup, at most those of the run
    warmup_ratio: Fraction = 0.0  # or their fraction of all steps, rounded up; setting one of the two resets the other
    weight_decay: NonNegative = 0.0  # AdamW
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # AdamW
    eps: Positive = 1e-5  # AdamW
    max_grad_norm: Positive | None = 1.0  # gradient clipping; null: off
    use_margins: StrictBool = True  # rows with a "margin": subtract it from the reward difference in the loss
    # train/rm/loss is this loss, with margins, label smoothing and centering; eval/rm/loss is plain bradley_terry.
    loss: Literal["bradley_terry", "hinge"] = "bradley_terry"  # training loss
    label_smoothing: BelowHalf = 0.0  # assumed fraction of wrong labels
    # coefficient of (r_chosen + r_rejected)^2 in the loss (TRL: center_rewards_coefficient)
    center_rewards_coefficient: NonNegative = 0.0
    freeze: Literal["none", "backbone"] = "none"  # backbone: train only the score head
    precision: Literal["fp32", "bf16"] = "fp32"  # of computation; weights and optimizer states are fp32
    gradient_checkpointing: StrictBool = False  # recompute activations in the backward pass to save memory
    liger: Annotated[Literal["auto", "off"], _OFF] = "auto"  # Liger kernels; auto: on CUDA devices
    # torch.compile the decoder layers; auto: of long runs in bf16 on CPUs that are fast in it
    compile: StrictBool | Literal["auto"] = "auto"
    eval_every: Count | None = None  # optimizer steps between evaluations; one at the end happens in any case
    keep: Literal["last", "best"] = "last"  # checkpoint to save: of the last step, or of the best evaluation
    metric_for_best: Literal["accuracy", "loss"] = "accuracy"  # of eval/rm, for keep=best and early stopping
    early_stopping_patience: Count | None = None  # stop after this many evaluations without improvement
    on_nonfinite: Literal["stop", "skip"] = "stop"  # loss or gradient norm of NaN or inf; skip: go on without the step
    max_skips: Count = 10  # steps that train.on_nonfinite=skip may skip before the run stops
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights in the checkpoint
    save_every: Count | None = None  # optimizer steps between snapshots, from which an interrupted run resumes
    save_minutes: Positive | None = 15.0  # or minutes between snapshots; null: off
    keep_snapshots: Count = 2  # number of snapshots to keep: the newest
    delete_snapshots: StrictBool = True  # when the run is finished and its model is saved

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        layers = (
            "train.compile and train.gradient_checkpointing cannot both be true: torch compiles no checkpointed layer"
        )
        smoothing = f"train.label_smoothing must be 0 with train.loss={self.loss}"
        stopping = "train.eval_every must be set for train.early_stopping_patience"
        warmup = "train.warmup_steps and train.warmup_ratio cannot both be set"
        _refuse(
            (self.compile is True and self.gradient_checkpointing, layers, "set one of them to false"),
            (
                self.label_smoothing and self.loss != "bradley_terry",
                smoothing,
                "set train.loss=bradley_terry, or train.label_smoothing=0",
            ),
            (self.early_stopping_patience and not self.eval_every, stopping, "set train.eval_every=STEPS"),
            (self.warmup_steps and self.warmup_ratio, warmup, "set train.warmup_steps=0, or train.warmup_ratio=0"),
        )
        return self


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class LoraConfig:
    """Low-rank adapters, merged into the checkpoint. The score head is always trained with them."""

    rank: Size = 0  # 0: train all weights
    alpha: Count = 16  # adapters are scaled by alpha / rank
    targets: str | tuple[str, ...] = "all-linear"  # names of linear layers
    quantize: Literal["none", "4bit"] = "none"  # 4bit: QLoRA, frozen weights in NF4; needs a CUDA device

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        what = "lora.rank must be at least 1 with lora.quantize=4bit"
        _refuse((self.quantize != "none" and not self.rank, what, "set lora.rank=16, or lora.quantize=none"))
        return self


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class LaunchConfig:
    """Nodes, processes and the engine."""

    nodes: Count = 1  # number of nodes
    gpus_per_node: Count = 1  # processes per node, one per GPU; without GPUs they share the CPU
    engine: Literal["auto", "single", "ddp", "fsdp2", "zero2", "zero3"] = "auto"  # auto: single, or ddp for several
    offload_optimizer: StrictBool = False  # zero2 and zero3: keep optimizer states in CPU memory
    peak_tflops: Positive = 989.0  # of one device, for the estimated time; default: H100, dense bf16
    expected_mfu: Annotated[Positive, Field(le=1)] = 0.4  # assumed MFU, for the estimated time
    main_address: str | None = None  # hostname or IP address of node 0; default: $MASTER_ADDR
    main_port: Port | None = None  # of node 0; default: $MASTER_PORT, else 29500, or any free port on one node

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        several = f"launch.engine must be auto, ddp, fsdp2, zero2 or zero3 for {world_size(self)} processes"
        offload = "launch.engine must be zero2 or zero3 with launch.offload_optimizer=true"
        hint = "set launch.engine=zero3, or launch.offload_optimizer=false"
        _refuse(
            (self.engine == "single" and world_size(self) > 1, several, "set launch.engine=auto"),
            (self.offload_optimizer and self.engine not in ("zero2", "zero3"), offload, hint),
        )
        return self


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class TrackConfig:
    """Experiment tracking, next to metrics.jsonl in the run folder."""

    wandb: StrictBool = False  # log to Weights & Biases
    tensorboard: StrictBool = False  # write event files for TensorBoard to RUN/tensorboard
    strict: StrictBool = False  # a failure of a tracker is an error: at the start, or when the model is saved
    project: str | None = None  # project on Weights & Biases; default: WANDB_PROJECT, or rmtool
    name: str | None = None  # run name on Weights & Biases; default: WANDB_NAME, or the recipe's name


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class HubConfig:
    """Upload at the end of training."""

    repo_id: str | None = None  # owner/name to push the checkpoint to; null: do not push
    public: StrictBool = False  # make the repository public


@dataclass(frozen=True, config=_NO_OTHER_KEYS)
class Recipe:
    """One training run."""

    name: str  # default: the file name
    model: ModelConfig  # base model
    data: DataConfig  # training and eval data
    train: TrainConfig  # optimization
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank adapters
    launch: LaunchConfig = field(default_factory=LaunchConfig)  # nodes and processes
    track: TrackConfig = field(default_factory=TrackConfig)  # experiment tracking
    hub: HubConfig = field(default_factory=HubConfig)  # upload

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        train, lora = self.train, self.lora
        adapters = f"lora.rank must be 0 with train.freeze={train.freeze}: adapters train the backbone"
        four_bit = "launch.engine must be single or ddp with lora.quantize=4bit: 4-bit weights cannot be sharded"
        sharded = engine_of(self.launch) not in ("single", "ddp")
        best = "eval data must be set for train.keep=best and train.early_stopping_patience"
        compares = train.keep == "best" or train.early_stopping_patience
        no_eval = not (self.data.eval or self.data.holdout)
        _refuse(
            (train.freeze != "none" and lora.rank, adapters, "set train.freeze=none, or lora.rank=0"),
            (lora.quantize != "none" and sharded, four_bit, "set launch.engine=auto, or lora.quantize=none"),
            (compares and no_eval, best, "set data.holdout or data.eval"),
        )
        return self


def world_size(launch: LaunchConfig) -> int:
    """Return the number of processes on all nodes."""
    return launch.nodes * launch.gpus_per_node


def engine_of(launch: LaunchConfig) -> str:
    """Return the engine to run: single, ddp, fsdp2, zero2 or zero3. DDP and FSDP2 with one process are single."""
    if world_size(launch) == 1 and launch.engine in ("auto", "ddp", "fsdp2"):
        return "single"
    return "ddp" if launch.engine == "auto" else launch.engine


def as_source(item: str | Source) -> Source:
    """Return a data source as a `Source`, also if it is written as a path only."""
    return Source(item) if isinstance(item, str) else item
