"""Recipes: a YAML file and overrides in, a frozen `Recipe` (config.py) out.

All problems are raised together: unknown keys, each with the nearest known one, then values of the wrong type or range.
Cost: pydantic's import, 0.1 s; not paid by `rmtool --help`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rmtool.config import CONFLICT, RENAMED_KEYS, Recipe, Source
from rmtool.config import as_source as as_source
from rmtool.config import engine_of as engine_of
from rmtool.config import seconds_of as seconds_of
from rmtool.config import world_size as world_size
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.redaction import has_token

CONFIG_FILE = "config.yaml"  # in a run folder: the resolved recipe, from the launcher to the training process
BUNDLED = "bundled:"  # in a recipe: a file or folder that ships with rmtool
_RECIPE = TypeAdapter(Recipe)
_UNKNOWN_KEY, _SET_IT = "unknown key ", "set it in the recipe"
_EXCLUSIVE = {"warmup_steps": "warmup_ratio", "warmup_ratio": "warmup_steps"}  # an override of one resets the other
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")  # pydantic's types of errors for unknown keys
# What pydantic's errors require, by their type; other types keep its own words.
_REQUIREMENTS = {
    "bool_type": "be true or false",
    "dataclass_type": "be a section with keys",
    "dict_type": "be a mapping",
    "float_type": "be a number",
    "greater_than": "be above {gt:g}",
    "greater_than_equal": "be at least {ge:g}",
    "int_type": "be an integer",
    "less_than": "be below {lt:.20g}",
    "less_than_equal": "be at most {le:g}",
    "literal_error": "be {expected}",
    "string_type": "be a string",
    "too_long": "have at most {max_length} items",
    "too_short": "have at least {min_length} item",
    "tuple_type": "be a list",
}


def recipes_folder() -> Path:
    """Return the folder of bundled recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def resolve(path: str) -> str:
    """Return `path` with its ~ expanded, or for `bundled:NAME` the path of NAME in the folder of bundled recipes."""
    bundled = path.startswith(BUNDLED)
    return str(recipes_folder() / path.removeprefix(BUNDLED)) if bundled else os.path.expanduser(path)


