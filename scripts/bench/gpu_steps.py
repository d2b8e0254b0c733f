"""Workers of gpu.sh that take training steps or score: what a step waits for, its kernels, tokens/s, MFU, memory.

In: a spec: the part's name (a size, and liger, compile or lora), pairs, perhaps a model. Out: events.
Random weights are drawn on the device: of 8 billion, the CPU would need minutes and 32 GB.
Cost: `MEASURED` steps of `PACKS` packs and two for warm-up; of scoring, twice the forwards of all pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import benchlib
from benchlib import Event, emit

from rmtool.tokenization.pack_plan import key_count, pack_tokens

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
CPU = {"1b": SMALL, "8b": SMALL | {"num_hidden_layers": 4}}
VOCABULARY = 128_256  # Llama 3's: rows that the debug tokenizer never uses cost memory, as they would
TOKENS = {"cuda": {"1b": 8192, "8b": 4096, "model": 8192}, "cpu": {"1b": 512, "8b": 512, "model": 512}}  # of a pack
PRECISION = {"cuda": "bf16", "cpu": "fp32"}  # on CPUs, bf16 builds kernels for every length
PACKS = {"cuda": 4, "cpu": 2}  # per step
WARM_UP, MEASURED = {"cuda": 2, "cpu": 1}, {"cuda": 6, "cpu": 1}  # steps; the second still allocates
SCORED = {"cuda": 2280, "cpu": 32}  # pairs
FILLED = 0.9  # of the device's memory, by the plan: a model that needs more gets fewer layers
PLAN_BOUND = 0.15  # of the plan, between it and the memory that a step takes
TOP = 20  # operators of the profile


def part_size(spec: Event) -> str:
    """The size that a part's name has: 1b, 8b, or model; those without one take the smaller."""
    return next((size for size in ("1b", "8b", "model") if size in spec["part"].split("-")), "1b")


def make_recipe(spec: Event, source: Path) -> Any:
    from rmtool.config import DataConfig, LaunchConfig, LoraConfig, ModelConfig, Recipe, TrainConfig

    options, size, device = spec["part"].split("-"), part_size(spec), spec["device"]
    return Recipe(
        "gpu",
        ModelConfig(str(source), weights="pretrained" if size == "model" else "random", head="new"),
        DataConfig(
            (spec["pairs"],), max_length=2048, on_long="drop", on_empty="drop", on_identical="drop", cache=False
        ),
        TrainConfig(
            batch_size=1,  # batches are made here, of so many tokens
            learning_rate=1e-6,
            precision=PRECISION[device],
            tokens_per_pack=TOKENS[device][size] // (2 if "compile" in options and size == "8b" else 1),
            gradient_checkpointing=size == "8b" and "compile" not in options,
            liger="auto" if "liger" in options else "off",
            compile="compile" in options,
        ),
        LoraConfig(rank=16 if "lora" in options else 0),
        LaunchConfig(peak_tflops=spec["peak_tflops"]),
    )


def make_source(spec: Event, layers: int | None = None) -> Path:
    """The folder with the config and tokenizer of the part's model; of a named model, the folder itself."""
    size, given = part_size(spec), spec.get("model")
    if size == "model":
        return Path(given)
    tokenizer = Path(given) if given else benchlib.ROOT / "recipes" / "debug" / "model"
    changes = {"vocab_size": VOCABULARY} if spec["device"] == "cuda" else dict(CPU[size])
    changes |= {"num_hidden_layers": layers} if layers else {}
    return benchlib.random_llama(tokenizer, Path(spec["scratch"]) / f"llama-{layers}", size, **changes)


def fit(spec: Event) -> Path:
    """The folder of the model, with fewer layers if by the plan it needs more than the device has."""
    import torch

    from rmtool.planning.memory import plan_memory

    source = make_source(spec)
    if spec["device"] == "cpu" or part_size(spec) == "model":
        return source
    room = FILLED * torch.cuda.get_device_properties(0).total_memory

    def planned(layers: int) -> int:
        folder = make_source(spec, layers)
        recipe = make_recipe(spec, folder)
        return plan_memory(recipe, folder, recipe.train.tokens_per_pack).total

    whole, few, more = benchlib.LLAMAS[part_size(spec)]["num_hidden_layers"], 6, 10
    less, most = planned(few), planned(more)
    layers = int(few + (room - less) / (most - less) * (more - few))
    if layers >= whole:
        return source
    emit("layers", layers=layers, of=whole, reason=f"all of them need more than {FILLED:.0%} of the device's memory")
    return make_source(spec, layers)


