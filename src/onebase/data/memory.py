"""Data that is already in Python: DataFrames, lists of rows, and data sets of the `datasets` library."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from onebase.data.table import Opened, Records, refuse_repeats
from onebase.errors import DataError, OnebaseError


def open_object(value: Any, name: str) -> Opened:
    """Open a DataFrame, a list of mappings, a Dataset or an IterableDataset.

    Raises:
        DataError: something else, or no rows.
    """
    if is_dataset(value):
        return _open_dataset(value, name)
    if _is_frame(value):
        refuse_repeats(name, [str(column) for column in value.columns])
        count = len(value)
        cells = _cells_of_frame(value)
        columns = tuple(cells)

        def of_frame(skipped: Counter[str]) -> Records:
            return ((i, dict(zip(columns, row))) for i, row in enumerate(zip(*cells.values()), 1))

        found = Opened(name, of_frame, unit="row", columns=columns)
    elif isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value):
        count = len(value)

        def of_list(skipped: Counter[str]) -> Records:
            return ((i, {str(key): cell for key, cell in row.items()}) for i, row in enumerate(value, 1))

        found = Opened(name, of_list, unit="row")
    else:
        raise DataError(
            f"cannot read data from a {type(value).__name__}. Expected a path, a pandas DataFrame, a list of dicts "
            "such as {'text': ..., 'label': ...}, a datasets.Dataset, or a dict of split name -> one of these."
        )
    if not count:
        raise DataError(f"{name}: no rows: the data is empty. Expected one row per example.")
    return found


def is_dataset(value: Any) -> bool:
    """Recognise a Dataset or IterableDataset without importing the library: who has one has imported it."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(value, library.Dataset | library.IterableDataset)


def _is_frame(value: Any) -> bool:
    """Recognise a DataFrame without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _cells_of_frame(frame: Any) -> dict[str, list[Any]]:
    present = frame.astype(object).where(frame.notna(), None)
    return {str(column): [_listed(value) for value in present[column].tolist()] for column in present.columns}


def _listed(value: Any) -> Any:
    """Turn arrays in a cell (as frames read from Parquet have) into lists, those in an object among them."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return [_listed(item) for item in value.tolist()]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _open_dataset(dataset: Any, name: str) -> Opened:
    """Open a data set; numbers of classes become their names, and -1, which stands for no label, becomes None."""
    columns = tuple(dataset.column_names or ())
    refuse_repeats(name, columns)
    named = {column: decode for column in columns if (decode := _class_names((dataset.features or {}).get(column)))}

    def records(skipped: Counter[str]) -> Records:
        try:
            for number, row in enumerate(dataset, 1):
                yield number, {key: named[key](cell) if key in named else cell for key, cell in row.items()}
        except OnebaseError:
            raise
        except Exception as error:  # files behind a streamed data set fail in any way
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise DataError(f"{name}: the data set cannot be read on: {type(error).__name__}: {first[:300]}") from error

    return Opened(name, records, unit="row", columns=columns)


def _class_names(feature: Any) -> Any:
    """Return the function from numbers of classes to names where a feature is a ClassLabel or a list of them."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value == -1 else feature.int2str(value)
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    if isinstance(inner, ClassLabel):
        return lambda values: None if values is None else [inner.int2str(value) for value in values]
    return None


def split_items(value: Mapping[Any, Any], names: Mapping[str, str]) -> Iterable[tuple[str, Any, str]]:
    """Return (split, rows, key) of a mapping of splits.

    Raises:
        DataError: a key that is no split, or two keys for one.
    """
    found: dict[str, tuple[str, Any, str]] = {}
    for key, rows in value.items():
        split = names.get(str(key).lower())
        if split is None or split in found:
            raise DataError(
                f"a dict of splits has the key {key!r}; expected train, validation and test, once each "
                "(for a dict of columns pass pandas.DataFrame(your_dict))"
            )
        found[split] = (split, rows, str(key))
    return found.values()
