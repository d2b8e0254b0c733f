"""Recipes read strictly: a YAML file and overrides in, a frozen `Recipe` out.

An unknown key or a value of the wrong kind is an error that names the nearest known key; nothing is cast or guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from rmtool.config import LaunchConfig, Recipe, Source
from rmtool.errors import Place, RmtoolError

CONFIG_FILE = "config.yaml"  # in a run folder: the resolved recipe, from the launcher to the training process
BUNDLED = "bundled:"  # in a recipe: a file or folder that ships with rmtool


def recipes_folder() -> Path:
    """The bundled recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def resolve(path: str) -> str:
    """`path`, or where the thing lies that `bundled:...` names."""
    return str(recipes_folder() / path.removeprefix(BUNDLED)) if path.startswith(BUNDLED) else path


def load_recipe(name: str, overrides: typing.Sequence[tuple[str, Any]] = ()) -> Recipe:
    """The recipe `name` (bundled, or a path to a YAML file) with `overrides` ("section.key", value) put in last.

    Raises:
        RmtoolError: E0201 no such recipe, E0202 it is not YAML, E0204 an unknown key, E0205 a wrong value.
    """
    path = _recipe_path(name)
    tree = _read(path)
    tree.setdefault("name", path.stem)
    for key, value in overrides:
        _put(tree, key, value)
    recipe = _build(Recipe, tree, "", str(path))
    _check(recipe, str(path))
    return recipe


def _recipe_path(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise RmtoolError("E0201", f"there is no recipe file {name}", "check the path")
    path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in recipes_folder().glob("*.yaml"))
        raise RmtoolError(
            "E0201", f"there is no recipe {name}", f"use one of {', '.join(known)}, or a path to a .yaml file"
        )
    return path


class _StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, but a key that stands there twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = Place(str(path), mark.line + 1, mark.column + 1) if mark else Place(str(path))
        raise RmtoolError("E0202", f"this is not YAML ({error.problem})", "mend this line", place) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RmtoolError("E0202", "this is not YAML", "write it as text", Place(str(path)), str(error)) from error
    if not isinstance(tree, dict):
        raise RmtoolError(
            "E0202", "a recipe holds sections (model:, data:, train:)", "start from a bundled recipe", Place(str(path))
        )
    return tree


