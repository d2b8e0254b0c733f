"""What a training step asks of the process group: gradients, an update, sums over ranks, and the whole weights.

In: a `RewardModel`, its recipe and accelerate's `Accelerator`. Out: an `Engine`, the same calls for one process, DDP
and DeepSpeed's ZeRO-2 and ZeRO-3; what shards, reduces and gathers is theirs.
Weights, gradients and optimizer states are fp32 on every engine, and autocast is the model's own: an engine changes no
step. Under ZeRO with bf16, weights and gradients travel in bf16, but for the score head's.
Cost: of `weights`, one gather per parameter, and the model once in the main process's memory.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from rmtool.config import Recipe
from rmtool.dist import DistInfo
from rmtool.errors import RmtoolError
from rmtool.model.precision import compute_precision
from rmtool.model.reward_model import RewardModel
from rmtool.model.weights import merged_weights
from rmtool.recipe import engine_of

# Elements. DeepSpeed's own sizes would take some 8 GB of a GPU; a matrix that is larger than a bucket goes alone.
REDUCE_BUCKET = 16_000_000  # gradients that are sent together
PREFETCH_BUCKET = 50_000_000  # weights that are fetched ahead of their use
LIVE_PARAMETERS = 300_000_000  # weights that are whole at one time: a layer of a model with 8 billion, and the next
PERSISTENT_PARAMETERS = 100_000  # weights up to this size stay whole on every rank


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings for this recipe; nothing in them is left for others to fill in."""
    train = recipe.train
    zero: dict[str, Any] = {
        "stage": int(engine_of(recipe.launch).removeprefix("zero")),
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
        "stage3_max_live_parameters": LIVE_PARAMETERS,
        "stage3_max_reuse_distance": LIVE_PARAMETERS,
        "stage3_param_persistence_threshold": PERSISTENT_PARAMETERS,
        "stage3_gather_16bit_weights_on_model_save": False,  # `Engine.weights` gathers
    }
    if recipe.launch.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # packs are cut here, not there
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # one optimizer everywhere: torch's AdamW
        "torch_autocast": {
            "enabled": compute_precision(train.precision) == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Linear"],  # not its subclass that is the score head
        },
    }


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The process group of this process's place, as the launcher's variables say it."""
    engine = engine_of(recipe.launch)
    if engine == "single":
        return Accelerator()
    # Gradients live in the buckets that DDP sends, not beside them.
    handlers = [
        InitProcessGroupKwargs(backend=None if torch.cuda.is_available() else "gloo"),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    plugin = None
    if engine.startswith("zero"):
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(recipe))
        _leave_out_shared_memory()
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)


def _leave_out_shared_memory() -> None:
    """Between CPU processes, have DeepSpeed use gloo alone: the kernel that it would compile waits for ever at the
    lock that another compilation left behind when it was killed.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on a GPU of its tensors, on a CPU all its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def require_agreement(common: dict[str, str]) -> None:
    """All ranks must have the same values. To be called before a model is built: engines talk to each other then.

    Raises:
        RmtoolError: E0208 one has another, on every rank.
    """
    gathered_all = gather_object([common])
    for rank, other in enumerate(gathered_all):
        for name, value in gathered_all[0].items():
            if other[name] != value:
                raise RmtoolError(
                    "E0208",
                    f"process {rank} has another {name} than process 0",
                    "give every node the same files, recipe and packages",
                    found=f"{other[name]}, not {value}",
                )


@dataclass
class Engine:
    """`model` in `wrapped`, as accelerate prepared it, and its optimizer."""

    accelerator: Accelerator
    model: RewardModel
    wrapped: Any
    optimizer: Any
    max_grad_norm: float | None

    @classmethod
    def prepare(
        cls, accelerator: Accelerator, model: RewardModel, optimizer: torch.optim.Optimizer, clip: float | None
    ) -> Engine:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        return cls(accelerator, model, wrapped, optimizer, clip)

    @property
    def deepspeed(self) -> bool:
        return hasattr(self.wrapped, "set_gradient_accumulation_boundary")

    @property
    def dist(self) -> DistInfo:
        """This process's place among the ranks, for work that is shared out."""
        return DistInfo(self.accelerator.process_index, self.accelerator.num_processes, self.sum)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on the CPU."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the loss's gradients; with the step's `last` loss, they are averaged over the ranks."""
        if self.deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss)
        else:
            self.accelerator.backward(loss)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A block for forward and backward: gradients wait for the step's last loss where an engine can wait."""
        waits = not last and not self.deepspeed
        return self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext()

    def update(self, rate: float, require: Callable[[float], None]) -> float:
        """Clip the gradients and take the optimizer's step at this learning rate; returns their norm before.

        `require` gets that norm, and raises where there must be no step; DeepSpeed tells it only after the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.deepspeed:
            self.wrapped.step()
            norm = float(self.wrapped.get_global_grad_norm())
            require(norm)
            return norm
        norm = self.clip()
        require(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def clip(self) -> float:
        """Clip the gradients; their norm before. Not for DeepSpeed, which does so in its step."""
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf))

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The classifier's whole state dict on the CPU, in `dtype`, on the main process; None on the others. All ranks
        must call it.
        """
        keep, kept = self.accelerator.is_main_process, dict[str, torch.Tensor]()
        for name, value in merged_weights(self.model.classifier, dtype):
            if keep:
                kept[name] = value
        return kept if keep else None
