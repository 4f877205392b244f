"""The report in a real browser: it sorts, fits, has contrast in light and dark, and logs no errors.

Needs Debian's `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_world import world

from ssl_bench.leaderboards.report.build import build

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not installed")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PAGES = ("index", "papers", "paper-moca", "paper-mmc", "curves", "pictures", "records")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("browser")
    (place / "run").mkdir()
    lines = [f'{{"step": {k}, "epoch": {k}, "loss": {9 / k}, "rec": 1, "lr": 1}}\n' for k in range(1, 9)]
    (place / "run" / "log.jsonl").write_text("".join(lines))
    return build(world(place / "results"), place / "site", [place / "run"]).parent


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield opened
    opened.quit()


def record_page(site: Path) -> str:
    return next(site.glob("records/MOCA/*/toy.html")).relative_to(site).as_posix().removesuffix(".html")


def look(browser: Any, site: Path, page: str, *, width: int = 1280, theme: str = "light") -> None:
    """Open a page as a screen of that width with that preference shows it."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((site / f"{page}.html").as_uri())


def column(browser: Any, table: int, place: int) -> list[str]:
    """What stands in a column, from top to bottom."""
    script = """const body = document.querySelectorAll('table')[arguments[0]].tBodies[0];
        return [...body.rows].map(row => row.cells[arguments[1]].innerText)"""
    return [text.split(" ±")[0] for text in browser.execute_script(script, table, place)]


def heading(browser: Any, table: int, place: int) -> Any:
    return browser.execute_script(
        "return document.querySelectorAll('table')[arguments[0]].tHead.rows[0].cells[arguments[1]]", table, place
    )


def test_no_page_logs_an_error(browser, site):
    browser.get_log("browser")
    for page in (*PAGES, record_page(site)):
        look(browser, site, page)
        assert browser.get_log("browser") == [], page


def test_a_click_sorts_and_says_so(browser, site):
    look(browser, site, "index")
    before = column(browser, 0, 0)
    assert column(browser, 0, 1) == ["61.5", "54.5", "50.0", "40.2"]
    assert heading(browser, 0, 1).get_attribute("aria-sort") == "descending"
    heading(browser, 0, 1).find_element("tag name", "button").click()
    assert column(browser, 0, 1) == ["40.2", "50.0", "54.5", "61.5"]
    assert column(browser, 0, 0) == before[::-1]
    assert heading(browser, 0, 1).get_attribute("aria-sort") == "ascending"
    heading(browser, 0, 0).find_element("tag name", "button").click()
    assert column(browser, 0, 0) == sorted(before, key=str.lower)
    assert heading(browser, 0, 0).get_attribute("aria-sort") == "ascending"
    assert heading(browser, 0, 1).get_attribute("aria-sort") is None


def test_cells_without_a_number_stay_at_the_end(browser, site):
    look(browser, site, "index")
    button = heading(browser, 0, 2).find_element("tag name", "button")
    assert "neighbors" in button.text
    for _ in range(2):
        button.click()
        assert [text == "\u2013" for text in column(browser, 0, 2)] == [False, True, True, True]


def test_where_low_is_good_the_first_click_brings_the_lowest_up(browser, site):
    look(browser, site, "index")
    tables = browser.execute_script("return [...document.querySelectorAll('h2')].map(h => h.innerText)")
    digits = tables.index("digits")
    assert column(browser, digits, 1) == ["2.0", "3.0"]
    heading(browser, digits, 0).find_element("tag name", "button").click()
    assert column(browser, digits, 1) == ["3.0", "2.0"]  # by name
    heading(browser, digits, 1).find_element("tag name", "button").click()
    assert heading(browser, digits, 1).get_attribute("aria-sort") == "ascending"
    assert column(browser, digits, 1) == ["2.0", "3.0"]


