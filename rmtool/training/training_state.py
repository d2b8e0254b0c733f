"""The training state: trainable weights and AdamW's moments, saved and loaded by all ranks together.

In: an `Engine`, in any state, and a folder that all ranks share. Out: files of `torch.distributed.checkpoint` (DCP), in
which every trainable parameter is flattened: NAME, NAME.exp_avg and NAME.exp_avg_sq, and the optimizer steps of all
parameters. A state that one engine saved with any number of ranks can be loaded by another with another number. Frozen
parameters are not saved.
Cost: each rank writes and reads what it updates (under DDP, an equal part of everything); in CPU memory, one more copy
of that while it writes a ZeRO partition or from a GPU, and the largest saved tensor while it reads.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rmtool.errors import RmtoolError, first_line
from rmtool.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = "optimizer_steps"  # one float per trainable parameter, in the order of their sorted names


@dataclass(frozen=True)
class Share:
    """What this rank updates of a trainable parameter: a range of the flattened parameter, which is empty on ranks that
    update nothing of it.

    size:   elements of the whole parameter
    offset: start of the range in the flattened parameter
    length: elements of the range
    owner:  the tensor that the optimizer updates: the parameter, or a flat ZeRO partition with parts of several
    start:  start of the range in the owner, or in what this rank has of it
    """

    size: int
    offset: int
    length: int
    owner: torch.Tensor
    start: int = 0

    def chunk(self, tensor: torch.Tensor) -> Chunk:
        """Return this range of the owner, or of a moment of the owner's shape."""
        return Chunk(self.size, self.offset, _local(tensor.detach()).view(-1).narrow(0, self.start, self.length))


@dataclass(frozen=True)
class Chunk:
    """A range of a one-dimensional tensor, as DCP saves and loads it (torch's `_Checkpointable` protocol)."""

    length: int  # of the whole tensor
    offset: int
    values: torch.Tensor

    def size(self) -> torch.Size:
        return torch.Size([self.length])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.offset]), self.values.size())] if len(self.values) else []

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.values.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].values


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one replaces values that are not tensors.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].values


def save_state(engine: Engine, folder: Path) -> None:
    """Save the training state to a new folder. All ranks must call it, between two optimizer steps.

    Raises:
        RmtoolError: E0502, on every rank, when one of them cannot write.
    """
    shares = trainable_shares(engine)
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False)
    planner = _SavePlanner(flatten_state_dict=False)
    with _translated("E0502", f"cannot write {folder}", "free disk space, or check the permissions of the run folder"):
        dcp.save(_chunks(engine, shares), storage_writer=writer, planner=planner)


def load_state(engine: Engine, folder: Path) -> None:
    """Load the training state into the model and the optimizer. All ranks must call it, between two optimizer steps.

    DCP unpickles its index: `folder` must be trusted.

    Raises:
        RmtoolError: E0604, on every rank, when its parameters are not the model's; E0501 when a rank cannot read.
    """
    shares = trainable_shares(engine)
    with _translated("E0501", f"cannot read {folder}", "check the disk and the permissions of the run folder"):
        reader = dcp.FileSystemReader(folder)
        chunks = _chunks(engine, shares)
        _require_same_parameters(chunks, reader.read_metadata(), folder)
        dcp.load(chunks, storage_reader=reader, planner=_LoadPlanner(flatten_state_dict=False))
    _set_steps(engine, shares, chunks[STEPS].values)
    if engine.deepspeed:
        _refresh_weights(engine.wrapped.optimizer)


def state_bytes(engine: Engine) -> int:
    """Return the bytes of the tensors of the training state, of all ranks together."""
    itemsize = torch.float32.itemsize
    return sum((share.size * (1 + len(MOMENTS)) + 1) * itemsize for share in trainable_shares(engine).values())


