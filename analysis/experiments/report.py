"""What an experiment leaves behind: result.json, rows.parquet, its pictures as PNG and SVG, and a page that shows them."""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.pictures import picture
from cache.errors import HearsaeError
from cache.header import software

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "result.json"
"""Written into every folder of ours: it says that the folder is one."""
PAGE = "index.html"
STAGING = ".experiment-"
SHOWN_ROWS = 40
"""Of each table on the page; rows.parquet has all."""


@dataclass(frozen=True)
class Report:
    """The outcome of an experiment."""

    title: str
    what: str
    """Plain sentences: what was done, and how to read the figures."""
    rows: Sequence[Mapping[str, Any]] | pa.Table
    """One for each clip, trial, token, ...: goes into rows.parquet whole."""
    summary: dict[str, Any]
    """The experiment's numbers, its control's among them. Ready for JSON."""
    figures: dict[str, "Figure"] = field(default_factory=dict)
    """File name without ending -> picture."""
    captions: dict[str, str] = field(default_factory=dict)
    """Of the pictures; plain text."""
    tables: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Heading -> rows, all with the same keys: small tables for the page."""
    sounds: dict[str, bytes] = field(default_factory=dict)
    """File name with ending (.wav, .flac) -> its bytes."""
    lines: Sequence[str] = ()
    """What is said to people on the terminal."""


def write_report(report: Report, out: Path, settings: Mapping[str, Any]) -> Path:
    """Writes everything into the folder `out`, in place of an earlier report there. Returns the page.

    settings: what the experiment was asked for; kept in result.json. Nothing of an earlier report is lost until all of this one is written.
    Raises HearsaeError for a folder that holds other things, and where the system refuses.
    """
    with report_folder(out) as folder:
        fill(report, folder, settings)
        (folder / PAGE).write_text(page(report.title, [section(report)]), encoding="utf-8")
    return out / PAGE


def fill(report: Report, folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes all but the page into an existing folder."""
    table = report.rows if isinstance(report.rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in report.rows])
    pq.write_table(table, folder / "rows.parquet", compression="zstd")
    for name, figure in report.figures.items():
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").write_bytes(picture(figure, kind))
    for name, sound in report.sounds.items():
        (folder / name).write_bytes(sound)
    record = {"experiment": report.title, "summary": report.summary, "settings": dict(settings), "software": software()}
    (folder / RECORD).write_text(json.dumps(record, default=str, indent=1), encoding="utf-8")


# The folder


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """A folder whose contents take the place of an earlier report in `out` once all is written."""
    check_folder(out)
    try:
        staging = out.parent / f"{STAGING}{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        try:
            yield staging
            if out.exists():
                shutil.rmtree(out)
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise HearsaeError(f"can't write the report to {out}: {error.strerror or error}") from error


def check_folder(out: Path) -> None:
    """Raises HearsaeError unless `out` is new, empty, or an earlier report."""
    if not out.exists():
        return
    if not out.is_dir():
        raise HearsaeError(f"{out} is not a folder: choose another --out")
    if not any(out.iterdir()):
        return
    try:
        is_ours = "experiment" in json.loads((out / RECORD).read_bytes())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise HearsaeError(f"{out} holds other things and no report of ours: choose an empty or new folder")


# The page

POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2.5rem}h3{font-size:1rem;margin-bottom:.3rem}
figure{margin:1rem 0}figure img{max-width:100%;background:#fff;border-radius:4px}figcaption{font-size:.9rem;opacity:.8}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top;border-bottom:1px solid #8884}
td.number,th.number{text-align:right}audio{vertical-align:middle}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML page that needs no network and runs no script. title: plain text. sections: HTML, of `section`."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return f'<!doctype html><html lang="en"><head>{policy}{head}</head><body><h1>{escape(title)}</h1>{"".join(sections)}</body></html>\n'


def section(report: Report, folder: str = "", heading: str = "") -> str:
    """A report as HTML; all its text escaped. folder: where its files are, as seen from the page. heading: its title, where the page has several."""
    at = f"{folder}/" if folder else ""
    parts = [f"<h2>{escape(heading)}</h2>" if heading else "", *(f"<p>{escape(text)}</p>" for text in report.what.split("\n\n"))]
    for name in report.figures:
        caption = escape(report.captions.get(name, ""))
        parts.append(f'<figure><img src="{escape(at + name)}.png" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    for name, rows in report.tables.items():
        parts.append(f"<h3>{escape(name)}</h3>{_table(rows)}")
    for name in report.sounds:
        parts.append(f'<p>{escape(name)} <audio controls preload="none" src="{escape(at + name)}"></audio></p>')
    kept = f'<a href="{escape(at)}rows.parquet">rows.parquet</a>, <a href="{escape(at)}{RECORD}">{RECORD}</a>'
    return "".join([*parts, f"<p>All rows and numbers: {kept}</p>"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    names = list(rows[0])
    is_number = {name: all(isinstance(row[name], int | float | None) for row in rows) for name in names}
    style = {name: ' class="number"' if is_number[name] else "" for name in names}
    head = "".join(f"<th{style[name]}>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td{style[name]}>{escape(_cell(row[name]))}</td>" for name in names) + "</tr>" for row in rows[:SHOWN_ROWS])
    more = f"<p>and {len(rows) - SHOWN_ROWS} more</p>" if len(rows) > SHOWN_ROWS else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
