"""Matrix products by precision and by kind of CPU: speed, and error against fp64.

    python scripts/bench/measure_products.py

In: nothing. Out: for each set of instructions that oneDNN may use here (ONEDNN_MAX_CPU_ISA stands in for older CPUs),
GFLOP/s relative to fp32, lowest to highest of ROUNDS, and relative error: of fp32, fp16, bf16, and of bf16 products
split into terms. Split means that activations are the sum of two bf16 numbers, and weights of one (2 terms, for weights
that are bf16) or two (3 terms); products have bf16 results, so a second one computes what the first has rounded off.
Cost: some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from rmtool.model.process_settings import tune_malloc

ISAS = ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX")
SHAPE = (2048, 4096, 3584)  # tokens, inputs, outputs
ROUNDS = 5
Way = Callable[[torch.Tensor], torch.Tensor]


def ways(weight: torch.Tensor) -> dict[str, Way]:
    """The ways to multiply with a weight [outputs, inputs] that bf16 holds exactly, each prepared for it."""
    high = weight.bfloat16()
    low = (weight - high.float()).bfloat16()
    half = weight.half()
    return {
        "fp32": lambda x: linear(x, weight),
        "fp16": lambda x: linear(x.half(), half).float(),
        "bf16": lambda x: linear(x.bfloat16(), high).float(),
        "bf16, 2 terms": _split(high, [high, high]),
        "bf16, 3 terms": _split(high, [high, high, low]),
    }


def _split(high: torch.Tensor, parts: list[torch.Tensor]) -> Way:
    stacked, inputs = torch.cat(parts, 1).T, high.shape[1]

    def multiply(x: torch.Tensor) -> torch.Tensor:
        terms = torch.empty(len(x), len(parts) * inputs, dtype=torch.bfloat16)
        first = terms[:, :inputs]
        first.copy_(x)
        torch.sub(x, first, out=terms[:, inputs : 2 * inputs])
        if len(parts) == 3:
            terms[:, 2 * inputs :] = first
        rounded = first @ high.T
        return rounded.float().add_(torch.addmm(rounded, terms, stacked, beta=-1))

    return multiply


def measure() -> dict[str, tuple[list[float], float]]:
    """Seconds per round and relative error of each way; the rounds take turns."""
    tune_malloc()
    rows, inputs, outputs = SHAPE
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), (torch.randn(outputs, inputs) * 0.02).bfloat16().float()
    exact = x.double() @ weight.double().T
    found, seconds = ways(weight), dict[str, list[float]]()
    errors = {name: float((way(x) - exact).norm() / exact.norm()) for name, way in found.items()}
    for _ in range(ROUNDS):
        for name, way in found.items():
            started = time.perf_counter()
            way(x)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {name: (seconds[name], errors[name]) for name in found}


def main() -> int:
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        sys.stdout.write(json.dumps(measure()))
        return 0
    for isa in ISAS:
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
        shown = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
        measured = json.loads(shown.stdout)
        fp32, _ = measured["fp32"]
        speed = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2] / min(fp32) / 1e9
        sys.stdout.write(f"{isa}: fp32 {speed:,.0f} GFLOP/s\n")
        for name, (seconds, error) in measured.items():
            ratios = sorted(base / each for base, each in zip(fp32, seconds, strict=True))
            middle = ratios[len(ratios) // 2]
            sys.stdout.write(f"  {name}: {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), error {error:.1e}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
