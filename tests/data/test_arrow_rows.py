"""Rows of parquet files, Arrow files and Hub datasets are those of the JSON Lines that they were made from."""

from __future__ import annotations

import datetime
import gzip
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_jsonl

from rmtool.data import arrow_rows, rows
from rmtool.data.arrow_rows import BATCH
from rmtool.data.formats import preference_record
from rmtool.data.record import RowOptions
from rmtool.data.rejects import Rejects
from rmtool.data.responses import score_record
from rmtool.data.rows import Row, read_rows
from rmtool.errors import RmtoolError


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(**arguments: Any) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [called]}


TEXT = {"type": "string"}
USER = {"role": "user", "content": "Do it."}
# What differs between rows is what Arrow fills with nulls.
NESTED: list[dict[str, Any]] = [
    {"messages": [USER, call(dish="soup")], "tools": [tool("cook", dish=TEXT)], "system": "Be brief."},
    {
        "messages": [USER, call(piece="king", square="e2")],
        "tools": [tool("move", piece=TEXT, square=TEXT | {"enum": []})],
    },
    {"messages": [USER, {"role": "assistant", "content": "Done.", "name": "bot"}], "tools": [], "other": [None, "x"]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [tool("none")]},
    {"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}], "best": {"answer": "x"}},
]
NESTED[3]["messages"] = [USER, {"role": "assistant", "parts": [{"type": "text", "text": "a"}, {"type": "image"}]}]


def known(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the columns that only other rows have."""
    return {name: value for name, value in row.items() if value is not None}


def table() -> pa.Table:
    schemas = [pa.Table.from_pylist([row]).schema for row in NESTED]
    return pa.Table.from_pylist(NESTED, pa.unify_schemas(schemas, promote_options="permissive"))


def ipc(path: Path, table: pa.Table, new: Callable[..., Any]) -> None:
    with new(path, table.schema) as writer:
        writer.write_table(table)


def packed(path: Path, table: pa.Table) -> None:
    ipc(path, table, pa.ipc.new_file)
    path.write_bytes(gzip.compress(path.read_bytes()))


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "a.parquet": lambda path, table: pq.write_table(table, path),
    "a.arrow": lambda path, table: ipc(path, table, pa.ipc.new_file),
    "stream.arrow": lambda path, table: ipc(path, table, pa.ipc.new_stream),
    "a.arrow.gz": packed,
    "lies.jsonl": lambda path, table: pq.write_table(table, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_nested_values_are_those_of_the_json_lines(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, table())
    assert [known(row.data) for row in read_rows(str(tmp_path / name))] == NESTED


def test_hub_datasets_are_read_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.Dataset(table())
    monkeypatch.setattr(rows, "load_hub_dataset", lambda source: dataset.select([4, 1, 0]))
    found = list(read_rows("owner/name"))
    assert [known(row.data) for row in found] == [NESTED[4], NESTED[1], NESTED[0]]
    assert str(found[1].place) == "owner/name[2]"


def test_nulls_in_json_lines_stay(tmp_path: Path) -> None:
    lines = [{"a": None, "messages": [{"role": "user", "content": None}], "tools": [{"x": {"y": None}}]}]
    assert [row.data for row in read_rows(str(write_jsonl(tmp_path / "a.jsonl", lines)))] == lines


STRUCT = pa.struct([("a", pa.large_string()), ("b", pa.list_(pa.struct([("c", pa.int8())])))])
MAP = pa.map_(pa.string(), pa.list_(pa.struct([("c", pa.int8())])))
JSON_TEXT = pa.array(['{"a": null, "b": [1, {}]}', None, "[1.5]"])
VALUES: dict[str, tuple[pa.Array, list[Any]]] = {
    "map": (
        pa.array([[("a", None), ("b", [{"c": None}])], None, []], MAP),
        [{"a": None, "b": [{}]}, None, {}],
    ),
    "map with numbers as keys": (pa.array([[(1, "x")]], pa.map_(pa.int32(), pa.string())), [{"1": "x"}]),
    "list of null and struct": (
        pa.array([[None, {"a": "x"}], [{"b": [{"c": None}, None]}]], pa.list_(STRUCT)),
        [[None, {"a": "x"}], [{"b": [{}, None]}]],
    ),
    "large list": (pa.array([[{"a": "x"}]], pa.large_list(STRUCT)), [[{"a": "x"}]]),
    "list of fixed size": (pa.array([[{"a": "x"}], None], pa.list_(STRUCT, 1)), [[{"a": "x"}], None]),
    "list view": (pa.array([[{"a": "x"}]], pa.list_view(STRUCT)), [[{"a": "x"}]]),
    "string view": (pa.array(["x", None], pa.string_view()), ["x", None]),
    "dictionary": (pa.array(["x", "y", "x", None]).dictionary_encode(), ["x", "y", "x", None]),
    "JSON": (pa.ExtensionArray.from_storage(pa.json_(), JSON_TEXT), [{"a": None, "b": [1, {}]}, None, [1.5]]),
    "null": (pa.nulls(2), [None, None]),
    "objects without keys": (pa.array([{}, None], pa.struct([])), [{}, None]),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_every_type_of_arrow_gives_the_value_of_json(kind: str, tmp_path: Path) -> None:
    array, expected = VALUES[kind]
    ipc(tmp_path / "a.arrow", pa.table({"x": array}), pa.ipc.new_file)
    assert [row.data["x"] for row in read_rows(str(tmp_path / "a.arrow"))] == expected


def test_json_features_of_datasets_are_values(tmp_path: Path) -> None:
    feature, row = datasets.List({"role": datasets.Value("string"), "extra": datasets.Json()}), {"role": "user"}
    values = [[row | {"extra": {"a": None}}], [row]]
    dataset = datasets.Dataset.from_dict({"messages": values}, features=datasets.Features({"messages": feature}))
    dataset.to_parquet(tmp_path / "a.parquet")
    assert [each.data["messages"] for each in read_rows(str(tmp_path / "a.parquet"))] == values
    dataset.save_to_disk(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    assert [each.data["messages"] for each in read_rows(str(saved))] == values


def test_a_value_that_cannot_be_read_is_one_invalid_row(tmp_path: Path) -> None:
    days = pa.array([0, 10**7, 1], pa.int32()).cast(pa.date32())
    text = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", "2", "{"]))
    pq.write_table(pa.table({"day": days, "json": text}), tmp_path / "a.parquet")
    rejects = Rejects()
    assert [row.data["day"] for row in read_rows(str(tmp_path / "a.parquet"), rejects)] == [datetime.date(1970, 1, 1)]
    assert rejects.count == 2
    with pytest.raises(RmtoolError, match="2 invalid rows"):
        rejects.raise_if_any()


def test_a_map_with_a_key_twice_is_an_invalid_row(tmp_path: Path) -> None:
    maps = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8()))
    pq.write_table(pa.table({"map": maps}), tmp_path / "a.parquet")
    with pytest.raises(RmtoolError, match="duplicate keys"):
        list(read_rows(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_are_read_a_batch_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, restore = list[int](), arrow_rows._batch_rows
    monkeypatch.setattr(arrow_rows, "_batch_rows", lambda batch, how: sizes.append(len(batch)) or restore(batch, how))
    WRITERS[name](tmp_path / name, pa.table({"x": range(3 * BATCH)}))
    found = read_rows(str(tmp_path / name))
    assert next(found).data == {"x": 0}
    assert sum(1 for _ in found) == 3 * BATCH - 1
    assert sizes == [BATCH] * 3


def test_columns_of_other_rows_and_decimals_are_read_as_in_json_lines(tmp_path: Path) -> None:
    """Rows to score of three kinds in one file, a rating of type decimal, and RMB's subset."""
    mixed = [{"prompt": "a", "response": "b"}, {"prompt": "a", "responses": ["b"]}, {"messages": [USER, call(x="y")]}]
    names = ("prompt", "response", "responses", "messages")
    pq.write_table(pa.table({name: [row.get(name) for row in mixed] for name in names}), tmp_path / "mixed.parquet")
    for found, row in zip(read_rows(str(tmp_path / "mixed.parquet")), mixed, strict=True):
        assert score_record(found) == replace(score_record(Row(found.place, row)), row=found.data)
    rated = {"prompt": "a", "responses": ["b", "c"], "ratings": [Decimal("1.5"), Decimal(2)]}
    rmb = {"conversation_input": "a", "chosen": {"answer": "b"}, "reject": {"answer": "c"}, "category_path": "x"}
    for row in (rated, rmb):
        pq.write_table(pa.Table.from_pylist([row | {"subset": None, "tools": None}]), tmp_path / "a.parquet")
        (only,) = read_rows(str(tmp_path / "a.parquet"))
        options = RowOptions(rating_margins=True)
        assert preference_record(only, options) == preference_record(Row(only.place, row), options)
    assert preference_record(only).subset == "x"