def parse_set(text: str) -> tuple[str, Any]:
    """`section.key=value`, the value read as YAML.

    Raises:
        RmtoolError: E0206 not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RmtoolError(
            "E0206", f"--set {text} is not of the form section.key=value", "write e.g. --set train.seed=1"
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise RmtoolError("E0206", f"the value of --set {text} is not YAML", "put it in quotes") from error


def parse_column(text: str) -> tuple[str, str]:
    """`ours=theirs`, two field names.

    Raises:
        RmtoolError: E0206 not of that form.
    """
    ours, _, theirs = text.partition("=")
    if not ours or not theirs:
        raise RmtoolError("E0206", f"--column {text} is not of the form ours=theirs", "write e.g. prompt=question")
    return ours, theirs


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            raise RmtoolError("E0204", f"{section} has no keys of its own", f"write --set {section}=...")
        tree = branch
    tree[last] = value


def _build(kind: Any, tree: Any, path: str, file: str) -> Any:
    """A dataclass from a mapping, strictly."""
    if not isinstance(tree, dict):
        raise RmtoolError(
            "E0205", f"{path} is a section with keys", "indent its keys below it", Place(file), repr(tree)
        )
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise _unknown(f"{path}{key}", str(key), list(hints), file)
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in tree:
            raise RmtoolError(
                "E0205", f"{path}{item.name} is missing", f"add it, or --set {path}{item.name}=...", Place(file)
            )
    return kind(**{key: _value(hints[key], value, f"{path}{key}", file) for key, value in tree.items()})


def _unknown(path: str, key: str, known: list[str], file: str) -> RmtoolError:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return RmtoolError("E0204", f"unknown key {path}", hint, Place(file))


def _value(kind: Any, value: Any, path: str, file: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{path}.", file)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        value = [_item(kind, item, f"{path}[{at}].", file) for at, item in enumerate(value)]
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        accepted, result = _plain(option, value)
        if accepted:
            return result
    raise RmtoolError("E0205", f"{path} is {_describe(kind)}", "mend this value", Place(file), repr(value))


def _item(kind: Any, value: Any, path: str, file: str) -> Any:
    """A mapping in a list is built, if the list may hold some."""
    sections = [option for option in typing.get_args(typing.get_args(kind)[0]) if dataclasses.is_dataclass(option)]
    return _build(sections[0], value, path, file) if sections and isinstance(value, dict) else value


def _plain(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether `value` is of `kind`, and what it becomes: nothing is cast but whole numbers and lists (to tuples)."""
    if typing.get_origin(kind) is Literal:
        # YAML reads a bare `off` as false.
        value = "off" if value is False and "off" in typing.get_args(kind) else value
        return value in typing.get_args(kind), value
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or (Ellipsis not in inner and len(values) != len(inner)):
            return False, None
        pairs = [_plain(inner[0], item) for item in values]
        return all(accepted for accepted, _ in pairs), tuple(item for _, item in pairs)
    if isinstance(kind, types.UnionType):
        tried = [_plain(option, value) for option in typing.get_args(kind)]
        return next((result for result in tried if result[0]), (False, None))
    if typing.get_origin(kind) is dict:
        accepted = isinstance(value, dict) and all(isinstance(part, str) for item in value.items() for part in item)
        return accepted, value
    if kind is float:
        return _as_float(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, kind), value


def _as_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):  # YAML 1.1 reads 5e-5 as a string
        try:
            return True, float(value)
        except ValueError:
            return False, None
    return isinstance(value, int | float) and not isinstance(value, bool), float(value) if isinstance(
        value, int | float
    ) else None


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        options = typing.get_args(inner) if isinstance(inner, types.UnionType) else (inner,)
        return f"a list, each item {' or '.join(_describe(option) for option in options)}"
    if typing.get_origin(kind) is dict:
        return "a mapping of names to names"
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(item.name for item in dataclasses.fields(kind))}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
    return names[kind]


