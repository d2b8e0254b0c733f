"""What `score` writes: a file of the form that its name says, with every field that the form can hold."""

from __future__ import annotations

import base64
import datetime
import decimal
import gzip
import json
import uuid
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import scored, write_jsonl
from safetensors.torch import load_file, save_file

from rmtool.data.rows import read_rows
from rmtool.errors import RmtoolError
from rmtool.scoring.output import BATCH, write_rows

CALL = {"role": "assistant", "content": "Calling.", "id": {"a": 1}}
ROWS: list[dict[str, Any]] = [
    {"id": 1, "prompt": "Why?", "response": "Naïve\u2028.", "meta": {"a": [1, 2]}, "mixed": 1},
    {"id": 2, "prompt": [{"role": "user", "content": "Why?"}], "response": "No.", "meta": {"b": {}}, "mixed": "x"},
    {"id": 2**70, "prompt": "Why?", "responses": ["Yes.", "No."], "meta": {"a": [], "c": None}},
    {"messages": [{"role": "user", "content": "x"}, CALL], "meta": {}, "mixed": [{"a": 1}]},
]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file without rmtool's reader."""
    if path.name.endswith(".parquet"):
        return [without_nulls(row) for row in pq.read_table(path).to_pylist()]
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n")[:-1]]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.json", "o.json.gz", "O.JSON", "o.parquet"])
def test_the_name_of_the_output_says_its_form(name: str, rmtool: Any, model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", ROWS)
    assert rmtool("score", source, "--model", model).code == 0
    assert rmtool("score", source, "--model", model, "--output", name).code == 0
    expected = read(tmp_path / "r.scored.jsonl")
    assert [without_nulls(row.data) for row in read_rows(name)] == without_nulls(expected)
    if name != "o.parquet":
        assert read(tmp_path / name) == expected
    again = rmtool("score", name, "--model", model, "--output", "again.jsonl")  # it is read as what it is
    assert (again.code, again.error) == (3, "E0303")


def test_parquet_has_nested_columns_and_json_only_where_no_type_fits(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [row | {"meta": {"a": number}} for number, row in enumerate(ROWS[:2] * BATCH)]
    rows.append({"prompt": "Why?", "responses": ["Yes.", "No."], "meta": {"b": [{"c": 0.5}]}, "empty": {}})
    source = write_jsonl(tmp_path / "r.jsonl", [{**row, "empty": {}} for row in rows])
    assert rmtool("score", source, "--model", model, "--output", "o.parquet").code == 0
    table = pq.read_table("o.parquet")
    types = {field.name: field.type for field in table.schema}
    assert types["meta"] == pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct([("c", pa.float64())])))])
    assert {name for name, kind in types.items() if kind == pa.json_()} == {"prompt", "mixed", "empty"}
    assert (types["reward"], types["rewards"], types["best"]) == (pa.float64(), pa.list_(pa.float64()), pa.int64())
    assert "error" not in types
    assert [row["meta"] for row in read(tmp_path / "o.parquet")] == [row["meta"] for row in rows]


@pytest.mark.parametrize("name", ["o.csv", "o.txt", "o", "o.parquet.gz", "o.jsonl.zst", "o.jsonl.bak", "jsonl"])
def test_other_names_are_refused_before_anything_is_loaded(name: str, rmtool: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", ROWS)
    shown = rmtool("score", source, "--model", "nowhere", "--output", name)
    assert (shown.code, shown.error) == (2, "E0206")
    assert ".jsonl.gz" in shown.err


def test_an_input_of_another_kind_is_refused_before_the_model_is_loaded(rmtool: Any, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("prompt,response\na,b\n")
    shown = rmtool("score", "r.jsonl", "--model", "nowhere")
    assert (shown.code, shown.error) == (2, "E0201")


DAY, SECOND = datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5, 600_000, datetime.UTC)
OTHER = {
    "day": (pa.array([DAY]), "2026-01-02"),
    "second": (pa.array([SECOND]), "2026-01-02T03:04:05.600000+00:00"),
    "nanosecond": (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    "time": (pa.array([datetime.time(1, 2)]), "01:02:00"),
    "duration": (pa.array([datetime.timedelta(hours=1)]), "1:00:00"),
    "price": (pa.array([decimal.Decimal("1.10")]), "1.10"),
    "raw": (pa.array([b"\xff\0"]), base64.b64encode(b"\xff\0").decode()),
    "uuid": (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), str(uuid.UUID(int=1))),
    "nan": (pa.array([float("nan")]), None),
    "infinite": (pa.array([[float("-inf"), 1.0]]), [None, 1.0]),
    "nested": (pa.array([[{"when": DAY, "nan": float("nan")}]]), [{"when": "2026-01-02", "nan": None}]),
    "small": (pa.array([1.5], pa.float16()), 1.5),
}


def test_what_json_cannot_hold_is_written_as_text_or_null_and_named(rmtool: Any, model: Path, tmp_path: Path) -> None:
    text = {"prompt": pa.array(["Why?"]), "response": pa.array(["Yes."])}
    pq.write_table(pa.table(text | {name: array for name, (array, _) in OTHER.items()}), "r.parquet")
    shown = rmtool("score", "r.parquet", "--model", model)
    assert shown.code == 0
    (row,) = scored(tmp_path / "r.scored.jsonl")
    assert {name: row[name] for name in OTHER} == {name: value for name, (_, value) in OTHER.items()}
    named = shown.err.split("(fields: ")[1].split(")")[0].split(", ")
    assert named == [name for name in OTHER if name != "small"]
    assert rmtool("score", "r.parquet", "--model", model, "--output", "o.parquet", "--json").code == 0
    (native,) = pq.read_table("o.parquet").to_pylist()
    assert (native["day"], native["second"], native["raw"]) == (DAY, SECOND, b"\xff\0")
    assert (native["price"], pandas.Timestamp(native["nanosecond"]).value) == (decimal.Decimal("1.10"), 1)
    assert [row.data["prompt"] for row in read_rows("o.parquet")] == ["Why?"]


def test_skipped_rows_with_such_values_are_written_too(rmtool: Any, model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "response": text, "day": DAY, "x": float("nan")} for text in ("Yes.", None)]
    pq.write_table(pa.Table.from_pylist(rows), "r.parquet")
    assert rmtool("score", "r.parquet", "--model", model, "--on-bad-row", "skip").code == 1
    (line,) = scored(tmp_path / "r.scored.rejects.jsonl")
    assert (line["row"]["day"], line["row"]["x"]) == ("2026-01-02", None)


def test_a_nonfinite_reward_has_its_column(rmtool: Any, model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "Why?", "response": "Yes."}])
    assert rmtool("score", source, "--model", model, "--output", "o.parquet").code == 1
    (row,) = pq.read_table("o.parquet").to_pylist()
    assert (row["reward"], row["error"]) == (None, "nonfinite")


def test_equal_rows_give_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("a", 1), ("b", 2)):
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        write_rows(tmp_path / name, "o.jsonl.gz", lambda advance: iter(ROWS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_value_that_a_parquet_column_cannot_hold_is_an_error(tmp_path: Path) -> None:
    rows = [{"x": 0.5}] * BATCH + [{"x": 2**60}]
    with pytest.raises(RmtoolError) as caught:
        write_rows(tmp_path / "o", "o.parquet", lambda advance: iter(rows))
    assert (caught.value.id, caught.value.hint) == ("E0502", "pass an --output that ends in .jsonl")
