"""Both reports and the page of the data in a real browser: layout on phone and laptop, contrast, figures, sorting; nothing is fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation import report, run_report
from evaluation.systems import read
from megatron_tower.config import Config
from megatron_tower.curation.pipeline import Pipeline
from tests.browser import driver
from tests.browser.driver import ENTER, Browser
from tests.unit.test_curation_pipeline import cfg, done  # noqa: F401  fixtures
from tests.unit.test_evaluation_report import system
from tests.unit.test_evaluation_run_report import BASE, CPT, GRPO, SFT, WPO, made_run
from tools import inspect_data

pytestmark = pytest.mark.skipif(driver.missing(), reason=f"needs a browser: {' '.join(driver.INSTALL)}")
MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")
STAGES = {"base": BASE, "cpt": CPT, "sft": SFT, "wpo": WPO, "grpo": GRPO}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, done: Pipeline, cfg: Config) -> dict[str, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("pages")
    run = made_run(folder, **STAGES)
    others = {"other": "Another model of 72 billion parameters", "third": "An_underscored_name_that_has_no_space_to_break_it"}
    named = [f"{system(folder / n, [i / 60 if n == 'other' else 1 - i / 60 for i in range(60)])}={label}" for n, label in others.items()]
    of_several = report.write(read([str(run), *named]), folder / "report", "sft", ("translation/chrf", "general/accuracy"))
    return {"run": run_report.write(run, list(STAGES)), "several": of_several, "data": inspect_data.write(cfg)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def opened(browser: Browser, page: Path, width: int, scheme: str = "light") -> None:
    browser.open(page, width, scheme)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true);" + MEASURE)


@pytest.mark.parametrize("name", ["run", "several", "data"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways_and_wide_tables_do(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width)
    assert browser.run("return measure.tooWide(...arguments)", width) == []
    scrolling = browser.run("return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)")
    assert any(scrolling) if width == 360 else len(scrolling) > 2
    assert 0 <= browser.run("return measure.leftOfNames(200)") < width / 4  # names of rows stay in sight


@pytest.mark.parametrize("name", ["run", "several", "data"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser: Browser, pages: dict[str, Path], name: str, scheme: str) -> None:
    opened(browser, pages[name], 1280, scheme)
    if name == "several":
        browser.run("document.getElementById('one').value = '5'; document.getElementById('other').value = '6'; draw()")  # those with spans
        assert browser.run("return document.querySelectorAll('mark.major').length") > 5
    assert browser.run("return measure.pale(4.5)") == []
    assert browser.run("return measure.texts") > 300


@pytest.mark.parametrize(("name", "figures"), [("run", 3), ("several", 1)])
def test_labels_in_figures_do_not_overlap(browser: Browser, pages: dict[str, Path], name: str, figures: int) -> None:
    opened(browser, pages[name], 1280)
    found = browser.run("return measure.labels()")
    assert len(found) == figures and all(figure["texts"] > 10 for figure in found)
    assert [figure["clashes"] for figure in found] == [[]] * figures


def test_tables_are_sorted_by_click_and_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["several"], 1280)
    column, sorts = "return measure.column(3)", "return measure.sorts()"
    before = browser.run(column)
    assert before not in (sorted(before), sorted(before, reverse=True))
    browser.click("table thead th:nth-child(4) button")
    assert browser.run(column) == sorted(before, reverse=True) and browser.run(sorts) == [None] * 3 + ["descending"] + [None] * 4
    browser.run("document.querySelector('table thead th:nth-child(4) button').focus()")
    browser.press(ENTER)
    assert browser.run(column) == sorted(before) and browser.run(sorts) == [None] * 3 + ["ascending"] + [None] * 4


def test_two_systems_are_compared_side_by_side(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["several"], 1280)
    choose = "measure.choose(...arguments)"
    browser.run(choose, "one", "5")
    browser.run(choose, "other", "6")
    won = "return [...document.querySelectorAll('.versus')].map(v => [...v.children].map(e => e.className))"
    assert browser.run(won)[:4] == [["won", ""], ["", "won"]] * 2
    gaps = "return [...document.querySelectorAll('.won h3')].map(h => parseFloat(h.textContent.match(/better by ([0-9.]+) xcomet/)[1]))"
    wins, losses = (browser.run(gaps)[side::2] for side in (0, 1))
    assert wins == sorted(wins, reverse=True) and losses == sorted(losses, reverse=True) and wins[0] > 0.9
    tops = browser.run("return [...document.querySelector('.versus').children].map(e => e.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    browser.run(choose, "winner", "1")
    assert {tuple(one) for one in browser.run(won)} == {("", "won")}
    assert browser.run("return document.querySelector('.versus mark.major').title") == "major"


@pytest.mark.parametrize("name", ["run", "several", "data"])
def test_nothing_is_fetched_and_nothing_goes_wrong(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.log("browser"), browser.log("performance")
    browser.open(pages[name], 1280)
    browser.run("document.querySelectorAll('button').forEach(b => b.click())")
    assert browser.log("browser") == []
    told = [json.loads(line["message"])["message"] for line in browser.log("performance")]
    asked = {one["params"]["request"]["url"].split(":")[0] for one in told if one["method"] == "Network.requestWillBeSent"}
    assert asked == {"file", "data"} - ({"data"} if name == "data" else set())  # the page itself, and the figures in it