def draw(spec: Event, source: Path) -> tuple[Any, Any, Any, Any]:
    """The recipe, the model on the device, its encoder, and the pairs."""
    import torch

    from rmtool.data.rejects import Rejects
    from rmtool.dataset.split import load_split
    from rmtool.model.loading import training_encoder, training_model
    from rmtool.ui import SilentUi

    recipe, started = make_recipe(spec, source), time.perf_counter()
    encoder, _ = training_encoder(recipe, source)
    data = load_split(recipe, encoder, Rejects(), SilentUi()).train
    with torch.device(spec["device"]) if recipe.model.weights == "random" else nullcontext():
        model, notices = training_model(recipe, source, encoder, torch.device(spec["device"]))
    count, seconds = sum(p.numel() for p in model.parameters()), time.perf_counter() - started
    emit("model", parameters=count, notices=notices, checkpointing=recipe.train.gradient_checkpointing, seconds=seconds)
    return recipe, model, encoder, data


def start(spec: Event) -> tuple[Any, Iterator[list[Any]]]:
    """A trainer of the part's model, prepared as in a training process, and batches without end."""
    from rmtool.dataset.batches import run_steps
    from rmtool.model.layout_choice import choose_layout
    from rmtool.packing.layers import compile_layers
    from rmtool.training.engine import Engine, start_accelerator
    from rmtool.training.optim import build_optimizer
    from rmtool.training.step import Trainer
    from rmtool.ui import SilentUi

    source = fit(spec)
    accelerator = start_accelerator(make_recipe(spec, source))
    recipe, model, encoder, data = draw(spec, source)
    engine = Engine.prepare(accelerator, model, build_optimizer(model, recipe.train), recipe.train.max_grad_norm)
    layout = choose_layout(model, engine.wrapped, encoder.max_length)
    emit("prepared", padded=layout.reason, compiled=compile_layers(model.backbone) if recipe.train.compile else 0)
    trainer = Trainer.start(recipe, engine, SilentUi(), Path(spec["scratch"]))
    mean = sum(group.unique_tokens for group in data.groups) / len(data.groups)
    pairs = max(1, int(PACKS[spec["device"]] * recipe.train.tokens_per_pack / mean))
    return trainer, run_steps(data.metadata, data.groups, 0, pairs, 0)


def take_step(trainer: Any, batch: Any, device: str) -> float:
    """Take a training step; return its seconds."""
    from rmtool.training.step import training_step

    trainer.prepare(batch)  # as the training loop does during the step before
    benchlib.synchronize(device)
    started = time.perf_counter()
    training_step(trainer, batch, 1e-6, 1)
    benchlib.synchronize(device)
    return time.perf_counter() - started


def inspect_step(spec: Event) -> None:
    """Worker: the synchronizations of a training step, where they are, and the operators that take most of it."""
    (trainer, batches), device = start(spec), spec["device"]
    for batch in itertools.islice(batches, WARM_UP[device]):
        emit("warm_up", seconds=take_step(trainer, batch, device))
    batch = next(batches)
    packs = len(trainer.plan(batch, trainer.tokens_per_pack))
    if device == "cuda":
        count, places = count_synchronizations(trainer, batch)
        emit("synchronizations", count=count, packs=packs, places=places, ok=count <= 2 * packs + 2)
    else:
        emit("synchronizations", count=None, packs=packs, reason="skipped: no CUDA device")
    profile_step(trainer, batch, device)


