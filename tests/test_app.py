"""The demo page in a browser, headless Chromium: load it, upload a picture, choose a word, see the map change."""

import pytest
import torch
from PIL import Image
from serving import CHROMIUM, serving
from tiny import tiny_model, tiny_processor

from granalign_hf import GranAlignModel, app
from granalign_hf.explanation import explain
from granalign_hf.retrieval import GranAlignIndex

SENTENCE = "a red dog and the blue cat"


@pytest.fixture(scope="module")
def parts():
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(noise.numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def address(parts, picture, tmp_path_factory):
    """Of the command `granalign app` in a process of its own."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian's package `chromium`)")
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in parts:
        part.save_pretrained(folder)
    loaded = GranAlignModel.from_pretrained(folder).eval(), parts[1]
    with GranAlignIndex.create(folder / "my.index", *loaded, engine="torch") as index:
        index.add([str(picture)], is_quiet=True)
    with serving(folder, folder / "my.index") as url:
        yield url


@pytest.fixture
def browser(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 390, "height": 800})  # a phone
        page.goto(address)
        page.wait_for_selector("#align")
        yield page
        chromium.close()


def align(page, picture, others="") -> None:
    page.set_input_files("#picture input[type=file]", str(picture))
    page.wait_for_selector("#picture img")
    page.fill("#sentence textarea", SENTENCE)
    page.fill("#others textarea", others)
    page.click("#align")
    page.wait_for_selector("#words label")


def test_a_chosen_word_changes_the_map(browser, parts, picture):
    align(browser, picture)
    names = browser.locator("#words label").all_inner_texts()
    assert [name.strip() for name in names] == [app.ALL_WORDS, "red", "dog", "blue", "cat", app.REGIONS]
    expected = explain(*parts, picture, SENTENCE)
    assert f"{expected.score:.3f}" in browser.inner_text("#score")
    for word in ("[CLS]", *SENTENCE.split(), "[SEP]"):
        assert word in browser.inner_text("#shares")
    before = browser.get_attribute("#map img", "src")
    browser.focus("#words input:checked")
    browser.keyboard.press("Tab")  # the page can be used with the keyboard alone
    browser.keyboard.press("Space")
    browser.wait_for_function("before => document.querySelector('#map img').src !== before", arg=before)
    assert browser.locator("#words input:checked").get_attribute("value") == "red"


def test_sentences_are_ranked(browser, picture):
    align(browser, picture, others="the green circle\n\na square\n")
    shown = browser.inner_text("#ranked")
    assert all(sentence in shown for sentence in (SENTENCE, "the green circle", "a square")) and shown.count("%") == 3


def test_nothing_is_wider_than_a_phone(browser, picture):
    align(browser, picture)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_are_found(browser, picture):
    browser.click("button[role=tab]:has-text('Search')")
    browser.fill("#query textarea", "a red dog")
    browser.click("#search")
    browser.wait_for_selector("#found img")
    assert picture.name in browser.inner_text("#found")


def test_what_is_missing_is_told(browser):
    browser.click("#align")
    browser.wait_for_selector("text=Choose a picture first.")


def test_the_map_of_a_word_is_on_the_scale_of_all(parts, picture):
    explanation = explain(*parts, picture, "a dog on a dog")
    first, second = (app.show(explanation, name) for name in ("dog", "dog (2)"))
    assert first.size == second.size == (40, 30) and first.tobytes() != second.tobytes()
    assert app.show(explanation, app.REGIONS).size == (40, 30)


@pytest.mark.parametrize("aligner", ["chan", "vse++"])
def test_aligners_without_regions(aligner, picture):
    explanation = explain(tiny_model(aligner=aligner), tiny_processor(), picture, SENTENCE)
    assert explanation.regions == [] and app.show(explanation, "dog").size == (40, 30)
