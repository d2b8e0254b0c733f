"""Files whose names lie: read as what they are, or refused with what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import pair_rows

from rmtool.data.rows import read_rows, require_file
from rmtool.errors import RmtoolError

ROWS = pair_rows(3)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY, PRETTY = json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2).encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("a.jsonl", LINES)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            member = tarfile.TarInfo("a.jsonl")
            member.size = len(LINES)
            tar.addfile(member, io.BytesIO(LINES))
    return file.getvalue()


READ: dict[str, tuple[str, bytes]] = {
    "lines": ("a.json", LINES),
    "lines, packed": ("a.json.gz", gzip.compress(LINES)),
    "lines after a BOM and blank lines": ("a.json", b"\xef\xbb\xbf\n\n" + LINES),
    "lines named parquet": ("a.parquet", LINES),
    "one line named parquet": ("a.parquet", LINES.splitlines()[0]),
    "an array": ("a.jsonl", ARRAY),
    "an array over several lines": ("a.jsonl", PRETTY),
    "an array named parquet": ("a.parquet", ARRAY),
    "gzip without .gz": ("a.jsonl", gzip.compress(LINES)),
    "no gzip with .gz": ("a.jsonl.gz", LINES),
    "parquet": ("a.jsonl", parquet()),
    "parquet, packed": ("a.json.gz", gzip.compress(parquet())),
    "capitals": ("A.JSONL", LINES),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_a_file_is_read_as_what_it_contains(kind: str, tmp_path: Path) -> None:
    name, content = READ[kind]
    (tmp_path / name).write_bytes(content)
    expected = ROWS[:1] if kind.startswith("one") else ROWS
    assert [row.data for row in read_rows(str(tmp_path / name))] == expected


REFUSED: dict[str, tuple[str, bytes, str, str]] = {
    "zstd": ("a.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True), "zstd data", "zstd -d"),
    "bzip2": ("a.jsonl", bz2.compress(LINES), "bzip2 data", "bzip2 -d"),
    "xz": ("a.jsonl.xz", lzma.compress(LINES), "xz data", "xz -d"),
    "zip": ("a.jsonl.zip", archive("zip"), "a zip archive", "unzip"),
    "tar": ("a.jsonl.gz", archive("tar"), "a tar archive", "tar -xf"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": ("a.json", ARRAY.decode().encode("utf-16-le"), "UTF-16 text", "iconv -f UTF-16"),
    "UTF-16, packed": ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-16-be")), "UTF-16 text", "iconv"),
    "Git LFS": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html><html></html>", "a web page", "download the file itself"),
    "CSV": ("a.jsonl", b"prompt,chosen,rejected\na,b,c\n", "CSV", "read_csv("),
    "CSV by name": ("a.csv", b'"prompt";"chosen text"\n"a";"b"\n', "CSV", "sep=';'"),
    "TSV": ("a.json", b"prompt\tresponse\r\na\tb\r\n", "CSV", r"sep='\t'"),
    "an object over several lines": ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), "an object over", "jq -c ."),
    "text": ("notes.txt", b"hello", "unsupported file type", "pass a file that ends in .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_read_is_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    name, content, what, hint = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RmtoolError) as caught:
        require_file(str(tmp_path / name))
    assert caught.value.id == "E0201"
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_the_hint_for_csv_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text('prompt\tresponse\nWhy?\t"a\tb"\n')
    with pytest.raises(RmtoolError) as caught:
        require_file("a.csv")
    import pandas

    eval(caught.value.hint.removeprefix("convert it in Python: "), {"pandas": pandas})
    assert [row.data for row in read_rows("rows.jsonl")] == [{"prompt": "Why?", "response": "a\tb"}]


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("one.json", b'{"prompt": "a"}', "rename it to .jsonl"),
        ("inner.json", b'{"version": 1, "data": [{"prompt": "a"}]}', """jq '.["data"]'"""),
        ("several.json", b'{"prompt":\n"a"}\n{"prompt":\n"b"}', "fix the file: it must be one array"),
        ("cut.json", PRETTY[:-1], "fix the file: it must be one array"),
    ],
)
def test_json_that_is_no_array_is_refused_with_what_to_do(name: str, content: bytes, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RmtoolError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert caught.value.id == "E0301"
    assert hint in caught.value.hint


def test_an_invalid_first_line_is_one_invalid_row(tmp_path: Path) -> None:
    from rmtool.data.rejects import Rejects

    for first in (b"[1, 2]", b"[]", b"garbage", b"{", b"null"):
        (tmp_path / "a.jsonl").write_bytes(first + b"\n" + LINES)
        rejects = Rejects()
        assert [row.data for row in read_rows(str(tmp_path / "a.jsonl"), rejects)] == ROWS, first
        assert rejects.count == 1


def test_the_arrow_files_of_a_saved_dataset_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(RmtoolError) as caught:
        require_file(str(tmp_path / "saved"))
    assert "load_from_disk" in caught.value.hint
    (file,) = (tmp_path / "saved").glob("*.arrow")
    found: list[dict[str, Any]] = [row.data for row in read_rows(str(file))]
    assert found == ROWS