def load_recipe(name: str, overrides: typing.Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Load the recipe `name` (bundled, or a path to a YAML file); `overrides` ("section.key", value) take precedence.

    Raises:
        RmtoolError: E0201 when it is not found, E0202 invalid YAML, E0204 an unknown key, E0205 an invalid value.
    """
    path = _recipe_path(name)
    tree = _read_yaml(path)
    tree.setdefault("name", path.stem)
    place, problems = Place(str(path)), list[RmtoolError]()
    for key, value in overrides:
        section, _, name = key.partition(".")
        if value and section == "train" and name in _EXCLUSIVE and isinstance(tree.get("train"), dict):
            tree["train"].pop(_EXCLUSIVE[name], None)
    for key, value in overrides:
        try:
            _override(tree, key, value)
        except RmtoolError as error:
            problems.append(error)
    problems += _tokens(tree)
    try:
        recipe = _RECIPE.validate_python(tree)
    except ValidationError as error:
        problems += _problems(error, tree)
    if problems:
        raise _together(problems, place)
    return recipe


def _tokens(value: Any, key: tuple[int | str, ...] = ()) -> Iterator[RmtoolError]:
    """Yield an error per access token: the recipe is written to the run folder, the checkpoint and trackers."""
    if isinstance(value, str) and has_token(value):
        hint = "remove it; log in with hf auth login or wandb login, or set HF_TOKEN or WANDB_API_KEY"
        yield RmtoolError("E0205", f"{_dotted(key)} contains an access token", hint)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _tokens(item, (*key, name))


def _recipe_path(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise RmtoolError("E0201", f"recipe not found: {name}", "check the path")
    path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in recipes_folder().glob("*.yaml"))
        hint = f"use one of {', '.join(known)}, or the path of a .yaml file"
        raise RmtoolError("E0201", f"recipe not found: {name}", hint)
    return path


class _StrictLoader(yaml.SafeLoader):
    """yaml.SafeLoader, but duplicate keys are an error: YAML's own rule is that the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = Place(str(path), mark.line + 1, mark.column + 1) if mark else Place(str(path))
        raise RmtoolError("E0202", f"invalid YAML: {error.problem}", "fix this line", place) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RmtoolError(
            "E0202", f"invalid YAML: {first_line(error)}", "pass a YAML file", Place(str(path))
        ) from error
    if not isinstance(tree, dict):
        what = "a recipe must have the sections model, data and train"
        raise RmtoolError("E0202", what, "use a bundled recipe as a template", Place(str(path)))
    return tree


def parse_set(text: str) -> tuple[str, Any]:
    """Parse `section.key=value`, the value as YAML.

    Raises:
        RmtoolError: E0206 when it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        what = f"invalid --set {text}: must be SECTION.KEY=VALUE"
        raise RmtoolError("E0206", what, "use this form, e.g. --set train.seed=1")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise RmtoolError(
            "E0206", f"invalid --set {text}: the value is not YAML", "use quotes around the value"
        ) from error


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            name = key[: key.index(section) + len(section)]
            raise RmtoolError("E0204", f"unknown key {key}: {name} is not a section", "check the sections of the key")
        tree = branch
    tree[last] = value


def _together(problems: list[RmtoolError], place: Place) -> RmtoolError:
    """Make one error of all problems, unknown keys first."""
    problems = sorted(problems, key=lambda problem: problem.id)
    renamed = [problem.what.removeprefix(_UNKNOWN_KEY) for problem in problems]
    error = problems[0]
    if len(problems) > 1 and RENAMED_KEYS.keys() >= set(renamed):  # an older recipe
        hint = ", ".join(f"{name} is now {RENAMED_KEYS[name]}" for name in renamed)
        error = RmtoolError("E0204", f"renamed keys: {', '.join(renamed)}", f"rename them: {hint}")
    elif len(problems) > 1:
        rows = tuple(f"{place}: {_one_line(problem)}" for problem in problems)
        what = f"{len(problems)} problems in the recipe"
        error = RmtoolError(error.id, what, "fix all of them, in the recipe or with --set SECTION.KEY=VALUE", rows=rows)
    error.place = place
    return error


def _one_line(problem: RmtoolError) -> str:
    return problem.summary() if problem.hint.startswith(_SET_IT) else f"{problem.summary()}; {problem.hint}"


def _problems(error: ValidationError, tree: dict[str, Any]) -> Iterator[RmtoolError]:
    """Yield one error per key. A container is not invalid because of what is in it, and a key is not missing if an
    unknown one was meant.
    """
    by_key: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(tree, item), []).append(item)  # one for each member of a union
    containers, meant = {key[:size] for key in by_key for size in range(len(key))}, set[str]()
    for key in [key for key, items in by_key.items() if items[0]["type"] in _UNKNOWN]:
        problem = _unknown_key(key)
        meant.add(_dotted((*key[:-1], problem.hint.removeprefix("did you mean ").rstrip("?"))))
        yield problem
        del by_key[key]
    for key, items in by_key.items():
        conflicts = [item["ctx"]["found"] for item in items if item["type"] == CONFLICT]
        if conflicts:
            yield from (RmtoolError("E0205", what, hint) for what, hint in conflicts[0])
        elif key not in containers and not (items[0]["type"] == "missing" and _dotted(key) in meant):
            yield _invalid_value(_dotted(key), items)


def _invalid_value(name: str, items: list[ErrorDetails]) -> RmtoolError:
    hint = _SET_IT if "[" in name else f"{_SET_IT} or with --set {name}=VALUE"
    if items[0]["type"] == "dataclass_type":
        hint = "indent its keys below it, or remove it"
    if items[0]["type"] == "missing":
        return RmtoolError("E0205", f"{name} is missing", hint)
    must = " or ".join(dict.fromkeys(_requirement(item) for item in items)).replace(" or be ", " or ")
    return RmtoolError("E0205", f"{name} must {must}", hint, found=repr(items[0]["input"]))


def _key(tree: Any, item: ErrorDetails) -> tuple[int | str, ...]:
    """Return the key of an error: pydantic's `loc` without the names of union members."""
    key: list[int | str] = []
    for part in item["loc"]:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            tree = tree[part]
            key.append(part)
    absent = item["type"] in ("missing", *_UNKNOWN) and item["loc"][-1:] != tuple(key[-1:])
    return (*key, item["loc"][-1]) if absent else tuple(key)


def _dotted(key: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _requirement(item: ErrorDetails) -> str:
    """Return the words after "must" for one of pydantic's errors."""
    if item["type"] in _REQUIREMENTS:
        return _REQUIREMENTS[item["type"]].format(**item.get("ctx", {})).replace("'", "")
    return item["msg"].removeprefix("Input should ").removeprefix("Tuple should ")


def _unknown_key(key: tuple[int | str, ...]) -> RmtoolError:
    name, last = _dotted(key), str(key[-1])
    if name in RENAMED_KEYS:
        return RmtoolError("E0204", _UNKNOWN_KEY + name, f"use {RENAMED_KEYS[name]}, its new name")
    sections = typing.get_type_hints(Recipe)
    kind = Recipe if len(key) == 1 else sections[str(key[0])] if len(key) == 2 else Source
    known = [item.name for item in dataclasses.fields(kind)]
    elsewhere = [
        f"{section}.{last}"
        for section, kind in sections.items()
        if dataclasses.is_dataclass(kind) and any(item.name == last for item in dataclasses.fields(kind))
    ]
    near = (elsewhere if len(key) < 3 else []) or difflib.get_close_matches(last, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return RmtoolError("E0204", _UNKNOWN_KEY + name, hint)


def recipe_hash(recipe: Recipe) -> str:
    """Hash all settings that decide what is learned: not those of where it runs or is shown."""
    plain = as_dict(recipe)
    learned = {name: plain[name] for name in ("model", "data", "train", "lora")}
    for name in ("time_limit", "save_every", "save_minutes", "keep_snapshots", "delete_snapshots"):
        del learned["train"][name]
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:12]


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, with every key."""
    plain: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return plain


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
