"""SQL over the tables of a store and of scans, by DuckDB: read-only, and shut off from files and network.

The tables are handed over as Arrow data; DuckDB itself may open nothing (`enable_external_access` is off and the configuration locked), load
no extension, and run nothing but one SELECT. Of files on a disk only the columns and row groups that a question needs are read.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.scan_folder import Scan
from cache.errors import HearsaeError
from cache.location import Location, RemotePath, arrow_input
from cache.store import ActivationStore

if TYPE_CHECKING:
    import duckdb

OF_STORE = ("clips", "words", "phones")
"""Tables, each NAME.parquet in the store. words and phones are there once it has been aligned."""
OF_SCAN = ("features", "examples", "coactivation", "phone_scores", "phone_auc", "phone_counts", "phone_ranges")
"""Tables, each NAME.parquet in a scan's folder; those of phones are there where its store had timings."""
WHERE_FROM = {
    "words": "run 'hearsae align' on the store",
    "phones": "run 'hearsae align' on the store",
    "phone_scores": "run 'hearsae align' on the store, then 'hearsae scan' again",
    "phone_auc": "run 'hearsae align' on the store, then 'hearsae scan' again",
    "phone_counts": "run 'hearsae align' on the store, then 'hearsae scan' again",
    "phone_ranges": "run 'hearsae align' on the store, then 'hearsae scan' again",
    "coactivation": "run 'hearsae scan' again",
    "features": "name a scan with --scan",
    "examples": "name a scan with --scan",
    "clips": "name the store with --store",
}
SETTINGS = {
    "temp_directory": "''",  # nothing is written to a disk, even where memory is short
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",  # variables of the calling program are no tables
    "enable_external_access": "false",
    "lock_configuration": "true",
}
"""Of DuckDB, in this order: the last ones forbid changing the others."""


class Answer(NamedTuple):
    """What a SELECT gave."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    """Column name -> value: numbers, text, lists and so on, all of which JSON has."""


def run_sql(statement: str, store: ActivationStore | None = None, scans: Sequence[Scan] = ()) -> Answer:
    """Runs one SELECT over `clips`, `words`, `phones` of a store and `features`, `examples`, `coactivation`, `phone_scores`, `phone_auc`,
    `phone_counts`, `phone_ranges` of scans.

    Rows of scans have a first column `scan`, the name of its folder (its path, where names are the same). Two columns of one name in the
    answer become NAME and NAME_1.
    Raises HearsaeError, in one line, for what DuckDB refuses, for statements other than one SELECT, and for tables that are not there.
    """
    import duckdb

    connection, there = duckdb.connect(":memory:"), list[str]()
    try:
        there = _register(connection, statement, store, scans)
        for name, value in SETTINGS.items():
            connection.execute(f"SET {name} = {value}")
        statements = connection.extract_statements(statement)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise HearsaeError("--sql takes one SELECT: it reads, and changes nothing")
        result = connection.sql(statement)
        names = _distinct(result.columns)
        table = result.to_arrow_table()
    except duckdb.Error as error:
        raise HearsaeError(f"DuckDB: {_complaint(error, there)}") from None
    except (pa.ArrowException, OSError) as error:
        raise HearsaeError(f"a table can't be read ({' '.join(str(error).split())})") from error
    finally:
        connection.close()
    columns = [[_plain(value) for value in column.to_pylist()] for column in table.columns]
    return Answer(tuple(names), [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)])


def _register(connection: "duckdb.DuckDBPyConnection", statement: str, store: ActivationStore | None, scans: Sequence[Scan]) -> list[str]:
    """Makes the tables; returns their names. Those in an object store are fetched whole, and only where the statement has their name."""
    there = []
    if store is not None:
        for name in OF_STORE:
            table = _table(store.path / f"{name}.parquet", name, statement)
            if table is not None:
                connection.register(name, table)
                there.append(name)
    labels = _labels(scans)
    for name in OF_SCAN:
        parts = []
        for i, (scan, label) in enumerate(zip(scans, labels, strict=True)):
            table = _table(scan.path / f"{name}.parquet", name, statement)
            if table is not None:
                connection.register(f"_{name}_{i}", table)
                parts.append(f"SELECT '{label.replace(chr(39), chr(39) * 2)}' AS scan, * FROM _{name}_{i}")
        if parts:
            connection.execute(f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join(parts)}")
            there.append(name)
    return there


def _table(path: Location, name: str, statement: str) -> Any:
    if isinstance(path, RemotePath):
        named = re.search(rf"\b{name}\b", statement, re.IGNORECASE)
        return pq.read_table(arrow_input(path)) if named and path.is_file() else None
    if not path.is_file():
        return None
    import pyarrow.dataset

    return pyarrow.dataset.dataset(path, format="parquet")


def _labels(scans: Sequence[Scan]) -> list[str]:
    names = [scan.path.name for scan in scans]
    return [name if names.count(name) == 1 and name else str(scan.path) for name, scan in zip(names, scans, strict=True)]


def _complaint(error: Exception, there: Sequence[str]) -> str:
    """The first line of what DuckDB says, which goes on with guesses and a picture of the statement."""
    line = str(error).strip().splitlines()[0]
    missing = re.search(r"Table with name (\w+) does not exist", line)
    if missing and missing[1].lower() in WHERE_FROM:
        return f"there is no table {missing[1].lower()} here: {WHERE_FROM[missing[1].lower()]}"
    return f"{line} Tables: {', '.join(there)}" if missing else line


def _distinct(names: list[str]) -> list[str]:
    """As they are, but that a name that was there before gets a number."""
    found: list[str] = []
    for name in names:
        number, new = 0, name
        while new in found:
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


def _plain(value: Any) -> Any:
    """What JSON has. DuckDB's sums of integers are decimals; JSON knows no NaN."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() and value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value if value is None or isinstance(value, int | str | bool) else str(value)
