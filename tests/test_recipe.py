"""Recipes are strict, and what is resolved reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmtool.config import RENAMED_KEYS, LaunchConfig, engine_of
from rmtool.errors import Place, RmtoolError, format_error
from rmtool.recipe import as_dict, dump_recipe, load_recipe, parse_set, recipe_hash, recipes_folder, seconds_of

BUNDLED = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
MINIMAL = "model: {path: m}\ndata: {train: [x.jsonl]}\ntrain: {batch_size: 4, learning_rate: 1e-4}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    return str(path)


def test_the_bundled_recipes_are_these() -> None:
    assert BUNDLED == ["debug", "smollm2-135m", "tulu3-8b"]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_tulu3_is_the_published_recipe() -> None:
    recipe = load_recipe("tulu3-8b")
    train, launch = recipe.train, recipe.launch
    assert (train.batch_size, train.learning_rate, train.epochs, train.schedule) == (256, 3e-6, 1, "linear")
    assert (train.betas, train.eps, train.precision, train.gradient_checkpointing) == ((0.9, 0.999), 1e-5, "bf16", True)
    assert (recipe.data.max_length, train.seed, train.warmup_steps) == (2048, 8, 0)
    assert (launch.nodes, launch.gpus_per_node, launch.engine) == (8, 8, "fsdp2")
    assert recipe.track.wandb
    assert recipe.hub.repo_id is None


def test_wandb_and_the_hub_are_off_unless_asked() -> None:
    for name in ("debug", "smollm2-135m"):
        recipe = load_recipe(name)
        assert not recipe.track.wandb
        assert recipe.hub.repo_id is None
        assert not recipe.hub.public


def test_overrides_come_last_and_are_read_as_yaml(tmp_path: Path) -> None:
    sets = [parse_set(text) for text in ("train.seed=7", "data.train=[a.jsonl, b.jsonl]", "train.learning_rate=5e-5")]
    recipe = load_recipe(write(tmp_path, MINIMAL), [*sets, parse_set("train.max_grad_norm=null")])
    assert (recipe.train.seed, recipe.data.train, recipe.train.learning_rate) == (7, ("a.jsonl", "b.jsonl"), 5e-5)
    assert recipe.train.max_grad_norm is None
    assert load_recipe(write(tmp_path, MINIMAL), [("data.train", "one.jsonl")]).data.train == ("one.jsonl",)


WRONG: list[tuple[str, str, str]] = [
    ("train.learning_rat=1", "E0204", "learning_rate"),
    ("trian.seed=1", "E0204", "train"),
    ("train.seed=-1", "E0205", "train.seed must be at least 0"),
    ("train.seed=soon", "E0205", "must be an integer"),
    ("train.seed=1.5", "E0205", "must be an integer"),
    ("train.seed=true", "E0205", "must be an integer"),
    ("train.schedule=linaer", "E0205", "linear"),
    ("train.batch_size=0", "E0205", "at least 1"),
    ("train.learning_rate=-1", "E0205", "above 0"),
    ("train.learning_rate=.nan", "E0205", "finite"),
    ("train=3", "E0205", "section"),
    ("name.x=3", "E0204", "name"),
    ("data.train=[]", "E0205", "at least 1 item"),
    ("train.betas=[0.9]", "E0205", "train.betas[1] is missing"),
    ("train.betas=0.9", "E0205", "list"),
    ("track.wandb=maybe", "E0205", "true or false"),
    ("launch={nodes: 2, engine: single}", "E0205", "for 2 processes"),
    ("launch.offload_optimizer=true", "E0205", "zero2 or zero3"),
    ("train.label_smoothing=0.5", "E0205", "below 0.5"),
    ("train={label_smoothing: 0.1, loss: hinge, batch_size: 1, learning_rate: 1.0}", "E0205", "bradley_terry"),
    ("train.center_rewards_coefficient=-1", "E0205", "at least 0"),
    ("train.keep=best", "E0205", "data.holdout or data.eval"),
    ("train.early_stopping_patience=0", "E0205", "at least 1"),
    ("lora.quantize=4bit", "E0205", "lora.rank"),
    ("launch.main_port=0", "E0205", "port"),
    ("data.holdout=5", "E0205", "data.eval"),
    ("data.holdout=1.0", "E0205", "must be an integer or below 1"),
    ("data.train=[{path: x, rows: 1, fraction: 1}]", "E0205", "fraction and rows of x"),
    ("data.train=[{path: x, row: 1}]", "E0204", "did you mean rows?"),
    ("data.train=[{rows: 1}]", "E0205", "data.train[0].path is missing"),
    ("data.train=[3]", "E0205", "data.train[0] must be a string or a section with keys"),
    ("train.eps=.inf", "E0205", "finite"),
    ("lora.targets=3", "E0205", "must be a string or a list"),
    ("train={1: 2}", "E0204", "train[1]"),
    ("train.compile=true", "E0205", "torch compiles no checkpointed layer"),
]


@pytest.mark.parametrize(("setting", "id", "words"), WRONG, ids=[setting for setting, _, _ in WRONG])
def test_a_wrong_value_is_refused(tmp_path: Path, setting: str, id: str, words: str) -> None:
    path = write(tmp_path, "name: n\n" + MINIMAL)
    extra = [("data.eval", ["y.jsonl"])] if setting.startswith("data.holdout") else []
    extra += [("train.gradient_checkpointing", True)] if setting.startswith("train.compile=") else []
    with pytest.raises(RmtoolError) as caught:
        load_recipe(path, [*extra, parse_set(setting)])
    assert (caught.value.id, caught.value.exit_code, caught.value.place) == (id, 2, Place(path))
    assert words in format_error(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("lora.rank=4 train.freeze=backbone", "lora.rank must be 0"),
        ("lora.rank=4 lora.quantize=4bit launch.gpus_per_node=2 launch.engine=zero3", "cannot be sharded"),
        ("lora.rank=4 lora.quantize=4bit launch.gpus_per_node=2 launch.engine=fsdp2", "cannot be sharded"),
        ("data.holdout=1 train.early_stopping_patience=2", "train.eval_every must be set"),
        ("train.early_stopping_patience=2 train.eval_every=1", "eval data must be set"),
    ],
)
def test_values_that_exclude_each_other_are_refused(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [parse_set(text) for text in settings.split()])
    assert caught.value.id == "E0205"
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h55m", 14_100), ("90m", 5_400), ("1d12h", 129_600), ("45s", 45), ("1d2h3m4s", 93_784), ("0100m", 6_000)],
)
def test_a_time_limit_is_a_duration(text: str, seconds: int, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, [parse_set(f"train.time_limit={text}")])
    assert recipe.train.time_limit == text
    assert seconds_of(text) == seconds
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert recipe_hash(recipe) == recipe_hash(load_recipe(path))  # it does not change what is learned


@pytest.mark.parametrize(
    "value", ["4", "4:00:00", "'4:00:00'", "3 hours", "55m3h", "0s", "-1h", "1.5h", "true", "''", "[1h]"]
)
def test_another_time_limit_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [parse_set(f"train.time_limit={value}")])
    assert caught.value.id == "E0205"
    assert caught.value.what == "train.time_limit must be a duration above 0 such as 3h55m, 90m or 1d12h"
    assert "--set train.time_limit=" in caught.value.hint


def test_an_error_names_the_key_the_value_and_how_to_set_it(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(RmtoolError) as caught:
        load_recipe(path, [("train.batch_size", 0)])
    assert format_error(caught.value) == (
        "error[E0205]: train.batch_size must be at least 1\n"
        f"  --> {path}\n  found: 0\n  hint: set it in the recipe or with --set train.batch_size=VALUE"
    )


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items(), ids=list(RENAMED_KEYS))
def test_an_old_key_is_an_error_that_names_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [(old, 1)])
    assert (caught.value.id, caught.value.what) == ("E0204", f"unknown key {old}")
    assert caught.value.hint == f"use {new}, its new name"
    section, key = new.split(".")
    assert key in as_dict(load_recipe("debug"))[section]


def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, MINIMAL + "train: {batch_size: 9}\n"))
    assert (caught.value.id, caught.value.place.line) == ("E0202", 4)
    assert "duplicate key train" in caught.value.what


def test_text_is_a_float_where_yaml_reads_it_as_text_and_nothing_else_is_cast(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("1e-4", "'1e-4'")), [("train.eps", 1)])
    assert (recipe.train.learning_rate, recipe.train.eps, type(recipe.train.eps)) == (1e-4, 1.0, float)
    for value in ("4", 4.0, True):
        with pytest.raises(RmtoolError):
            load_recipe(write(tmp_path, MINIMAL), [("train.batch_size", value)])
    assert load_recipe(write(tmp_path, MINIMAL), [parse_set("train.liger=off")]).train.liger == "off"


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: [", "a: b: c", "{}", MINIMAL + "train: {batch_size: 9}\n", MINIMAL.replace("path: m", "")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.exit_code == 2


def test_a_yaml_mistake_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(write(tmp_path, "model:\n  path: m\n bad: [\n"))
    assert caught.value.place.line == 3


def test_yaml_tags_do_not_run_code(tmp_path: Path) -> None:
    with pytest.raises(RmtoolError):
        load_recipe(write(tmp_path, f"!!python/object/apply:os.system ['touch {tmp_path}/canary']\n"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["nothing", "no/such.yaml", "x.yaml"])
def test_an_unknown_recipe_is_refused(name: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe(name)
    assert caught.value.id == "E0201"


@pytest.mark.parametrize("text", ["x", "=1", "a.b=[", ""])
def test_a_wrong_set_is_refused(text: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        parse_set(text)
    assert caught.value.id == "E0206"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        f"{section}.{key}"
        for section, keys in as_dict(load_recipe("tulu3-8b")).items()
        if section != "name"
        for key in keys
    ]
)


@given(KEYS, VALUES)
def test_any_value_gives_a_recipe_or_an_error_of_ours(key: str, value: Any) -> None:
    codes = set()
    try:
        load_recipe("tulu3-8b", [(key, value)])
    except RmtoolError as error:
        codes.add(error.exit_code)
    assert codes <= {2}


def test_all_renamed_keys_are_named_at_once() -> None:
    with pytest.raises(RmtoolError, match=r"train.center, train.patience") as caught:
        load_recipe("debug", [("train.center", 0.1), ("train.patience", 2)])
    assert "train.patience is now train.early_stopping_patience" in caught.value.hint


@pytest.mark.parametrize("key", ["launch.expected_mfu", "train.label_smoothing", "data.holdout"])
def test_nan_is_refused(key: str) -> None:
    with pytest.raises(RmtoolError) as caught:
        load_recipe("debug", [(key, float("nan"))])
    assert caught.value.id == "E0205"


def test_a_list_as_a_key_is_invalid_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("? [a, b]\n: 1\n")
    with pytest.raises(RmtoolError, match="a key must be text") as caught:
        load_recipe(str(tmp_path / "r.yaml"), [])
    assert caught.value.id == "E0202"


def test_a_key_below_a_value_names_its_section() -> None:
    with pytest.raises(RmtoolError, match=r"data.train is not a section"):
        load_recipe("debug", [("data.train.x", 1)])


@pytest.mark.parametrize(
    ("engine", "several"), [("auto", "ddp"), ("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero3", "zero3")]
)
def test_one_process_needs_no_engine_but_deepspeeds(engine: Any, several: str) -> None:
    assert engine_of(LaunchConfig(gpus_per_node=2, engine=engine)) == several
    assert engine_of(LaunchConfig(engine=engine)) == (engine if engine == "zero3" else "single")
