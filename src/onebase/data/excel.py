"""Excel workbooks (.xlsx) read row by row through openpyxl (extra `excel`): one sheet, its first row the header."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onebase.data.table import Broken, Flag, Number, Opened, Records, refuse_repeats
from onebase.data.texts import guarded
from onebase.errors import DataError, unknown


def open_excel(path: Path, sheet: str | None) -> Opened:
    """Open an .xlsx file.

    Args:
        path: the file.
        sheet: its sheet; where it is not named, the only one that holds something.

    Raises:
        DataError: openpyxl is missing, the file is damaged, or several sheets could be meant.
        UnknownNameError: no such sheet.
    """
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise DataError(
            f"{path.name}: reading Excel needs openpyxl: pip install 'onebase[excel]'. Or save the sheet as CSV UTF-8."
        ) from None
    chosen = _sheet(path, sheet)
    first = next(_cells(path, chosen), None)
    if first is None:
        raise DataError(f"{path.name}: the sheet {chosen!r} is empty. Expected a header and one row per example.")
    header = ["" if value is None else str(value) for value in first[1]]
    while header and not header[-1]:
        header.pop()
    refuse_repeats(path.name, header)

    def records(skipped: Counter[str]) -> Records:
        rows = _cells(path, chosen)
        next(rows, None)
        empty = 0
        for number, values in rows:
            if all(value is None for value in values):
                empty += 1
                continue
            skipped["empty rows of the sheet hold no row"] += empty  # those after the last row are only formatting
            empty = 0
            if any(value is not None for value in values[len(header) :]):
                raise DataError(
                    f"{path.name}: row {number} has a value right of the last column of the header. Give it a name."
                )
            yield number, dict(zip(header, [*values, *([None] * (len(header) - len(values)))]))

    return Opened(path.name, records, unit="row", columns=tuple(header))


def _sheet(path: Path, wanted: str | None) -> str:
    with _Workbook(path) as book:
        names = list(book.sheetnames)
    if wanted is not None:
        if wanted not in names:
            raise unknown(f"sheet of {path.name}", wanted, names)
        return wanted
    filled = [name for name in names if next(_cells(path, name), None) is not None]
    if len(filled) > 1:
        shown = ", ".join(map(repr, filled))
        raise DataError(f"{path.name}: several sheets hold something: {shown}. Say which with sheet (--sheet NAME).")
    return (filled or names)[0]


def _cells(path: Path, sheet: str) -> Iterator[tuple[int, list[Any]]]:
    """Yield (row number, values) from the first row that holds something on."""
    begun = False
    with _Workbook(path) as book:
        if not hasattr(book[sheet], "iter_rows"):
            return  # a sheet that is one chart
        for number, row in enumerate(book[sheet].iter_rows(), 1):
            values = [_value(cell) for cell in row]
            begun = begun or any(value is not None for value in values)
            if begun:
                yield number, values


def _value(cell: Any) -> Any:
    value = cell.value
    if cell.data_type == "e":
        return Broken(value)
    if isinstance(value, bool):
        return Flag("TRUE" if value else "FALSE")
    if isinstance(value, int):
        return Number(value)
    if isinstance(value, float):  # Excel has one type of number: 3.0 is shown as 3
        return Number(int(value)) if value.is_integer() else Number(repr(value))
    return value if value is None or isinstance(value, str) else str(value)


class _Workbook:
    """A workbook that is open; what goes wrong in it names the file.

    openpyxl has no error of its own for damaged files: it lets through those of zip, XML and of its own conversions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        import openpyxl

        with guarded(self.path):
            self.stream = self.path.open("rb")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about styles and extensions, which hold no data
                self.book = openpyxl.load_workbook(self.stream, read_only=True, data_only=True)
        except Exception as error:
            self.stream.close()
            raise self._damaged(error) from None
        return self.book

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.book.close()
        self.stream.close()
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DataError:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return DataError(
            f"{self.path.name}: the Excel file is damaged or no .xlsx ({type(error).__name__}: {first[:200]}). Save it "
            "again in Excel, or as CSV UTF-8."
        )
