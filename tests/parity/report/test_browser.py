"""The page in Chromium, as people meet it: on a desk, on a phone, in the dark, by keyboard, with hostile results."""

import json
from urllib.parse import parse_qs, quote

import pytest

from parity.records import Outcome
from parity.report.command import main as write_report
from parity.report.html import case_link, cell_link
from parity.stages import STAGES
from tests.parity.report import made_up
from tests.parity.report.conftest import Quiet

pytestmark = pytest.mark.browser

CASE = case_link(made_up.SEP)
VIEWS = ["", "#cases", CASE]
CONTRASTS = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((x, i) => x * a + under[i] * (1 - a));
const light = (rgb) => rgb.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  const layers = [];
  for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("svg, script, style")) continue;
  const under = behind(node), ink = over(parse(getComputedStyle(node).color), under);
  const [high, low] = [light(ink), light(under)].sort((a, b) => b - a);
  found.push([(high + 0.05) / (low + 0.05), node.className + ": " + walker.currentNode.data.trim().slice(0, 40)]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("fragment", VIEWS)
def test_a_view_loads_without_errors_and_asks_the_network_for_nothing(browser, page, fragment):
    browser.open(page, fragment)
    assert browser.complaints() == []
    assert [address.partition("#")[0] for address in browser.requests()] == [page.as_uri()]


def test_the_grid_counts_every_case(browser, page):
    browser.open(page)
    shown = {cell.get_attribute("data-cell"): cell.text.split() for cell in browser.all(".cell")}
    assert shown["EP+SP/allgather/bf16"][:3] == ["2/4", "2", "fail"]
    assert shown["DP+EP/padded/bf16"][:3] == ["2/3", "1", "error"]
    assert shown["DP+EP/ragged/f32"][:3] == ["2/3", "1", "skip"]
    assert shown["single/local/bf16"][:4] == ["2/3", "1", "not", "run"]
    assert shown["TP/local/f32"][:2] == ["2/2", "pass"]
    found = made_up.outcomes()
    counts = [words[0].split("/") for words in shown.values()]
    assert sum(int(total) for _, total in counts) == len(found) + 1
    assert sum(int(passed) for passed, _ in counts) == sum(outcome.verdict == "pass" for outcome in found)
    assert f"{len(found) - 4} of {len(found) + 1} cases pass" in browser.find("h1").text


def test_a_cell_leads_to_its_cases_and_a_case_to_its_stages(browser, page):
    browser.open(page)
    browser.find('[data-cell="EP+SP/allgather/bf16"]').click()
    browser.settled(cell_link("EP+SP", "allgather", "bf16"))
    assert browser.find("[role=status]").text == f"4 of {len(made_up.outcomes()) + 1} cases."
    rows = [
        link for link in browser.all("#cases-view li a") if link.find_element("css selector", ".id").text == made_up.SEP
    ]
    rows[0].click()
    browser.settled(CASE)
    tables = browser.all(".stages")
    assert [table.find_element("css selector", "caption").text for table in tables] == ["jax", "torch"]
    for table in tables:
        assert [row.get_attribute("data-stage") for row in table.find_elements("css selector", "tbody tr")] == [
            stage.name for stage in STAGES
        ]
    born = browser.all('[data-stage="activation"]')[1]
    assert born.text.split()[-1] == "born"
    assert "First to diverge: activation, where the error is born. Worst: token 5" in browser.find("#case-view").text
    assert [gate.text.split("\n")[0] for gate in browser.all(".gates tbody th")] == ["oracle", "exact"]
    assert len(browser.all(".heat li.h5")) == 2 + 7  # torch's two ranks, and its experts that have tokens
    assert browser.find(".run code").text == f"parity run {made_up.SEP} --platform cpu --jax-processes"
    assert "2 DP ranks × 2 TP ranks: 4 ranks" in browser.find(".words").text
    browser.driver.back()
    browser.settled(cell_link("EP+SP", "allgather", "bf16"))
    assert not browser.find("#case-view").is_displayed()


def test_a_link_to_a_case_opens_it_and_one_to_no_case_says_so(browser, page):
    browser.open(page, CASE)
    assert browser.find("#case-view h1").text == made_up.SEP
    assert made_up.SEP in browser.driver.title
    browser.go("#case=dp9")
    assert "This report has no case dp9." in browser.find("#case-view").text
    browser.go("#kills")
    assert browser.find("#kills").is_displayed()
    assert 0 <= browser.run("return document.getElementById('kills').getBoundingClientRect().top") < 900


def test_every_case_of_the_page_opens(browser, page):
    browser.open(page, "#cases")
    ids = browser.run("return [...document.querySelectorAll('#cases-view li a')].map((a) => a.getAttribute('href'))")
    assert len(ids) == len(made_up.outcomes()) + 1
    for fragment in ids:
        browser.go(fragment)
        assert browser.find("#case-view h1").text == browser.run(
            "return decodeURIComponent(arguments[0].slice(6))", fragment
        )
    assert browser.complaints() == []


def test_filters_narrow_the_list_and_stay_in_the_address(browser, page):
    browser.open(page, "#cases?verdict=fail")
    assert len(browser.all("#cases-view li")) == 2
    browser.find("[name=q]").send_keys("token 22")
    browser.until("return document.querySelectorAll('#cases-view li').length === 1")
    assert parse_qs(browser.run("return location.hash").partition("?")[2]) == {"verdict": ["fail"], "q": ["token 22"]}
    browser.driver.refresh()
    assert [link.text for link in browser.all("#cases-view .id")] == [made_up.SEP]
    browser.run(
        "const s = document.querySelector('[name=verdict]'); s.value = ''; s.dispatchEvent(new Event('change'))"
    )
    browser.find("[name=q]").clear()
    browser.find("[name=q]").send_keys("dp2.tp2 bf16")
    browser.run(
        "const s = document.querySelector('[name=sort]'); s.value = 'margin'; s.dispatchEvent(new Event('change'))"
    )
    margins = [float(node.text) for node in browser.all("#cases-view .measure .margin")]
    assert margins[:2] == [41.5, 41.5]
    assert margins == sorted(margins, reverse=True)


@pytest.mark.parametrize("fragment", VIEWS)
@pytest.mark.parametrize("width", [375, 768, 1200])
def test_no_view_scrolls_sideways(browser, page, width, fragment):
    browser.see(width, 667)
    browser.open(page, fragment)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    if width == 375:  # nor do its tables, on a phone
        inner = (
            "return [...document.querySelectorAll('.scroll')].filter((n) => n.scrollWidth > n.clientWidth + 1).length"
        )
        assert browser.run(inner) == 0


def test_the_dark_scheme_has_other_colours_and_both_can_be_read(browser, page):
    grounds = []
    for dark in (False, True):
        browser.see(dark=dark)
        for fragment in VIEWS:
            browser.open(page, fragment)
            contrasts = browser.run(CONTRASTS)
            assert len(contrasts) > 40
            assert contrasts[0][0] >= 4.5, contrasts[:5]
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_hostile_results_stay_text(browser, page):
    hostile = next(outcome.case for outcome in made_up.outcomes() if made_up.HOSTILE in outcome.reason)
    for fragment in (
        "",
        "#cases",
        case_link(hostile),
        "#case=" + quote(made_up.HOSTILE),
        "#cases?q=" + quote(made_up.HOSTILE),
    ):
        browser.open(page, fragment)
        assert browser.run("return window.owned") is None
        assert browser.run("return document.querySelectorAll('img, iframe, object, embed').length") == 0
        assert browser.run("return document.scripts.length") == 2
        assert made_up.HOSTILE in browser.run("return document.body.innerText + document.querySelector('input')?.value")
        assert browser.complaints() == []
    browser.open(page, case_link(hostile))
    assert {made_up.HOSTILE} < {cell.text for cell in browser.all(".numbers thead th")}
    assert "--jax-processes" in browser.find(".run code").text


def test_the_pages_policy_stops_what_would_be_injected(browser, page):
    browser.open(page)
    browser.run("""
        const script = document.createElement("script"); script.textContent = "window.owned = 1";
        const image = document.createElement("img"); image.src = "https://example.invalid/x.png";
        document.body.append(script, image);
    """)
    assert browser.run("return window.owned") is None
    complaints = browser.complaints()
    assert len(complaints) >= 2
    assert all("Content Security Policy" in line for line in complaints)
    assert browser.refusals() == ["csp"]


def test_a_keyboard_reaches_a_case(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    active = lambda: browser.driver.switch_to.active_element  # noqa: E731
    browser.find("body").send_keys(Keys.TAB)
    assert active().text == "Skip to the content"
    for _ in range(60):
        active().send_keys(Keys.TAB)
        if active().get_attribute("data-cell"):
            break
    assert active().get_attribute("data-cell") == "single/local/bf16"
    ring = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    active().send_keys(Keys.ENTER)
    browser.settled(cell_link("single", "local", "bf16"))
    assert active().text == "Cases"  # a screen reader hears where it is


def test_six_hundred_cases_stay_light(browser, tmp_path):
    found = made_up.outcomes("vllm")
    assert len(found) > 600
    write_report(made_up.folder(tmp_path, found), None, False, Quiet())
    page = tmp_path / "report.html"
    assert page.stat().st_size < 8e6
    browser.open(page)
    assert browser.run("return document.querySelectorAll('*').length") < 3000
    loaded = browser.run("return performance.getEntriesByType('navigation')[0].domComplete")
    assert loaded < 5000
    browser.go("#cases")
    assert len(browser.all("#cases-view li")) == 150
    browser.find("#cases-view button").click()
    assert len(browser.all("#cases-view li")) == 300


def test_a_case_without_numbers_and_one_from_another_parity_can_be_shown(browser, tmp_path):
    odd = [
        Outcome(case="from/another/parity", verdict="pass", metrics={"frameworks": {"x": {}, "y": 3}, "margin": "no"}),
        Outcome(case="dp1.tp1/local/bf16/t3.d8.f8/e4.k2", verdict="fail", metrics={"failed_gates": [{}, 1]}),
        Outcome(case="dp1.tp1/local/bf16/t4.d8.f8/e4.k2", verdict="pass",
                metrics={"frameworks": {"bare": {"max_abs": 0.5, "not_checked": ["experts and weights"]}}}),
    ]  # fmt: skip
    write_report(made_up.folder(tmp_path, odd, with_summary=False, with_kills=False), None, False, Quiet())
    browser.open(tmp_path / "report.html")
    assert "no summary" in browser.find(".facts").text
    assert browser.all("#kills") == []
    for outcome in odd:
        browser.go(case_link(outcome.case))
        assert browser.find("#case-view h1").text == outcome.case
    assert "experts and weights" in browser.find("#case-view .numbers").text
    assert browser.complaints() == []


def test_on_paper_only_the_report_is_left(browser, page):
    browser.open(page, CASE)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = [browser.find(selector).is_displayed() for selector in (".top nav", ".pager", ".run button", ".crumbs")]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert hidden == [False] * 4
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert len(json.dumps(printed)) > 20_000
