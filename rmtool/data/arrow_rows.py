"""Rows of parquet files, Arrow files and Hub datasets, as the JSON Lines had them that the data was made from.

In: an open file, or a loaded dataset. Out: dictionaries, or the error of one that cannot be read.
Arrow gives all objects of a column the same keys, and null to those that an object did not have: the tools of one row
get the parameters of all others. So keys of nested objects that are null are removed; a null that was written there
cannot be told apart. Nulls in columns, lists, maps and JSON values stay. Maps become objects, JSON columns values.
Cost: BATCH rows in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

from rmtool.data.json_errors import JsonError, parse_json
from rmtool.errors import Place, RmtoolError, first_line
from rmtool.packages import hub_http, require_package

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000
KNOWN_SPLITS = {"allenai/reward-bench": "filtered"}
_UNREADABLE = (ValueError, OverflowError, JsonError)  # text that is not UTF-8, years after 9999, invalid JSON
_Restore = Callable[[Any], Any] | None  # what makes the value of it that JSON had; None: it is that value


def file_rows(file: IO[bytes], source: str) -> Iterator[dict[str, Any] | Exception]:
    """Return the rows of a parquet or Arrow file, which must be seekable.

    Raises:
        RmtoolError: E0301 two columns have the same name.
        pyarrow.ArrowException, OSError: it is not valid.
    """
    import pyarrow as pa
    import pyarrow.parquet

    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        table = pa.ipc.open_file(file)
        return _rows(source, table.schema, map(table.get_batch, range(table.num_record_batches)))
    if start.startswith(b"\xff"):
        stream = pa.ipc.open_stream(file)
        return _rows(source, stream.schema, stream)
    parquet = pyarrow.parquet.ParquetFile(file)
    return _rows(source, parquet.schema_arrow, parquet.iter_batches(BATCH))


def dataset_rows(dataset: Any) -> Iterator[dict[str, Any] | Exception]:
    """Return the rows of a Hub dataset; images and audio are not decoded."""
    tables = dataset.with_format("arrow").iter(BATCH)
    return _rows(
        str(dataset.info.dataset_name),
        dataset.features.arrow_schema,
        (batch for table in tables for batch in table.to_batches()),
    )


def require_datasets(source: str) -> None:
    """Check that the package that loads Hub datasets is installed.

    Raises:
        RmtoolError: E0507 it is not.
    """
    require_package("datasets", f"the Hub dataset {source}", "use a local file")


@functools.lru_cache(8)  # a dataset that was identified is the one that is read
def load_hub_dataset(source: str) -> Any:
    """Load a Hub dataset.

    Raises:
        RmtoolError: E0203 when the split is unknown; E0507 without the package datasets; E0701 when the Hub is not
            reachable, or has no such dataset.
    """
    require_datasets(source)
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, _, split = source.partition(":")
    split = split or KNOWN_SPLITS.get(name, "train")
    try:
        return datasets.load_dataset(name, split=split)
    except ValueError as error:  # an unknown split or configuration
        raise RmtoolError("E0203", f"{source}: {first_line(error)}", "set the split as owner/name:split") from error
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, hub_http().HTTPError) as error:
        hint = "check the name and the network, or pass a local file"
        what = f"cannot find the dataset {name} locally or on the Hub"
        raise RmtoolError("E0701", what, hint, found=first_line(error)) from error


def _rows(source: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any] | Exception]:
    if duplicates := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        what, hint = f"duplicate column {', '.join(duplicates)}", "rename or remove one of the two"
        raise RmtoolError("E0301", what, hint, Place(source))
    restores = [_restore(kind) for kind in schema.types]
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            yield from _batch_rows(batch.slice(start, BATCH), restores)


def _batch_rows(batch: pa.RecordBatch, restores: list[_Restore]) -> Iterator[dict[str, Any] | Exception]:
    try:
        values = (column.to_pylist() for column in batch.columns)
        columns = [
            list(map(restore, each)) if restore else each for restore, each in zip(restores, values, strict=True)
        ]
    except _UNREADABLE as error:
        if len(batch) == 1:
            yield error
        else:
            for at in range(len(batch)):
                yield from _batch_rows(batch.slice(at, 1), restores)
        return
    names = batch.schema.names
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def _restore(kind: pa.DataType) -> _Restore:
    """Return what restores the values of an Arrow type."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return _not_null(parse_json)
    if isinstance(kind, pa.BaseExtensionType):
        return _restore(kind.storage_type)
    if pa.types.is_struct(kind):
        return _struct({field.name: _restore(field.type) for field in kind})
    if pa.types.is_map(kind):
        return _map(_restore(kind.item_type))
    inner = _restore(kind.value_type) if hasattr(kind, "value_type") else None  # of a list or dictionary
    if inner is None or pa.types.is_dictionary(kind):
        return inner
    return _not_null(lambda values: list(map(inner, values)))


def _not_null(restore: Callable[[Any], Any]) -> _Restore:
    return lambda value: None if value is None else restore(value)


def _struct(restores: dict[str, _Restore]) -> _Restore:
    nested = [(name, restore) for name, restore in restores.items() if restore]

    def restore(value: dict[str, Any]) -> dict[str, Any]:
        if None in value.values():
            value = {name: item for name, item in value.items() if item is not None}
        for name, inner in nested:
            if name in value:
                value[name] = inner(value[name])
        return value

    return _not_null(restore)


def _map(inner: _Restore) -> _Restore:
    def restore(value: list[tuple[Any, Any]]) -> dict[str, Any]:
        found = {str(key): inner(item) if inner else item for key, item in value}
        if len(found) < len(value):
            raise ValueError("a map has duplicate keys")
        return found

    return _not_null(restore)
