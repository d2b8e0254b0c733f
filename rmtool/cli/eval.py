"""`rmtool eval`: the eval/rm metrics of preference pairs.

In: a model and preference pairs. Out: accuracy, loss and rewards, overall and per subset, and example pairs.
Cost: one forward pass over the unique tokens of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmtool.cli.inference import (
    InferenceOptions,
    load,
    parse_columns,
    precision_fields,
    print_precision,
    print_sharing,
    print_skipped,
    sharing_fields,
)
from rmtool.cli.options import (
    AllowEmptyOption,
    BadRowOption,
    ColumnOption,
    FidelityOption,
    JsonOption,
    MaxLengthOption,
    PrecisionOption,
    TemplateOption,
    TokensOption,
)
from rmtool.errors import ExitCode, Place

if TYPE_CHECKING:
    from rmtool.data.sources import RecordSubset
    from rmtool.evaluation.evaluate import EvalResult
    from rmtool.model.loading import LoadedModel
    from rmtool.tokenization.tokenized_dataset import TokenizedDataset
    from rmtool.ui import TerminalUi

DEFAULT_EVAL_DATA = "allenai/reward-bench:filtered"


def eval_(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or a Hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Eval data: a file or Hub dataset (owner/name[:split]). Can be repeated. "
            "[default: the run's held-out pairs, else allenai/reward-bench]"
        ),
    ] = None,
    column: ColumnOption = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of example pairs to print.")] = 5,
    precision: PrecisionOption = "auto",
    fidelity: FidelityOption = None,
    max_length: MaxLengthOption = None,
    on_long: Annotated[
        str | None,
        typer.Option(
            help="What to do with pairs longer than max length: error, drop or truncate_prompt. "
            "[default: from the checkpoint]"
        ),
    ] = None,
    allow_empty: AllowEmptyOption = False,
    on_bad_row: BadRowOption = "fail",
    tokens_per_pack: TokensOption = 8192,
    chat_template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a reward model on preference pairs: accuracy, loss and rewards, overall and per subset.

    The loss (eval/rm/loss) is plain Bradley-Terry, -log sigmoid(r_chosen - r_rejected), without the margins, label
    smoothing, centering or hinge that the training loss (train/rm/loss) may have.
    """
    options = InferenceOptions(
        *(precision, max_length, on_long, allow_empty, tokens_per_pack, chat_template, on_bad_row),
        parse_columns(column),
        fidelity,
    )
    options.check(("error", "drop", "truncate_prompt"))
    from rmtool.ui import redirect_output

    with redirect_output() as ui:
        from rmtool.checkpoint import resolve_checkpoint

        folder = resolve_checkpoint(model, None, ui)
        evaluated = _evaluate(folder, data or _default_eval_data(folder), samples, options, ui)
        _print_result(evaluated, as_json, fidelity, ui)
    if evaluated.pairs.counts["too_long"] or evaluated.skipped_rows:
        raise SystemExit(ExitCode.PARTIAL)