def _check(recipe: Recipe, file: str) -> None:
    """Values that are of the right kind and still make no sense."""
    train, launch, lora = recipe.train, recipe.launch, recipe.lora
    rules = (
        (bool(recipe.data.train), "data.train names at least one source"),
        (recipe.data.holdout >= 0, "data.holdout is at least 0"),
        (
            isinstance(recipe.data.holdout, int) or recipe.data.holdout < 1,
            "data.holdout is a whole number of pairs, or a share below 1",
        ),
        *(
            (source.fraction is None or source.rows is None, "a source of data has fraction or rows, not both")
            for source in map(as_source, (*recipe.data.train, *recipe.data.eval))
        ),
        *(
            (
                all(n is None or 0 < n < float("inf") for n in (source.fraction, source.rows)),
                "fraction and rows are above 0",
            )
            for source in map(as_source, (*recipe.data.train, *recipe.data.eval))
        ),
        (recipe.data.max_length >= 2, "data.max_length is at least 2"),
        (not (recipe.data.eval and recipe.data.holdout), "data.eval and data.holdout exclude each other"),
        (train.seed >= 0, "train.seed is at least 0"),
        (train.batch_size >= 1, "train.batch_size is at least 1"),
        (train.epochs >= 1, "train.epochs is at least 1"),
        (train.max_steps is None or train.max_steps >= 1, "train.max_steps is at least 1"),
        (train.eval_every is None or train.eval_every >= 1, "train.eval_every is at least 1"),
        (train.tokens_per_pack >= 1, "train.tokens_per_pack is at least 1"),
        (
            not (train.compile and train.gradient_checkpointing),
            "train.compile and train.gradient_checkpointing exclude each other: torch compiles no checkpointed layer",
        ),
        (0 < train.learning_rate < float("inf"), "train.learning_rate is above 0"),
        (train.warmup_steps >= 0, "train.warmup_steps is at least 0"),
        (train.weight_decay >= 0, "train.weight_decay is at least 0"),
        (train.eps > 0, "train.eps is above 0"),
        (all(0 <= beta < 1 for beta in train.betas), "train.betas are at least 0 and below 1"),
        (train.max_grad_norm is None or train.max_grad_norm > 0, "train.max_grad_norm is above 0, or null"),
        (recipe.lora.rank >= 0 and recipe.lora.alpha > 0, "lora.rank is at least 0 and lora.alpha above 0"),
        (0 <= train.label_smoothing < 0.5, "train.label_smoothing is at least 0 and below 0.5"),
        (
            not train.label_smoothing or train.loss == "bradley_terry",
            "train.label_smoothing is for the loss bradley_terry",
        ),
        (train.center_rewards_coefficient >= 0, "train.center_rewards_coefficient is at least 0"),
        (
            train.freeze == "none" or not recipe.lora.rank,
            "lora.rank and train.freeze=backbone exclude each other: adapters train the backbone",
        ),
        (lora.quantize == "none" or lora.rank > 0, "lora.quantize needs adapters: set lora.rank"),
        (
            lora.quantize == "none" or engine_of(launch) in ("single", "ddp"),
            "lora.quantize is for the engines single and ddp: ZeRO cannot cut 4-bit weights up",
        ),
        (
            train.early_stopping_patience is None or train.early_stopping_patience >= 1,
            "train.early_stopping_patience is at least 1",
        ),
        (
            (train.keep == "last" and train.early_stopping_patience is None)
            or bool(recipe.data.eval or recipe.data.holdout),
            "train.keep=best and train.early_stopping_patience need held-out pairs: set data.holdout or data.eval",
        ),
        (
            train.early_stopping_patience is None or train.eval_every is not None,
            "train.early_stopping_patience needs train.eval_every",
        ),
        (launch.nodes >= 1 and launch.gpus_per_node >= 1, "launch counts at least one node and one process"),
        (
            launch.engine != "single" or world_size(launch) == 1,
            "launch.engine is auto, ddp, zero2 or zero3 for several processes",
        ),
        (
            not launch.offload_optimizer or launch.engine in ("zero2", "zero3"),
            "launch.offload_optimizer is for the engines zero2 and zero3",
        ),
        (launch.peak_tflops > 0, "launch.peak_tflops is above 0"),
        (0 < launch.expected_mfu <= 1, "launch.expected_mfu is above 0 and at most 1"),
        (launch.main_port is None or 0 < launch.main_port < 2**16, "launch.main_port is a port, 1 to 65535"),
    )
    for holds, rule in rules:
        if not holds:
            raise RmtoolError("E0205", rule, "mend this value", Place(file))


def world_size(launch: LaunchConfig) -> int:
    """Processes on all nodes."""
    return launch.nodes * launch.gpus_per_node


def engine_of(launch: LaunchConfig) -> str:
    """What runs: single, ddp, zero2 or zero3. DDP of one process is that process alone."""
    if world_size(launch) == 1 and launch.engine in ("auto", "ddp"):
        return "single"
    return "ddp" if launch.engine == "auto" else launch.engine


def recipe_hash(recipe: Recipe) -> str:
    """sha256, 12 hex digits, of all that decides what is learned: not of where it runs or is shown."""
    plain = as_dict(recipe)
    kept = {name: plain[name] for name in ("model", "data", "train", "lora")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def as_source(item: str | Source) -> Source:
    """A source of data, however it is written."""
    return Source(item) if isinstance(item, str) else item


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, every key written out."""
    plain = dataclasses.asdict(recipe)
    return typing.cast("dict[str, Any]", _lists(plain))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
