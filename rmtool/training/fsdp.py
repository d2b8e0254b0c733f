"""FSDP2: weights, gradients and optimizer states sharded over all ranks by torch's `fully_shard`.

In: a model and its optimizer. Out: both, changed in place; gradient clipping over all ranks.
A decoder layer is gathered at a time, its linear layers in the precision of their products, so that autocast copies
nothing. What is not computed in bf16 is gathered in fp32, a module at a time: embeddings, the score head, experts in
one tensor. Norms and biases stay whole on every rank in fp32. accelerate's own FSDP2 has one precision for all weights:
norms and the score head would be rounded.
Cost per pack, for the weights of linear layers in bf16: 8 bytes sent per weight (scripts/bench/SPEED.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rmtool.errors import RmtoolError
from rmtool.model.classifier import is_matrix
from rmtool.model.reward_model import RewardModel
from rmtool.packing.layers import decoder_layers

# Gradients are added up over ranks in fp32; the residual stream between layers is fp32, too.
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
FULL = MixedPrecisionPolicy(cast_forward_inputs=False)


def shard(model: RewardModel, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Shard the model over all ranks, onto their devices, and give its new parameters to the optimizer.

    Raises:
        RmtoolError: E0406 layers share weights, which `fully_shard` refuses.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if len(names) < sum(1 for _ in model.named_parameters(remove_duplicate=False)):
        what = f"launch.engine=fsdp2 cannot shard {model.backbone.config.model_type}: its layers share weights"
        raise RmtoolError("E0406", what, "set launch.engine to ddp or zero2")
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    names.clear()
    for group in optimizer.param_groups:
        group["params"] = []  # so that a layer's weights are freed when it is sharded
    _shard_modules(model, device)
    parameters = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameters[name] for name in members]


def _shard_modules(model: RewardModel, device: torch.device) -> None:
    whole = {parameter for parameter in model.parameters() if not is_matrix(parameter)}
    for module in model.modules():
        if isinstance(module, nn.ParameterDict):  # adapters of an embedding, with no forward to gather them for
            whole.update(module.parameters())
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = HALF if model.precision == "bf16" else FULL
    for module in reversed(list(model.modules())):  # a module after those that it contains
        # Linear layers are gathered with their layer; so are convolutions, whose weights the layer reads (qwen3_next).
        if type(module) not in (nn.Linear, nn.Conv1d) and set(module.parameters(recurse=False)) - whole:
            unit = fully_shard(module, mesh=mesh, mp_policy=FULL, ignored_params=whole)
            if isinstance(module, nn.Embedding):  # its gradient needs no weights
                unit.set_unshard_in_backward(False)
    for layer in decoder_layers(model.backbone):
        fully_shard(layer, mesh=mesh, mp_policy=mixed, ignored_params=whole)
    # Resharded also after a forward without a backward: what is saved then must not be what was gathered.
    fully_shard(model, mesh=mesh, mp_policy=mixed, ignored_params=whole, reshard_after_forward=True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes rewards in place
    model.set_force_sum_reduction_for_comms(device.type == "cpu")  # type: ignore[operator]  # gloo has no averages


def average_whole(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients that FSDP does not, after the last pack of a step. All ranks must call it."""
    _, gradients = _local_gradients(parameters)
    if gradients:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Clip the gradients as `torch.nn.utils.clip_grad_norm_` does; return their norm before. All ranks must call it."""
    sharded, whole = _local_gradients(parameters)
    square = torch.nn.utils.get_total_norm(sharded) ** 2
    dist.all_reduce(square)
    norm = (square + torch.nn.utils.get_total_norm(whole).to(square.device) ** 2).sqrt()
    torch._foreach_mul_(sharded + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def _local_gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """This rank's parts of sharded gradients, and the gradients that every rank has."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    return sharded, [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
