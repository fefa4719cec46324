"""Pictures of runs and evaluations: what sparsity costs, how often latents fire, how training went. PNG, beside what they show.

Every picture is a function of plain values that returns a matplotlib figure; `save_*` writes it, to a folder or an object store.
"""

import io
import json
import logging
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from cache.errors import HearsaeError
from cache.location import Location, RemotePath, names_in, put
from sae.baselines import Baseline
from sae.metrics import DENSE
from sae.models import CONFIG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933", "#332288")
"""Of Okabe and Ito, which people who see few colours tell apart, without yellow, which is too light, and black; three more of Paul Tol's."""
MARKERS = "osD^v<>P"
"""With the colours in turn: 72 pairs before one comes again."""
DASHES = ("-", "--", ":", "-.")
"""Of the first seed, the second, ...: they share a colour."""
BASELINE_STYLES = {
    "pca": ("0.1", "-", "PCA, first k"),
    "pca-largest": ("0.1", "--", "PCA, k largest"),
    "neurons": ("0.5", "-.", "neurons, k largest"),
    "random": ("0.5", ":", "random basis, k largest"),
}
"""Colour, line and name: greys, so that SAEs stand out."""
PANELS = {
    "loss": ("loss", "log"),
    "fvu": ("FVU of the last batches", "log"),
    "l0": ("L0 of the last batches (latents a row)", "linear"),
    "dead": ("dead latents (%)", "linear"),
    "aux_loss": ("AuxK loss", "linear"),
    "lr": ("learning rate", "linear"),
}
"""What is drawn of a training log: axis label and scale."""
NOTHING_LEFT = 1e-6
"""A baseline that keeps (nearly) everything is left out: on a log scale it would take all the room."""
DPI = 120
LEGEND_INCHES, LETTER_INCHES = 0.7, 0.065
"""Of a column of a legend: width of what stands beside the text, and of a letter of it."""
PLOTS = "plots"
RESULT = "train.json"
"""What training leaves in the folder of a run."""
EVALUATION = "evaluation.json"
"""Beside an SAE: the last evaluation that was kept."""


class Curve(NamedTuple):
    """One value over a training run."""

    rows: np.ndarray
    """int64 [n]: rows consumed."""
    value: np.ndarray
    """float64 [n]"""


# The figures


def pareto_figure(results: Sequence[Mapping[str, Any]], baselines: Sequence[Baseline] = (), what: str = "held-out rows") -> "Figure":
    """FVU against L0, one panel for each pair of sites. SAEs that differ in nothing but sparsity are joined by a line.

    results: `site`, `l0`, `fvu`, `arch`, `d_sae` and `seed` of each SAE, `target` where that is another site. what: on which rows, for the title.
    """
    panels = list(dict.fromkeys(map(_sites, results)))
    figure, styles = _figure(1, len(panels), width=6.4 if len(panels) == 1 else 4.8), _styles(map(_group, results))
    for axes, sites in zip(_axes(figure), panels, strict=True):
        here = [result for result in results if _sites(result) == sites and (result["fvu"] or 0) > 0 and result["l0"] > 0]
        for name, (colour, dashes, label) in BASELINE_STYLES.items():
            curve = sorted((one.k, one.fvu) for one in baselines if one.name == name and one.site == sites and (one.fvu or 0) > NOTHING_LEFT)
            if curve:
                axes.plot(*np.transpose(curve), color=colour, linestyle=dashes, linewidth=1.2, label=label)
        for group, of_group in _by(here, _group).items():
            colour, marker = styles[group]
            for number, of_seed in enumerate(_by(of_group, lambda result: result["seed"]).values()):
                points = np.transpose(sorted((result["l0"], result["fvu"]) for result in of_seed))
                named = _text(group) if number == 0 else None
                axes.plot(*points, color=colour, marker=marker, markersize=5, linewidth=1.2, label=named)
        if axes.lines:
            _log_scale(axes, "x")
            _log_scale(axes, "y")
        else:
            axes.annotate("no FVU or L0 above 0", (0.5, 0.5), xycoords="axes fraction", ha="center")
        of_baselines = "; of baselines, numbers kept of a row" if any(one.site == sites for one in baselines) else ""
        axes.set(xlabel=f"L0 (latents a row){of_baselines}", ylabel="FVU", title=_text(sites))
        _finish(axes)
    _legend_below(figure)
    figure.suptitle(f"What sparsity costs, on {what}")
    return figure


