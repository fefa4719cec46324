"""The list's filters and the phones of a feature's page in headless Chromium, from the file system."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import test_explorer_browser
from test_explorer_browser import Chromium, column, headings
from test_explorer_phones import HOSTILE_PHONE, make_phone_world

from analysis.explorer.export import export

pytestmark = pytest.mark.browser
chromium, nothing_went_wrong = test_explorer_browser.chromium, test_explorer_browser.nothing_went_wrong
"""Fixtures; the second is of every test."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_phone_world(tmp_path_factory.mktemp("browser") / "world")
    export([world / "neurons", world / "latents", world / "tokens"], world / "page")
    return world / "page"


@pytest.fixture(scope="module")
def scores(page: Path):
    return pq.read_table(page.parent / "neurons" / "phone_scores.parquet").to_pandas()


def type_into(chromium: Chromium, label: str, value: str) -> None:
    chromium.run(f"""
        const input = [...document.querySelectorAll('main input, main select')].find(one => one.ariaLabel?.startsWith({json.dumps(label)}));
        input.value = {json.dumps(value)};
        input.dispatchEvent(new Event('input'));
        input.dispatchEvent(new Event('change'))""")


def texts(chromium: Chromium, selector: str) -> list[str]:
    return chromium.run(f"return [...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


# The list


def test_list_has_columns_for_phones_where_there_are_any(chromium: Chromium, page: Path) -> None:
    with_phones = ["Feature", "Phone", "AUC", "F1", "Polysem.", "Density", "Max", "Mean active", "Activations", "Strongest example"]
    chromium.open(page)
    assert texts(chromium, ".list thead th") == with_phones
    assert column(chromium, "td.phone")[0] == HOSTILE_PHONE
    chromium.open(page, "#scan2")
    assert texts(chromium, ".list thead th") == [name for name in with_phones if name not in ("Phone", "AUC", "F1", "Polysem.")]
    assert chromium.run("return document.querySelector('.filters select')") is None


def test_every_column_sorts_both_ways_and_what_has_no_value_comes_last(chromium: Chromium, page: Path, scores) -> None:
    chromium.open(page)
    for i in range(10):
        for _ in range(2):
            chromium.run(f"document.querySelectorAll('.list thead button')[{i}].click()")
            assert chromium.run(f"return document.querySelectorAll('.list thead th')[{i}].ariaSort") in ("ascending", "descending")
    falling = scores.sort_values(["auc", "feature"], ascending=[False, True], na_position="last")["feature"].tolist()
    rising = scores.sort_values(["auc", "feature"], ascending=[True, True], na_position="last")["feature"].tolist()
    for sort, wanted in (("auc", falling), ("-auc", rising)):
        chromium.open(page, f"#scan0?sort={sort}")
        shown = list(map(int, column(chromium, "th")))
        assert len(shown) == len(wanted) and shown[0] == wanted[0]
        n_known = int(scores["auc"].notna().sum())
        assert set(shown[n_known:]) == set(wanted[n_known:])


def test_filters_keep_what_fits_and_the_address_says_so(chromium: Chromium, page: Path, scores) -> None:
    chromium.open(page, "#scan0")
    type_into(chromium, "best phone", "M")
    type_into(chromium, "AUC from", "0.51")
    chromium.wait("location.hash === '#scan0?phone=M&auc=0.51'")
    wanted = scores.query("phone == 'M' and auc >= 0.51")["feature"].tolist()
    assert wanted and list(map(int, column(chromium, "th"))) == wanted
    assert f"{len(wanted)} of {len(scores)}" == texts(chromium, "[role=status]")[0]

    chromium.open(page, "#scan0?phone=M&auc=0.51")  # what was shared shows the same
    assert list(map(int, column(chromium, "th"))) == wanted
    assert chromium.run("return document.querySelector('select').value") == "M"
    chromium.run("[...document.querySelectorAll('.filters button')].at(-1).click()")
    assert len(column(chromium, "th")) == len(scores) and chromium.run("return location.hash") == "#scan0"


def test_density_bounds_the_list(chromium: Chromium, page: Path) -> None:
    density = 100 * pq.read_table(page.parent / "neurons" / "features.parquet")["density"].to_numpy()
    low, high = sorted(density)[10] - 1e-3, sorted(density)[30] + 1e-3
    chromium.open(page, f"#scan0?low={low}&high={high}")
    shown = list(map(int, column(chromium, "th")))
    assert shown and set(shown) <= set((density >= low - 0.1).nonzero()[0]) & set((density <= high + 0.1).nonzero()[0])
    assert len(shown) < len(density)


def test_search_finds_phones(chromium: Chromium, page: Path, scores) -> None:
    chromium.open(page, "#scan0?q=iy")
    assert set(scores.query("phone == 'IY'")["feature"]) <= set(map(int, column(chromium, "th")))


def test_address_that_can_not_be_read_shows_the_whole_list(chromium: Chromium, page: Path, scores) -> None:
    for nonsense in ("#scan0?phone=XX&auc=much&sort=constructor&low=", "#scan0?%E0%A4%A", "#scan0??&&=", f"#scan0?phone={quote('<img src=x>')}"):
        chromium.open(page, nonsense)
        assert len(column(chromium, "th")) == len(scores)


def test_j_and_k_walk_what_a_shared_address_shows(chromium: Chromium, page: Path, scores) -> None:
    order = scores.query("phone == 'M'").sort_values(["auc", "feature"], ascending=[False, True])["feature"].tolist()
    chromium.open(page, f"#scan0/feature/{order[0]}?phone=M&sort=auc")
    chromium.press("j")
    chromium.wait(f"document.querySelector('h1').textContent === 'Neuron {order[1]}'")
    assert chromium.run("return location.hash") == f"#scan0/feature/{order[1]}?phone=M&sort=auc"
    chromium.press("k")
    chromium.wait(f"document.querySelector('h1').textContent === 'Neuron {order[0]}'")
    assert chromium.run("return document.querySelector('.back').getAttribute('href')") == "#scan0?phone=M&sort=auc"


def test_many_features_with_phones_show_their_rows(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    large = tmp_path / "page"
    shutil.copytree(page, large)
    n = 12_288
    rows = {"feature": list(range(n)), "spark": ["0z1"] * n, "text": [0] * n, "texts": ["some words"], "phone": [i % 4 for i in range(n)]}
    rows |= {name: [i / n for i in range(n)] for name in ("density", "max", "mean_active", "auc", "f1", "polysemanticity")}
    (large / "data" / "scan0" / "list.js").write_text(f'hearsae.register("scan0/list",{json.dumps(rows)});')
    chromium.open(large, "#scan0?auc=0.5&sort=auc")
    assert texts(chromium, "[role=status]") == ["6,144 of 12,288"]
    assert column(chromium, "th")[0] == str(n - 1)
    type_into(chromium, "polysemanticity from", "0.75")
    chromium.wait("document.querySelector('[role=status]').textContent === '3,072 of 12,288'")
    assert 20 < len(column(chromium, "th")) < 120
    assert chromium.run("return location.hash") == "#scan0?auc=0.5&poly=0.75&sort=auc"


# A feature


def test_phones_are_told_in_words_and_drawn(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    assert "Phones over all labelled frames" in headings(chromium)
    assert f"It tells {HOSTILE_PHONE} from all else with an AUC of " in texts(chromium, ".scores p")[0]
    label = chromium.run("return document.querySelector('.stacked').getAttribute('aria-label')")
    assert label.startswith("Phones in each range of activation, from high to low. 4.50 to 5.00: ") and "any value: M " in label
    # Every bar that has frames is full.
    widths = chromium.run("""
        const bars = [...document.querySelectorAll('.stacked g')].map(bar => [...bar.querySelectorAll('rect')].map(part => part.width.baseVal.value));
        return bars.map(parts => parts.reduce((a, b) => a + b, 0))""")
    assert len(widths) == 11 and {round(width) for width in widths} <= {0, 474}
    assert round(widths[-1]) == 474
    assert texts(chromium, ".legend li") == ["vowels", "nasals", "outside ARPAbet", "silence"]


def test_hostile_phone_stays_a_word(chromium: Chromium, page: Path) -> None:
    for place in ("#scan0", "#scan0/feature/0"):
        chromium.open(page, place)
        assert HOSTILE_PHONE in chromium.run("return document.querySelector('main').textContent")
        assert chromium.run("return document.querySelectorAll('main img, main script').length") == 0
    chromium.open(page, f"#scan0?phone={quote(HOSTILE_PHONE)}")
    assert "0" in column(chromium, "th") and set(column(chromium, "td.phone")) == {HOSTILE_PHONE}


def test_examples_stand_in_four_sections(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/7")
    assert [text.split()[0] for text in texts(chromium, "section > h2")] == ["Phones", "Neurons", "Strongest", "Lowest", "Ranges", "Quantiles"]
    lowest = texts(chromium, "section.bottom .facts b")
    assert lowest and all(value.startswith("−") for value in lowest)
    assert [name for name in texts(chromium, ".numbers dt") if "un" in name] == ["Runs above zero", "Run, median", "Run, mean"]


def test_features_like_it_are_linked(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan1/feature/3?sort=max")
    assert texts(chromium, ".related caption") == ["Writes alike", "Active together"]
    first = chromium.run("return document.querySelector('.related a').textContent")
    chromium.run("document.querySelector('.related a').click()")
    chromium.wait(f"document.querySelector('h1').textContent === 'Latent {first}'")
    assert chromium.run("return location.hash") == f"#scan1/feature/{first}?sort=max"


def test_question_mark_shows_the_keys(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0/feature/0")
    chromium.press("?")
    chromium.wait("document.querySelector('dialog[open]')")
    assert texts(chromium, "dialog kbd") == ["j", "k", "space", "/", "Enter", "?", "Esc"]
    chromium.press("j")  # belongs to the dialog
    chromium.press("\ue00c")
    chromium.wait("!document.querySelector('dialog')")
    assert headings(chromium)[0] == "Neuron 0"
    chromium.run("document.querySelector('.help').click()")
    chromium.wait("document.querySelector('dialog[open]')")
    chromium.run("document.querySelector('dialog button').click()")
    chromium.wait("!document.querySelector('dialog')")


def test_keys_typed_into_a_filter_stay_there(chromium: Chromium, page: Path) -> None:
    chromium.open(page, "#scan0")
    chromium.run("document.querySelector('select').focus()")
    chromium.press("?")
    assert chromium.run("return document.querySelector('dialog')") is None


@pytest.mark.parametrize("place", ["#scan0", "#scan0/feature/7", "#scan1/feature/3"])
def test_narrow_window_needs_no_sideways_scrolling(chromium: Chromium, page: Path, place: str) -> None:
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    chromium.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
    try:
        chromium.open(page, place)
        assert chromium.run("return document.documentElement.scrollWidth") <= 375
    finally:
        chromium.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})


def test_controls_have_names(chromium: Chromium, page: Path) -> None:
    for place in ("#scan0", "#scan1/feature/3"):
        chromium.open(page, place)
        controls = "[...document.querySelectorAll('button, a, input, select, summary')]"
        names = chromium.run(f"return {controls}.map(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)")
        assert all(name and name.strip() for name in names)
