"""The process group of a training run, and DeepSpeed's settings.

In: a recipe, and the launcher's environment variables. Out: accelerate's `Accelerator` for one process, DDP, ZeRO-2 or
ZeRO-3. Weights, gradients and optimizer states are fp32 on every engine, and autocast is the model's own: an engine
changes no step. Under ZeRO with bf16, weights and gradients are sent in bf16, except those of the score head.
Cost: one collective call per check.
"""

from __future__ import annotations

import resource
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from rmtool.config import Recipe
from rmtool.errors import RmtoolError
from rmtool.model.precision import compute_precision
from rmtool.recipe import engine_of

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


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Join the process group that the environment variables of `accelerate launch` describe."""
    engine = engine_of(recipe.launch)
    if engine == "single":
        return Accelerator()
    handlers = [
        InitProcessGroupKwargs(backend=None if torch.cuda.is_available() else "gloo"),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # saves one copy of the gradients
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


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of its tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


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
