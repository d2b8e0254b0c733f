"""The engine of a training run: process group, DeepSpeed's settings, and the model and optimizer that it wraps.

In: a recipe, and the launcher's environment variables. Out: accelerate's `Accelerator` for one process, DDP, FSDP2
(`fsdp.py`), ZeRO-2 or ZeRO-3, and an `Engine` with the same calls on each. Weights, gradients and optimizer states are
fp32 on every engine, and autocast is the model's own: an engine changes no step. With bf16, the weights of linear
layers are sent in bf16 by ZeRO and FSDP2, their gradients in bf16 by ZeRO; not those of the score head.
Cost: one collective call per check.
"""

from __future__ import annotations

import contextlib
import gc
import math
import resource
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from rmtool.config import Recipe
from rmtool.dist import DistInfo
from rmtool.errors import RmtoolError
from rmtool.model.precision import compute_precision
from rmtool.model.reward_model import RewardModel
from rmtool.model.weights import merged_weights
from rmtool.recipe import engine_of
from rmtool.training import fsdp
from rmtool.training.optim import trainable

# Sizes in elements. DeepSpeed's defaults take about 8 GB of GPU memory; a matrix larger than a bucket is sent alone.
REDUCE_BUCKET = 16_000_000  # gradients reduced together
PREFETCH_BUCKET = 50_000_000  # weights gathered before they are used
LIVE_PARAMETERS = 300_000_000  # weights gathered at one time: two layers of a model with 8 billion parameters
PERSISTENT_PARAMETERS = 100_000  # weights up to this size are not sharded


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's config for this recipe, without "auto" values."""
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
        "stage3_gather_16bit_weights_on_model_save": False,  # see `Engine.full_state_dict`
    }
    if recipe.launch.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # rmtool plans packs itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on every engine
        "torch_autocast": {
            "enabled": compute_precision(train.precision) == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Linear"],  # not the score head, which is a subclass
        },
    }


def eval_precision(recipe: Recipe) -> str:
    """The precision of a run's evaluations: that of `rmtool eval`, auto, or the training's where only that is possible.

    Engines that shard weights gather them as training needs them, 4-bit layers compute in bf16, and compiled layers do
    not run the hooks that find fp16 overflows.
    """
    compiled = recipe.train.compile is True  # auto compiles on CPUs only, which do not evaluate in fp16
    fixed = engine_of(recipe.launch) in ("zero3", "fsdp2") or compiled or recipe.lora.quantize != "none"
    return compute_precision(recipe.train.precision if fixed else "auto")


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Join the process group that the environment variables of `accelerate launch` describe."""
    engine = engine_of(recipe.launch)
    if engine == "single":
        return Accelerator()
    handlers = [
        InitProcessGroupKwargs(backend=None if torch.cuda.is_available() else "gloo"),
        # Bucket views save one copy of the gradients. Buffers (rotary frequencies) are constant, the same on all ranks.
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
    ]
    plugin = None
    if engine.startswith("zero"):
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(recipe))
        _disable_shared_memory_op()
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)


def _disable_shared_memory_op() -> None:
    """Let DeepSpeed use only gloo between CPU processes.

    It would compile a kernel, and wait forever for the lock file of a compilation that was killed.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