def density_figure(results: Sequence[Mapping[str, Any]]) -> "Figure":
    """How often latents fire: latents by the part of the rows in which they fired. A panel for each pair of sites, a line in it for each SAE.

    results: `density_edges`, `density_count`, `dead_fraction`, `rows` and what names the SAE.
    """
    panels = _by(results, _sites)
    figure = _figure(len(panels), 1, width=9.6)
    edges = 10.0 ** np.asarray(results[0]["density_edges"])
    used = np.flatnonzero(np.sum([result["density_count"] for result in results], axis=0))
    for axes, (sites, here) in zip(_axes(figure), panels.items(), strict=True):
        for (label, colour, dashes), result in zip(_lines(here), here, strict=True):
            named = f"{label}\n{result['dead_fraction']:.1%} never fired"
            axes.stairs(result["density_count"], edges, color=colour, linestyle=dashes, linewidth=1.6, label=_text(named))
        axes.axvline(DENSE, color="0.5", linestyle=":", linewidth=1.2)
        axes.annotate("dense", (DENSE, 1.0), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", color="0.4")
        axes.set_xscale("log")
        axes.set_xlim(min(edges[max(0, used[0] - 1)] if len(used) else 1.0, DENSE / 10), 1.0)
        axes.set_ylim(bottom=0)
        rows = " and ".join(f"{n:,}" for n in dict.fromkeys(result["rows"] for result in here))
        axes.set(xlabel="part of the rows in which a latent fires", ylabel="latents in a quarter of a decade", title=_text(f"{sites}, {rows} rows"))
        _finish(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    figure.suptitle("How often latents fire")
    return figure


def training_figure(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Curve]]]) -> "Figure":
    """What was logged over training, a panel for each value. runs: what names each SAE, and its curves by the log's names."""
    shown = [name for name in PANELS if any(name in curves and (name != "aux_loss" or curves[name].value.any()) for _, curves in runs)]
    columns = min(3, len(shown)) or 1
    figure = _figure(-(-len(shown) // columns) or 1, columns, width=4.2)
    lines = _lines([named for named, _ in runs])
    for axes, name in zip(_axes(figure), shown, strict=False):
        label, scale = PANELS[name]
        drawn = [(line, curves[name]) for line, (_, curves) in zip(lines, runs, strict=True) if name in curves]
        for (sae, colour, dashes), curve in drawn:
            axes.plot(curve.rows, curve.value * (100 if name == "dead" else 1), color=colour, linestyle=dashes, linewidth=1.2, label=_text(sae))
        values = np.concatenate([curve.value for _, curve in drawn])
        if scale == "log" and (values > 0).all():
            _log_scale(axes, "y")
        else:
            axes.set_ylim(bottom=0, top=None if values.any() else 1)
        axes.set(xlabel="rows", ylabel=label)
        axes.xaxis.set_major_formatter(_rows_formatter())
        _finish(axes)
    for axes in _axes(figure)[len(shown) :]:
        axes.set_axis_off()
    _legend_below(figure)
    figure.suptitle(_text(f"Training on {' and '.join(dict.fromkeys(_sites(named) for named, _ in runs))}"))
    return figure


# Onto disk


def save_pareto(results: Sequence[Mapping[str, Any]], path: Location, baselines: Sequence[Baseline] = (), what: str = "held-out rows") -> None:
    """Writes `pareto_figure`. Raises HearsaeError where that can't be done."""
    _save(pareto_figure(results, baselines, what), path)


def save_density(results: Sequence[Mapping[str, Any]], path: Location) -> None:
    """Writes `density_figure`. Raises HearsaeError where that can't be done."""
    _save(density_figure(results), path)


def save_run_plots(folder: Location) -> list[Location]:
    """Draws what lies in the folder of a finished run, into its folder `plots`, and says what it drew.

    Of an SAE: `training.png` from the TensorBoard log, `density.png` where there is an `evaluation.json`. Of a grid: both in the folder of each
    SAE, and beside them `training.png` of all, and `pareto.png` of the last training batches. What there is nothing to draw from is left out.
    Raises HearsaeError where a file is damaged or nothing can be written.
    """
    runs = runs_of_grid(folder)
    if not runs:
        return _save_sae_plots(folder, _read(folder / CONFIG) or {}, read_curves(folder))
    curves = [read_curves(folder / name) for name in runs]
    drawn = [path for name, of_run in zip(runs, curves, strict=True) for path in _save_sae_plots(folder / name, runs[name], of_run)]
    if any(curves):
        drawn.append(_save(training_figure(list(zip(runs.values(), curves, strict=True))), folder / PLOTS / "training.png"))
    drawn.append(_save(pareto_figure(list(runs.values()), what="the last training batches"), folder / PLOTS / "pareto.png"))
    return drawn


def _save_sae_plots(folder: Location, named: Mapping[str, Any], curves: Mapping[str, Curve]) -> list[Location]:
    drawn = []
    if curves:
        drawn.append(_save(training_figure([(named, curves)]), folder / PLOTS / "training.png"))
    evaluation = _read(folder / EVALUATION)
    if evaluation:
        try:
            drawn.append(_save(density_figure([{**named, **evaluation}]), folder / PLOTS / "density.png"))
        except (KeyError, TypeError, ValueError) as error:
            raise HearsaeError(f"{folder / EVALUATION} is damaged ({error!r}): evaluate it again with --save") from error
    return drawn


def read_curves(folder: Location) -> dict[str, Curve]:
    """What the TensorBoard log of a run has of each value; empty where there is no log. What was taken back is left out."""
    names = [name for name in names_in(folder / "tb") if "tfevents" in name and PurePosixPath(name).name == name]
    if not names:
        return {}
    if not isinstance(folder, RemotePath):
        return _curves(folder / "tb")
    with tempfile.TemporaryDirectory(prefix="hearsae-log-") as copy:
        for name in names:
            (Path(copy) / name).write_bytes((folder / "tb" / name).read_bytes())
        return _curves(Path(copy))


def _curves(board: Path) -> dict[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0})  # 0: all of them
    log = logging.getLogger("tensorboard")
    level = log.level
    log.setLevel(logging.ERROR)  # that a run went on and took back what it had logged beyond its checkpoint is nothing to warn of
    try:
        events.Reload()
    finally:
        log.setLevel(level)
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {name: Curve(np.array([one.step for one in of_one]), np.array([one.value for one in of_one])) for name, of_one in scalars.items()}


def runs_of_grid(folder: Location) -> dict[str, dict[str, Any]]:
    """Name of each SAE's folder in that of a grid -> what `train.json` says of it; empty where this is the folder of one SAE."""
    if (folder / CONFIG).exists():
        return {}
    result = _read(folder / RESULT)
    if result is None:
        raise HearsaeError(f"there is no finished run in {folder}: {RESULT} is missing")
    try:
        runs = {PurePosixPath(run["dir"]).name: dict(run) for run in result["runs"]}
    except (KeyError, TypeError, ValueError) as error:
        raise HearsaeError(f"{folder / RESULT} is damaged ({error!r})") from error
    here = {name: run for name, run in runs.items() if name not in ("", "..") and (folder / name / CONFIG).exists()}
    if not here:
        raise HearsaeError(f"{folder / RESULT} names no SAE in it: it was moved without its SAEs, or is damaged")
    return here


def _read(path: Location) -> dict[str, Any] | None:
    """A JSON object; None where there is no file."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HearsaeError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise HearsaeError(f"{path} is damaged: it holds no JSON object")
    return data


def _save(figure: "Figure", path: Location) -> Location:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})  # the same bytes from the same values
    put(path, data.getvalue())
    return path


# What SAEs are called, and how lines look


def _sites(named: Mapping[str, Any]) -> str:
    site, target = named.get("site") or "", named.get("target") or ""
    return f"{site} to {target}" if target and target != site else site


def _group(named: Mapping[str, Any]) -> str:
    return f"{named.get('arch', 'SAE')}, {named.get('d_sae', '?')} latents"


def _lines(of: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, colour, dashes) of each SAE: what tells it from the others. Those that differ in their seed alone share a colour."""
    sites = len(set(map(_sites, of))) > 1
    names = []
    for named in of:
        sparsity = [f"{name} {named[name]:g}" for name in ("k", "sparsity") if named.get(name)][:1]
        names.append(", ".join([*([_sites(named)] if sites else []), _group(named), *sparsity]))
    colours, seen, lines = _styles(names), dict.fromkeys(names, 0), []
    for name, named in zip(names, of, strict=True):
        lines.append((name if len(of) == 1 else f"{name}, seed {named['seed']}", colours[name][0], DASHES[seen[name] % len(DASHES)]))
        seen[name] += 1
    return lines


def _styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each label, in the order in which they come."""
    return {label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(dict.fromkeys(labels))}


def _by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _text(text: str) -> str:
    """As it stands: matplotlib would set what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")


# Axes


def _figure(rows: int, columns: int, width: float) -> "Figure":
    """With empty axes. A figure of its own, without pyplot: nothing global, and no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 1.2 + (4.2 if rows == columns == 1 else 3.4) * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns)
    return figure


def _axes(figure: "Figure") -> "list[Axes]":
    return list(figure.axes)


def _log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """With numbers as one says them, also between the powers of ten. To be called when all is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    subs = (1, 2, 5) if not low < high <= 10 * low else (1, 1.5, 2, 3, 4, 6) if high > 3 * low else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _rows_formatter() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _finish(axes: "Axes") -> None:
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def _legend_below(figure: "Figure") -> None:
    """One for all panels, where it hides nothing."""
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / (LEGEND_INCHES + LETTER_INCHES * max(map(len, handles), default=0))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