@dataclass(frozen=True)
class Sample:
    """The text of one example pair, and its rewards."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True)
class _Evaluated:
    """The result of an evaluation, before it is printed."""

    folder: Path
    sources: list[str]
    loaded: LoadedModel
    pairs: TokenizedDataset
    result: EvalResult
    samples: list[Sample]
    skipped_rows: int
    dropped_pairs: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.folder),
            "data": self.sources,
            **self.result.as_dict(),
            "samples": [vars(sample) for sample in self.samples],
            "dropped": dict(self.pairs.counts),
            "dropped_pairs": self.dropped_pairs,
            "skipped_rows": self.skipped_rows,
            **precision_fields(self.loaded, self.result.fidelity),
            **sharing_fields(self.loaded.padded_reason),
        }


def _evaluate(folder: Path, sources: list[str], samples: int, options: InferenceOptions, ui: TerminalUi) -> _Evaluated:
    from rmtool.config import Source
    from rmtool.dataset.split import read_sources, require_pairs, tokenize_subset
    from rmtool.evaluation.evaluate import evaluate
    from rmtool.model.fidelity import rewards_with_fidelity

    ui.say(f"model: {folder}\ndata:  {', '.join(sources)}")
    with options.rejects(Path(Path(sources[0]).name), sources) as rejects:
        selection = read_sources(
            [Source(source) for source in sources],
            options.row_options(),
            *(0, rejects, ui),
            use_cache=False,  # one process parses them once, and leaves no text behind
        )
        loaded = load(folder, options, ui)
        pairs = tokenize_subset(
            loaded.encoder, selection, on_identical="keep", use_cache=True, label="eval", rejects=rejects, ui=ui
        )
        rejects.raise_if_any()
    require_pairs("eval", pairs, rejects, Place(", ".join(sources)))
    with ui.progress("Evaluating", len(pairs.metadata), "rows") as bar:
        given = (loaded.model, pairs.groups, options.tokens_per_pack, bar, options.fidelity)
        result = evaluate(pairs.metadata, lambda: rewards_with_fidelity(*given), samples)
    shown = _samples(selection, pairs, result)
    print_skipped(rejects, ui)
    dropped = sum(each.count.dropped_pairs for each in selection.loaded)
    return _Evaluated(folder, sources, loaded, pairs, result, shown, rejects.count, dropped)


def _samples(selection: RecordSubset, tokenized: TokenizedDataset, result: EvalResult) -> list[Sample]:
    """Return the text and rewards of the first pair of each sampled record."""
    indices = [tokenized.indices[at] for at, _ in result.samples]
    records, samples = selection.take(indices).records(), list[Sample]()
    for record, (at, rewards) in zip(records, result.samples, strict=True):
        chosen, rejected = tokenized.metadata[at].preferences[0]
        prompt = record.prompt[-1].shown() if record.prompt else ""
        texts = [response[-1].shown() for response in record.responses]
        samples.append(Sample(prompt, texts[chosen], texts[rejected], rewards[chosen], rewards[rejected]))
    return samples


def _default_eval_data(folder: Path) -> list[str]:
    """Return the held-out pairs of the run, if `folder` is in a run folder; else RewardBench."""
    from rmtool.checkpoint import HELD_OUT_FILE

    held_out = folder.parent / HELD_OUT_FILE
    return [str(held_out)] if held_out.is_file() and held_out.stat().st_size else [DEFAULT_EVAL_DATA]


def _print_result(evaluated: _Evaluated, as_json: bool, requested: int | None, ui: TerminalUi) -> None:
    from rmtool.ui import print_json

    if as_json:
        print_json(evaluated.as_dict(), ui)
    else:
        _print_metrics(evaluated.result, ui)
        _print_samples(evaluated.samples, ui)
    print_precision(evaluated.loaded, evaluated.result.fidelity, requested, ui)
    print_sharing(evaluated.loaded, ui)


def _print_metrics(result: EvalResult, ui: TerminalUi) -> None:
    from rmtool.evaluation.metrics import EVAL_PREFIX, METRICS, PairSums

    def row(name: str, sums: PairSums) -> list[str]:
        return [name, f"{sums.pairs:.0f}", *(f"{value:.4f}" for value in sums.report(EVAL_PREFIX).values())]

    rows = [row(name, sums) for name, sums in result.subsets.items()]
    names = [name.replace("_", " ") for name in METRICS]  # so that headers wrap on a narrow terminal
    ui.table("eval/rm", ("subset", "pairs", *names), [*rows, row("all", result.total)])
    if result.total.ties:
        ui.say(f"note: {result.total.ties:.0f} pairs have equal rewards and count as wrong")


def _print_samples(samples: list[Sample], ui: TerminalUi) -> None:
    if samples:
        ui.table(
            "Example pairs",
            ("prompt", "chosen", "rejected", "chosen reward", "rejected reward"),
            [
                (
                    *(_shorten(text) for text in (sample.prompt, sample.chosen, sample.rejected)),
                    f"{sample.chosen_reward:.3f}",
                    f"{sample.rejected_reward:.3f}",
                )
                for sample in samples
            ],
            numeric_from=3,
        )


def _shorten(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