def test_the_keyboard_alone_sorts(browser, site):
    from selenium.webdriver.common.keys import Keys

    look(browser, site, "index")
    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.get_attribute("class") == "skip"
    assert first.rect["x"] >= 0, "the skip link is seen when it has the focus"
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        if active.tag_name == "button" and "knn/dino" in active.text:
            break
    assert active.tag_name == "button"
    outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active)
    assert outline == "solid", "the focus is seen"
    active.send_keys(Keys.ENTER)
    assert column(browser, 0, 1) == ["40.2", "50.0", "54.5", "61.5"]
    active.send_keys(Keys.SPACE)
    assert column(browser, 0, 1) == ["61.5", "54.5", "50.0", "40.2"]
    assert browser.switch_to.active_element == active


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_no_page_is_wider_than_the_screen(browser, site, width):
    for page in (*PAGES, record_page(site)):
        look(browser, site, page, width=width)
        browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page


def test_wide_tables_scroll_in_their_own_box(browser, site):
    look(browser, site, "index", width=320)
    script = """const box = document.querySelector('.scroll'); box.scrollLeft = 1000;
        const name = box.querySelector('tbody th').getBoundingClientRect();
        return [box.scrollLeft, name.left - box.getBoundingClientRect().left]"""
    scrolled, name = browser.execute_script(script)
    assert scrolled > 50
    assert abs(name) < 2, "the model's name stays"


# Contrast as WCAG 2 defines it, of every text on the color that is painted behind it.
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = ([r, g, b]) => { const f = (c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
const behind = (element) => { for (let e = element; e; e = e.parentElement) {
  const color = rgba(getComputedStyle(e).backgroundColor); if (color[3] === 255) return color; }
  return [255, 255, 255]; };
const found = {};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest('title, script')) continue;
  const style = getComputedStyle(element);
  const ink = rgba(element.closest('svg') ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(element))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const name = `${element.tagName}.${element.getAttribute('class') || ''} ${ink} on ${behind(element)}`;
  found[name] = Math.min(found[name] ?? 99, ratio);
}
return [Object.entries(found), behind(document.body)];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast(browser, site, theme):
    papers = set()
    for page in (*PAGES, record_page(site)):
        look(browser, site, page, theme=theme)
        ratios, paper = browser.execute_script(CONTRAST)
        papers.add(sum(paper[:3]))
        assert len(ratios) > 4
        assert [(name, ratio) for name, ratio in ratios if ratio < 4.5] == [], page
    assert all((paper > 600) == (theme == "light") for paper in papers)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_marks_have_contrast(browser, site, theme):
    look(browser, site, "curves", theme=theme)
    script = (
        CONTRAST.partition("const found")[0]
        + """
        return [0, 1, 2, 3, 4, 5, 6, 7].map((k) => { const style = getComputedStyle(document.documentElement);
          const [a, b] = [`--series-${k}`, '--paper'].map(name => light(rgba(style.getPropertyValue(name))));
          return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); })"""
    )
    assert min(browser.execute_script(script)) >= 3
    stroke = "return getComputedStyle(document.querySelector('.chart .line')).stroke"
    assert browser.execute_script(stroke) == {"light": "rgb(31, 95, 191)", "dark": "rgb(127, 176, 255)"}[theme]


def test_images_load(browser, site):
    look(browser, site, "pictures")
    script = """const images = [...document.images]; images.forEach(each => each.loading = 'eager');
        return Promise.all(images.map(each => each.decode().then(() => each.naturalWidth)))"""
    assert browser.execute_script(script) == [1] * 8


def test_it_is_complete_without_javascript(browser, site):
    look(browser, site, "index")
    shown = browser.execute_script("return document.querySelector('main').innerText")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        look(browser, site, "index")
        assert browser.find_elements("css selector", "thead button") == []
        assert browser.find_element("tag name", "main").text.split() == shown.split()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_way_to_the_origin_and_back(browser, site):
    look(browser, site, "index")
    link = browser.find_element("css selector", "td.num a")
    number = link.text
    link.click()
    assert "/records/" in browser.current_url
    section = browser.find_element("css selector", ":target")
    assert float(number) == float(section.find_element("xpath", "following::tr[@class='main'][1]/td").text)
    section.find_element("xpath", "following::ul[@class='back'][1]//a").click()
    assert browser.current_url.partition("#")[0].endswith("/index.html")
    assert number in browser.find_element("css selector", ":target").text


