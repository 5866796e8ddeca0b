"""Pictures of the demo page for the README: both tabs, with a checkpoint that knows drawn scenes.

    python tests/screenshots.py runs/demo-scenes --output model_cards/demo-scenes

Wants Chromium and playwright; writes app-align.png and app-search.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright
from serving import CHROMIUM, serving

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.retrieval import GranAlignIndex
from granalign_hf.training.scenes import draw_scene

SCENE, SIZE, NUM_SCENES = 4, 256, 60  # the seed, pixels
WORD, QUERY = "ring", "a red circle and a blue star"


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of both tabs of the demo page.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        scene = draw_scene(np.random.default_rng(SCENE), image_size=SIZE)
        scene.image.save(f"{folder}/scene.png")
        with serving(arguments.checkpoint, scenes_index(arguments.checkpoint, Path(folder))) as address:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(address)
            align(page, f"{folder}/scene.png", scene.captions[1])
            page.screenshot(path=arguments.output / "app-align.png", full_page=True)
            search(page)
            page.screenshot(path=arguments.output / "app-search.png", full_page=True)
            browser.close()


def scenes_index(checkpoint: Path, folder: Path) -> Path:
    paths = [folder / f"scene-{number}.png" for number in range(NUM_SCENES)]
    for number, path in enumerate(paths):
        draw_scene(np.random.default_rng([SCENE, number]), image_size=SIZE).image.save(path)
    model, processor = GranAlignModel.from_pretrained(checkpoint).eval(), GranAlignProcessor.from_pretrained(checkpoint)
    with GranAlignIndex.create(folder / "scenes.index", model, processor) as index:
        index.add([str(path) for path in paths], is_quiet=True)
    return folder / "scenes.index"


def align(page: Page, picture: str, sentence: str) -> None:
    page.wait_for_selector("#align")
    page.set_input_files("#picture input[type=file]", picture)
    page.wait_for_selector("#picture img")
    page.fill("#sentence textarea", sentence)
    page.fill("#others textarea", "a blue square and a green cross\na red ring")
    page.click("#align")
    page.wait_for_selector("#words label")
    before = page.get_attribute("#map img", "src")
    page.click(f"#words label:has-text('{WORD}')")
    page.wait_for_function("before => document.querySelector('#map img').src !== before", arg=before)
    page.wait_for_timeout(1500)  # what fades in


def search(page: Page) -> None:
    page.click("button[role=tab]:has-text('Search')")
    page.fill("#query textarea", QUERY)
    page.click("#search")
    page.wait_for_selector("#found img")
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main()
