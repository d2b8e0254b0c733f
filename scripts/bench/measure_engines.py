"""What each engine sends, holds and keeps, per weight, measured on CPU ranks over gloo.

    python scripts/bench/measure_engines.py --out engines.json

In: nothing; a random Llama is built. Out: a line of JSON per rank. In bytes per weight of the model: `sent`, the whole
tensors of the collective calls in a step of two packs; `kept` between two steps; the most that `loading` and `saving`
hold beside what was there. In bytes per weight of one decoder layer: the most that a `forward` and a `step` hold beside
`kept`. `gathered`: the dtype of a linear layer's weight in its forward. And loss and gradient norm of the first step.
DeepSpeed's buckets are scaled from those of `engine.py`, which are for layers of 218 million weights.
Cost: a minute per engine on two cores, and 2 GB per rank.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchlib import say
from torch.utils._python_dispatch import TorchDispatchMode

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
WIDE = {"hidden_size": 768, "intermediate_size": 2688, "num_hidden_layers": 6, "num_attention_heads": 12,
        "num_key_value_heads": 3, "vocab_size": 300}  # fmt: skip
LAYER_OF_8B = 218_000_000
MIB = 2**20


class Traffic(TorchDispatchMode):
    """Bytes of collective calls by kind, as the whole tensor that is gathered or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d"):
            kinds = ("allgather", "reduce_scatter", "allreduce", "broadcast", "reduce")
            kind = next((kind for kind in kinds if kind in name), name)
            self.bytes[kind] += max(_size(args[0]), _size(args[1]))
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


class Peak:
    """The most memory that this process takes in a `with` block, beyond what it took before; looked at by a thread."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.extra = self.most - self.before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def measure(recipe_path: str) -> dict[str, Any]:
    """Measure the engine of a recipe, as one of its ranks."""
    from rmtool.model.classifier import is_matrix
    from rmtool.model.loading import training_encoder, training_model
    from rmtool.packing.layers import decoder_layers
    from rmtool.recipe import engine_of, load_recipe
    from rmtool.tokenization.response_group import build_group
    from rmtool.training import engine as engines
    from rmtool.training.optim import build_optimizer

    recipe = load_recipe(recipe_path)
    name, source = engine_of(recipe.launch), Path(recipe.model.path)
    scale = layer_size(json.loads((source / "config.json").read_text())) / LAYER_OF_8B
    for constant in ("REDUCE_BUCKET", "PREFETCH_BUCKET", "LIVE_PARAMETERS"):
        setattr(engines, constant, int(getattr(engines, constant) * scale))
    accelerator = engines.start_accelerator(recipe)
    engines.PERSISTENT_PARAMETERS = 10_000
    encoder, _ = training_encoder(recipe, source)
    with Peak() as loading:
        model, _ = training_model(recipe, source, encoder)
        weights = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
        layer = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in decoder_layers(model.backbone)[0].parameters())
        optimizer = build_optimizer(model, recipe.train)
        engine = engines.Engine.prepare(accelerator, model, optimizer, recipe.train.max_grad_norm, name)
    model.share_prompts(True)
    groups = [build_group([[5, 6, 7, 8 + first, 9], [5, 6, 7, 10, 11, 12 + first]]) for first in range(4)]
    mine = groups[engine.dist.rank :: 2]
    seen: list[torch.dtype] = []
    linear = decoder_layers(model.backbone)[2].mlp.up_proj
    linear.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))

    def step() -> tuple[float, float]:
        engine.wrapped.train()
        total = 0.0
        for number, group in enumerate(mine):
            last = number == len(mine) - 1
            with engine.accumulating(last):
                rewards_N = engine.wrapped(model.collate([group]))
                loss = -torch.nn.functional.logsigmoid(rewards_N[0] - rewards_N[1]) / 2
                engine.backward(loss, last)
            total += float(loss.detach())
        return float(engine.dist.sum(torch.tensor(total))) / 2, engine.update(1e-4)

    first = step()
    step()
    with Traffic() as traffic:
        step()
    with torch.no_grad(), Peak() as forward:
        engine.wrapped.eval()
        engine.wrapped(model.collate(mine[:1]))
    with Peak() as whole:
        step()
    with Peak() as saving:
        engine.full_state_dict(torch.bfloat16)
    rest = resident()
    small = sum(p.numel() for p in model.parameters() if not is_matrix(p))
    return {
        "engine": name, "checkpointing": recipe.train.gradient_checkpointing, "weights": weights, "layer": layer,
        "rank": engine.dist.rank, "small": small, "gathered": str(seen[-1]).removeprefix("torch."),
        "sent": {kind: round(size / weights, 2) for kind, size in sorted(traffic.bytes.items())},
        "kept": round((rest - loading.before) / weights, 2), "forward": round(forward.extra / layer, 2),
        "step": round(whole.extra / layer, 2), "loading": round(loading.extra / weights, 2),
        "saving": round(saving.extra / weights, 2), "first_loss": first[0], "first_norm": first[1],
    }  # fmt: skip


def layer_size(config: dict[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_key_value_heads"] / config["num_attention_heads"]
    return int(hidden * hidden * (2 + 2 * heads) + 3 * hidden * config["intermediate_size"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("engines.json"))
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--without-checkpointing", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a recipe: be one of its ranks
    given = parser.parse_args()
    if given.rank:
        sys.stdout.write("measured " + json.dumps(measure(given.rank)) + "\n")
        sys.stdout.flush()
        dist.destroy_process_group()
        return 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for name in given.engines:
            found += run(Path(folder), name, given)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def make_model(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "debug" / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**WIDE | {"vocab_size": len(tokenizer)})).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")


def run(folder: Path, name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the ranks of an engine; return what each measured."""
    recipe, port = folder / f"{name}.yaml", 29500 + os.getpid() % 1000
    recipe.write_text(
        f"model: {{path: {folder / 'lm'}}}\ndata: {{train: [none.jsonl], max_length: 64}}\n"
        f"train: {{batch_size: 4, learning_rate: 1e-4, precision: {given.precision}, "
        f"gradient_checkpointing: {str(not given.without_checkpointing).lower()}}}\n"
        f"launch: {{engine: {name}, gpus_per_node: {given.processes}}}\n"
    )
    common = os.environ | {
        "WORLD_SIZE": str(given.processes), "LOCAL_WORLD_SIZE": str(given.processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": str("zero" not in name).lower(),
        # Freed memory goes back to the system at once: what is measured is what is held.
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    command = [sys.executable, __file__, "--rank", str(recipe)]
    ranks = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(given.processes)
    ]
    outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("measured ")]
    found = [json.loads(line.removeprefix("measured ")) for line in lines]
    for each in found:
        say(json.dumps(each))
    return found


if __name__ == "__main__":
    sys.exit(main())