def count_synchronizations(trainer: Any, batch: Any) -> tuple[int, dict[str, int]]:
    """How often a step waits for the device, by torch's warnings, and at which lines."""
    import torch

    from rmtool.training.step import training_step

    trainer.prepare(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training_step(trainer, batch, 1e-6, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "called a synchronizing" in str(each.message)]
    places = Counter(f"{each.filename.rpartition('site-packages/')[2]}:{each.lineno}" for each in found)
    return len(found), dict(places.most_common(TOP))


def profile_step(trainer: Any, batch: Any, device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        seconds = take_step(trainer, batch, device)
    kernels = [each for each in profiled.key_averages() if not cuda or on_device(each)]

    def microseconds(each: Any) -> float:
        return float(each.self_device_time_total if cuda else each.self_cpu_time_total)

    total = sum(map(microseconds, kernels))
    top = sorted(kernels, key=microseconds, reverse=True)[:TOP]
    table = [{"name": each.key, "calls": each.count, "ms": round(microseconds(each) / 1e3, 3),
              "share": round(microseconds(each) / total, 4)} for each in top]  # fmt: skip
    emit("profile", seconds=seconds, busy_seconds=total / 1e6, calls=sum(each.count for each in kernels), table=table)


def on_device(each: Any) -> bool:
    """Whether an entry of the profile is a kernel: not an operator that started some, nor a named range."""
    from torch.autograd import DeviceType

    return each.device_type == DeviceType.CUDA and not getattr(each, "is_user_annotation", False)


def measure_training(spec: Event) -> None:
    """Worker: unique tokens per second, MFU, and the plan of memory against the memory that steps take."""
    (trainer, batches), device = start(spec), spec["device"]
    model, recipe = trainer.model, trainer.recipe
    for batch in itertools.islice(batches, WARM_UP[device]):
        emit("warm_up", seconds=take_step(trainer, batch, device))
    benchlib.reset_memory_peak(device)
    seconds, tokens, flops, packs, pairs = list[float](), list[int](), list[float](), list[int](), 0
    times = 2 if recipe.lora.rank else 3  # a forward's FLOPs: with adapters, the weights have no gradients
    for batch in itertools.islice(batches, MEASURED[device]):
        groups = [item.group for item in batch]
        packs += [pack_tokens([groups[i] for i in pack]) for pack in trainer.plan(batch, recipe.train.tokens_per_pack)]
        tokens.append(sum(group.unique_tokens for group in groups))
        flops.append(times * forward_flops(model, groups))
        pairs += len(groups)
        seconds.append(take_step(trainer, batch, device))
    assert trainer.tokens_per_pack == recipe.train.tokens_per_pack, "out of memory: smaller packs"
    peak = benchlib.memory(device)[1]
    emit_speed(spec, "training", seconds, tokens, flops)
    emit_memory(trainer, device, peak, max(packs), sum(tokens) // pairs)


def forward_flops(model: Any, groups: Sequence[Any]) -> float:
    """FLOPs of a forward: 2 per weight and token, and those of attention (Kaplan et al., arXiv 2001.08361)."""
    cost = sum(group.unique_tokens + model.key_cost * key_count(group) for group in groups)
    return 2.0 * model.active_matmul_params * cost


def emit_speed(spec: Event, name: str, seconds: list[float], tokens: list[int], flops: list[float]) -> None:
    import torch

    precision = PRECISION[spec["device"]]
    rate = benchlib.spread([count / took for count, took in zip(tokens, seconds, strict=True)])
    speed = sum(flops) / sum(seconds) / 1e12
    if spec["device"] == "cuda":
        torch.cuda.empty_cache()
    matrix_peak = benchlib.peak_gflops(spec["device"], precision) / 1e3
    mfu = speed / spec["peak_tflops"] if spec["device"] == "cuda" else None
    emit(name, tokens_per_second=rate.median, low=rate.low, high=rate.high, seconds=seconds, tokens=tokens,
         precision=precision, tflops=speed, mfu=mfu, of_matrix_products=speed / matrix_peak)  # fmt: skip


def emit_memory(trainer: Any, device: str, peak: int, largest: int, per_pair: int) -> None:
    """The plan's bytes over those that steps took; Liger's kernels may take less, as the plan says."""
    from rmtool.planning.memory import plan_memory

    if device == "cpu":
        emit("memory", planned=None, reason="skipped: on a CPU, resident memory holds the libraries, too")
        return
    recipe = trainer.recipe
    plan = plan_memory(recipe, Path(recipe.model.path), largest, per_pair)
    ratio = peak / plan.total
    ok = ratio < 1 + PLAN_BOUND and (ratio > 1 - PLAN_BOUND or recipe.train.liger == "auto")
    emit("memory", planned=plan.total, measured=peak, ratio=ratio, parts=dataclasses.asdict(plan), ok=ok)


def measure_scoring(spec: Event) -> None:
    """Worker: unique tokens and responses per second of `compute_rewards`; on CUDA, matrices are in bf16, as there."""
    import torch

    from rmtool.model.classifier import matrices
    from rmtool.model.layout_choice import choose_layout
    from rmtool.model.rewards import compute_rewards
    from rmtool.ui import SilentUi

    device = spec["device"]
    recipe, model, encoder, data = draw(spec, make_source(spec))
    for name in list(matrices(model.classifier)) if device == "cuda" else []:
        parameter = model.classifier.get_parameter(name)
        parameter.data = parameter.data.to(torch.bfloat16)
    model = model.to(device).eval()
    emit("prepared", padded=choose_layout(model, model, encoder.max_length).reason)
    groups = [data.groups[at] for at in range(min(len(data.groups), SCORED[device]))]
    compute_rewards(model, groups[: len(groups) // 4], recipe.train.tokens_per_pack, SilentUi())
    benchlib.synchronize(device)
    benchlib.reset_memory_peak(device)
    started = time.perf_counter()
    rewards = compute_rewards(model, groups, recipe.train.tokens_per_pack, SilentUi())
    seconds, peak = time.perf_counter() - started, benchlib.memory(device)[1]
    count, finite = sum(map(len, rewards)), all(math.isfinite(reward) for row in rewards for reward in row)
    emit("rewards", count=count, per_second=count / seconds, memory=peak, ok=finite)
    emit_speed(spec, "scoring", [seconds], [pack_tokens(groups)], [forward_flops(model, groups)])
