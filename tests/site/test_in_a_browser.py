"""The site in Chromium: search, copying, phones, dark mode, and nothing from elsewhere."""

import json
import time

import pytest

pytestmark = pytest.mark.slow
PAGES = [
    "index.html",
    "explained.html",
    "several_devices.html",
    "benchmarks.html",
    "reference/batch_norm.html",
]
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture
def open_page(browser, address):
    def opened(page, size=DESK):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(f"{address}/{page}")
        return browser

    return opened


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("page", PAGES)
def test_nothing_fails_and_nothing_comes_from_elsewhere(open_page, address, page):
    browser = open_page("index.html")
    browser.get_log("browser"), browser.get_log("performance")  # of the pages before
    browser = open_page(page)
    wait_for(lambda: browser.execute_script("return document.readyState") == "complete")
    time.sleep(0.5)
    assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []
    messages = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    sent = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
    addresses = [each["params"]["request"]["url"] for each in sent]
    assert addresses
    assert [each for each in addresses if not each.startswith((address, "data:"))] == []


def test_formulas_are_set(open_page):
    browser = open_page("reference/batch_norm.html")
    count = "return document.querySelectorAll('mjx-container').length"
    assert wait_for(lambda: browser.execute_script(count)) > 0


def test_search_finds_batch_norm_first(open_page):
    browser = open_page("search.html?q=batch_norm")
    first = "return document.querySelector('#search-results li a')?.textContent"
    assert "batch_norm" in wait_for(lambda: browser.execute_script(first)).lower().replace(" ", "_")


@pytest.mark.parametrize(
    ("page", "start"),
    [
        ("several_devices.html", "import jax\n"),
        ("reference/batch_norm.html", "import jax.numpy as jnp, normjax as nj\nparams"),
    ],
)
def test_a_block_of_code_has_a_button_that_copies_it(open_page, page, start):
    browser = open_page(page)
    copied = "window.copied = []; document.addEventListener('copy', () => copied.push(selection()))"
    selection = "window.selection = () => document.activeElement.value ?? String(getSelection());"
    browser.execute_script(selection + copied)
    button = wait_for(lambda: browser.find_elements("css selector", "button.copybtn"))[0]
    browser.execute_script("arguments[0].style.opacity = 1", button)  # as when hovered
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button
    )
    button.click()  # by the mouse: a browser copies for no script alone
    text = wait_for(lambda: browser.execute_script("return window.copied[0]"))
    assert text.startswith(start) and ">>>" not in text


@pytest.mark.parametrize("page", PAGES)
def test_on_a_phone_nothing_is_cut(open_page, page):
    browser = open_page(page, PHONE)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
    cut = browser.execute_script("""
        const fits = table => {
          for (let box = table.parentElement; box; box = box.parentElement)
            if (getComputedStyle(box).overflowX === 'auto') return true;
          return table.getBoundingClientRect().right <= window.innerWidth;
        };
        return [...document.querySelectorAll('table')].filter(table => !fits(table)).length""")
    assert cut == 0


def test_dark_mode_is_legible(open_page):
    browser = open_page("several_devices.html")
    browser.execute_script("document.body.dataset.theme = 'dark'")
    text, page = browser.execute_script("""
        const paragraph = document.querySelector('article p, article li');
        return [getComputedStyle(paragraph).color, getComputedStyle(document.body).backgroundColor]
    """)
    assert contrast(text, page) > 7  # WCAG's AAA


def contrast(*colors):
    lighter, darker = sorted(map(luminance, colors), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    """Of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    values = [float(part) / 255 for part in color.split("(")[1].rstrip(")").split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_there_is_a_switch_for_dark_mode(open_page):
    browser = open_page("index.html")
    theme = "return document.body.dataset.theme"
    before = browser.execute_script(theme)
    browser.find_elements("css selector", ".theme-toggle")[-1]
    browser.execute_script("document.querySelector('.theme-toggle').click()")
    assert wait_for(lambda: browser.execute_script(theme) != before)