def trainable_shares(engine: Engine) -> dict[str, Share]:
    """Return this rank's share of every trainable parameter, by a name that is the same on every engine."""
    parameters = {name: value for name, value in engine.model.named_parameters() if value.requires_grad}
    if not engine.deepspeed:
        return {name: _fsdp_share(value) for name, value in parameters.items()}
    zero = engine.wrapped.optimizer  # the optimizer of DeepSpeed around torch's
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return {name: _zero3_share(zero, value) for name, value in parameters.items()}
    partitions = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    owners = {parameter: partition for partition, group in partitions for parameter in group}
    return {name: _zero2_share(owners[value], value) for name, value in parameters.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fsdp_share(parameter: torch.Tensor) -> Share:
    """FSDP2 splits matrices by rows, the first ranks have more; what it does not shard is whole on every rank."""
    rows = 0
    if isinstance(parameter, DTensor):
        _, (rows, *_) = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    offset = rows * math.prod(parameter.shape[1:])
    return Share(parameter.numel(), offset, _local(parameter).numel(), parameter)


def _zero2_share(owner: torch.Tensor, parameter: Any) -> Share:
    """ZeRO-1 and 2 flatten each parameter group and split it evenly: a parameter may be on several ranks."""
    fragment = parameter._hp_mapping
    if fragment is None:
        return Share(parameter.numel(), 0, 0, owner)
    here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
    return Share(parameter.numel(), here.start, here.numel, owner, there.start)


def _zero3_share(zero: Any, parameter: Any) -> Share:
    """ZeRO-3 splits each parameter evenly; the last parts end with padding."""
    group, start, length = zero.grad_position[zero.get_param_id(parameter)]
    size = parameter.ds_numel
    offset = min(torch.distributed.get_rank() * length, size)
    return Share(size, offset, min(length, size - offset), zero.fp32_partitioned_groups_flat[group], start)


def _adamw(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer of torch under the wrappers of accelerate and DeepSpeed."""
    optimizer = engine.optimizer.optimizer
    return optimizer.optimizer if engine.deepspeed else optimizer


def _chunks(engine: Engine, shares: dict[str, Share]) -> dict[str, Chunk]:
    """Return what this rank saves and loads, by name; creates the state of an optimizer before its first step."""
    states = {share.owner: _state(_adamw(engine), share.owner) for share in shares.values()}
    chunks = {name: share.chunk(share.owner) for name, share in shares.items()}
    for moment in MOMENTS:
        chunks |= {f"{name}.{moment}": share.chunk(states[share.owner][moment]) for name, share in shares.items()}
    steps = torch.stack([states[shares[name].owner]["step"].cpu() for name in sorted(shares)])
    return chunks | {STEPS: Chunk(len(steps), 0, steps)}


def _state(optimizer: torch.optim.Optimizer, owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the optimizer's state of a tensor; before its first step, create what AdamW would create in it."""
    state = optimizer.state[owner]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(owner, requires_grad=False, memory_format=torch.preserve_format)
    return state


def _set_steps(engine: Engine, shares: dict[str, Share], steps_P: torch.Tensor) -> None:
    """Set the optimizer steps. Steps of the parameters in a ZeRO partition differ only if one process trained some of
    them later than others (experts without tokens); the partition has one number.
    """
    optimizer, steps = _adamw(engine), dict[torch.Tensor, float]()
    for name, step in zip(sorted(shares), steps_P.tolist(), strict=True):
        owner = shares[name].owner
        steps[owner] = max(step, steps.get(owner, 0.0))
    for owner, step in steps.items():
        optimizer.state[owner]["step"].fill_(step)


def _require_same_parameters(chunks: dict[str, Chunk], metadata: Metadata, folder: Path) -> None:
    """Raise E0604 unless the state in the folder has the same tensors, of the same sizes."""
    tensors = metadata.state_dict_metadata.items()
    saved = {name: each.size for name, each in tensors if isinstance(each, TensorStorageMetadata)}
    ours = {name: chunk.size() for name, chunk in chunks.items()}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) == ours.get(name):
            continue
        have, need = (f"{sizes[name].numel():,} elements" if name in sizes else "none" for sizes in (saved, ours))
        raise RmtoolError(
            "E0604",
            f"the training state in {folder} is of another model or other trainable parameters: {name} differs",
            "continue with the base model, lora and train.freeze that the run started with, or pass another --output",
            found=f"{have} in the state, {need} in the model",
        )


def _refresh_weights(zero: Any) -> None:
    """Copy the loaded fp32 partitions to the weights that the forward pass uses, on all ranks."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # drop what is gathered from the old partitions
    for partition, loaded in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        partition.data.copy_(loaded.data)  # the same memory, except with offloaded optimizer states
    zero.checkpoint_event_epilogue()  # gather small parameters, which every rank keeps


@contextlib.contextmanager
def _translated(id: str, what: str, hint: str) -> Iterator[None]:
    """Turn an OSError of any rank into an RmtoolError; other failures are bugs."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process has no group
            yield
    except dcp.CheckpointException as error:  # not an Exception
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise RmtoolError(id, what, hint, found=f"rank {rank}: {first_line(cause)}") from error
        raise RuntimeError(str(error)) from error
    except OSError as error:
        raise RmtoolError(id, what, hint, found=first_line(error)) from error