def on_paper(browser: Any, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})


def test_on_paper_nothing_is_cut_off(browser, site):
    a4_across = 1031  # px: 297 mm less two margins of 12 mm, at 96 px an inch
    try:
        assert re.search(r"@page \{\s*size: landscape;\s*margin: 12mm;", (site / "style.css").read_text())
        for page in (*PAGES, *(f"paper-{name}" for name in ("tec", "extrema", "sdae")), record_page(site)):
            look(browser, site, page, width=a4_across)
            on_paper(browser, "light")
            browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
            cut = """return [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth
                || box.scrollHeight > box.clientHeight + 1).map(box => box.getAttribute('aria-label'))"""
            assert browser.execute_script(cut) == [], page
            assert browser.execute_script("return document.documentElement.scrollWidth") <= a4_across, page
            style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
            assert browser.execute_script(style, ".top nav", "display") == "none"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_on_paper_it_is_never_dark(browser, site):
    names = sorted(set(re.findall(r"(--[a-z0-9-]+):", (site / "style.css").read_text())))
    values = "return arguments[0].map(name => getComputedStyle(document.documentElement).getPropertyValue(name))"
    try:
        look(browser, site, "index")
        found = {}
        for theme in ("light", "dark"):
            on_paper(browser, theme)
            found[theme] = browser.execute_script(values, names)
        assert len(found["light"]) > 15
        assert found["light"] == found["dark"]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_tab_key_stops_only_at_what_scrolls(browser, site):
    script = """const done = arguments[0];
        const boxes = [...document.querySelectorAll('.scroll')].filter(box => box.clientWidth);
        requestAnimationFrame(() => setTimeout(() => done(boxes.map(box =>
          [box.getAttribute('aria-label'), box.scrollWidth > box.clientWidth, box.hasAttribute('tabindex')])), 50))"""
    scrolls = set()
    for width in (320, 1280):
        look(browser, site, "index", width=width)
        for name, scrolling, focusable in browser.execute_async_script(script):
            assert scrolling == focusable, (width, name)
            scrolls.add(scrolling)
    assert scrolls == {True, False}
    assert browser.find_elements("css selector", "[role=region]") == []


def test_scores_of_a_record_need_no_scrolling_on_a_desk(browser, site):
    look(browser, site, record_page(site))
    boxes = (
        """return [...document.querySelectorAll('.columns .scroll')].map(box => box.scrollWidth - box.clientWidth)"""
    )
    assert max(browser.execute_script(boxes)) <= 0


@pytest.mark.parametrize(("width", "least"), [(375, 11.5), (1280, 12)])
def test_words_in_charts_can_be_read(browser, site, width, least):
    script = """return [...document.querySelectorAll('svg.chart')].map(svg =>
        parseFloat(getComputedStyle(svg).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
    for page in ("papers", "curves", "paper-moca"):
        look(browser, site, page, width=width)
        assert least <= min(browser.execute_script(script)) <= 18, page


def test_words_in_charts_do_not_meet(browser, site):
    script = """return [...document.querySelectorAll('svg.chart')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('.tick, .label')].map(text => [text, text.getBoundingClientRect()]);
        return boxes.flatMap(([text, a], k) => boxes.slice(k + 1)
          .filter(([, b]) => a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
          .map(([other]) => `${text.textContent}/${other.textContent}`)) })"""
    for width in (375, 1280):
        for page in ("papers", "curves", "paper-moca", "paper-mmc", "paper-extrema", "paper-sdae"):
            look(browser, site, page, width=width)
            assert browser.execute_script(script) == [], (page, width)


def test_the_section_of_a_page_is_marked(browser, site):
    for page, section in (("paper-moca", "Papers"), (record_page(site), "Runs"), ("index", "Leaderboards")):
        look(browser, site, page)
        assert browser.find_element("css selector", ".top [aria-current]").text == section