@dataclass
class Engine:
    """A model and its optimizer, prepared by accelerate.

    In: a model (`model`; `wrapped` is what accelerate made of it). Out: gradients, updates, sums over all ranks and the
    full state dict, with the same calls on every engine.
    """

    accelerator: Accelerator
    model: RewardModel
    wrapped: Any
    optimizer: Any
    max_grad_norm: float | None

    @classmethod
    def prepare(
        cls,
        accelerator: Accelerator,
        model: RewardModel,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        engine: str = "auto",
    ) -> Engine:
        """Wrap the model and its optimizer for the engine of this process group; `engine` tells FSDP2 from DDP."""
        if engine == "fsdp2":
            fsdp.shard(model, optimizer, accelerator.device)
            return cls(accelerator, model, model, accelerator.prepare(optimizer), max_grad_norm)
        if accelerator.num_processes > 1 and accelerator.state.deepspeed_plugin is None:
            model.to(accelerator.device)
            for parameter in trainable(model):  # DDP turns those that are there into views of its buckets
                parameter.grad = torch.zeros_like(parameter)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        return cls(accelerator, model, wrapped, optimizer, max_grad_norm)

    @property
    def ddp(self) -> bool:
        """Whether the engine is DDP."""
        return isinstance(self.wrapped, DistributedDataParallel)

    @property
    def fsdp(self) -> bool:
        """Whether the engine is FSDP2."""
        return isinstance(self.wrapped, FSDPModule)

    @property
    def deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed's."""
        return hasattr(self.wrapped, "set_gradient_accumulation_boundary")

    @property
    def dist(self) -> DistInfo:
        """Rank, world size, sum and maximum, for code that divides work over ranks."""
        return DistInfo(self.accelerator.process_index, self.accelerator.num_processes, self.sum, largest)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks; the result is on the CPU."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradients of this loss; after the `last` loss of a step, average them over all ranks."""
        if self.deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss)
        else:
            self.accelerator.backward(loss)
        if self.fsdp and last:
            fsdp.average_whole(self.model.parameters())

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context for forward and backward: DDP reduces gradients only in the `last` pack of a step. Engines that shard
        them do so in every pack: gradients of several packs would be held whole.
        """
        return self.wrapped.no_sync() if self.ddp and not last else contextlib.nullcontext()

    def update(self, rate: float) -> float:
        """Clip the gradients, step the optimizer at this learning rate, clear them; return the norm before clipping.

        If the norm is NaN or inf, weights and the optimizer's state stay as they are, on all ranks: they have the same.
        ZeRO-3 sums it in fp64, the others in fp32, where it is inf from 1e19 on.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.deepspeed:
            self.wrapped.step()  # which checks the norm, too
            norm = float(self.wrapped.get_global_grad_norm())
            assert self.wrapped.was_step_applied() == math.isfinite(norm), "DeepSpeed has used a gradient of NaN or inf"
            return norm
        norm = self.clip()
        if math.isfinite(norm):
            self.optimizer.step()
        # Without gradients, DDP's first packs of the next step would make new ones next to its buckets.
        self.optimizer.zero_grad(set_to_none=not self.ddp)
        return norm

    @property
    def can_retry(self) -> bool:
        """Whether a step that failed halfway can be taken again in this process: no other rank or engine has a part."""
        return self.accelerator.num_processes == 1 and not self.deepspeed

    def discard_gradients(self) -> None:
        """Free the gradients of a step that failed, and what the failed pack has left; not for DeepSpeed."""
        self.optimizer.zero_grad(set_to_none=not self.ddp)
        gc.collect()  # autograd's graph may be in a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def clip(self) -> float:
        """Clip the gradients and return their norm before; not for DeepSpeed, which clips in its step."""
        parameters, limit = list(self.model.parameters()), self.max_grad_norm or math.inf
        if self.fsdp:
            return fsdp.clip(parameters, limit)
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    def full_state_dict(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Gather the classifier's state dict in `dtype` on the CPU of the main process; None on the others.

        All ranks must call it.
        """
        main = self.accelerator.is_main_process
        weights = dict(merged_weights(self.model.classifier, dtype, keep=main))
        return weights if main else None


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of its tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def largest(value: float) -> float:
    """The largest value of all ranks; NaN counts as inf. All ranks must call it."""
    return max(math.inf if math.isnan(each) else each for each in gather_object([value]))


def require_agreement(values: dict[str, str]) -> None:
    """Check that all ranks have the same values. All ranks must call it.

    Call it before the model is built: from then on engines communicate, and ranks that differ would hang.

    Raises:
        RmtoolError: E0208, on every rank, when a value differs.
    """
    gathered = gather_object([values])
    for rank, other in enumerate(gathered):
        for name, value in gathered[0].items():
            if other[name] != value:
                raise RmtoolError(
                    "E0208",
                    f"rank {rank} and rank 0 have different {name}",
                    "use the same files, recipe and package versions on every node",
                    found=f"{other[name]} on rank {rank}, {value} on rank 0",
                )
