"""The demo page: where the words of a sentence are in a picture, which sentence fits best, and search over many pictures.

`granalign app` opens it. As a Space on the Hub this file is the whole application: the variable `GRANALIGN_MODEL` of the
Space names the checkpoint, and `GRANALIGN_INDEX` an index to search, if there is one.
"""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

import gradio as gr
from PIL import Image

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.examples import credits, examples_for
from granalign_hf.explanation import Explanation, explain
from granalign_hf.modeling.pipelines import ImageTextRetrievalPipeline
from granalign_hf.modeling.processing_granalign import read_image
from granalign_hf.overlays import colour_scale, overlay, region_overlay
from granalign_hf.retrieval import GranAlignIndex

ALL_WORDS = "the whole sentence"
REGIONS = "regions"
MAX_FILE_SIZE = "20mb"
THUMBNAIL = (512, 512)
LOOK = """
.gradio-container { max-width: min(1100px, 100vw) !important; margin: auto; }
#regions { max-width: calc(100vw - 64px); overflow-x: auto; }
#picture img, #map img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""
NUM_WORDS = 3  # of a region


def build(model: Any, processor: Any, index: GranAlignIndex | None = None) -> gr.Blocks:
    """
    The page of a model.

    Args:
        model: a [`GranAlignModel`] in evaluation mode. processor: its [`GranAlignProcessor`].
        index: of pictures, for the second tab, which is left out without one.
    """
    ranker = ImageTextRetrievalPipeline(model=model, processor=processor)
    with gr.Blocks(title="granalign") as page:
        gr.Markdown("# granalign\nWhere in the picture is each word, and how much does it count?")
        with gr.Tab("Align"):
            _align_tab(model, processor, ranker)
        if index is not None:
            with gr.Tab("Search"):
                _search_tab(index)
    return page


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serves the page, with its look; `options` are those of `gradio.Blocks.launch`."""
    theme = gr.themes.Default(primary_hue="red", neutral_hue="stone", font=["system-ui", "sans-serif"])
    return page.launch(theme=theme, css=LOOK, max_file_size=MAX_FILE_SIZE, **options)


# --------------------------------------------------------------------------------------------------------------- align


def _align_tab(model: Any, processor: Any, ranker: Any) -> None:
    explained = gr.State()
    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Picture", elem_id="picture", height=320, sources=["upload", "clipboard"])
            sentence = gr.Textbox(label="Sentence", elem_id="sentence", placeholder="a dog catches a red ball")
            others = gr.Textbox(label="Other sentences, one a line", elem_id="others", lines=3)
            button = gr.Button("Align", variant="primary", elem_id="align")
        with gr.Column():
            overlaid = gr.Image(
                label="Where it is", elem_id="map", interactive=False, height=320, format="png", buttons=["fullscreen"]
            )
            chosen = gr.Radio([], label="Show", elem_id="words", visible=False)
            shares = gr.HighlightedText(
                label="Share of the score of each word", elem_id="shares", show_inline_category=False, visible=False
            )
            score = gr.Markdown(elem_id="score")
    ranked = gr.Label(label="Which sentence fits best", elem_id="ranked", visible=False)
    regions = gr.Dataframe(
        headers=["region", "weight", "spread", "share of the score", "nearest words"],
        label="Regions of the picture",
        elem_id="regions",
        interactive=False,
        visible=False,
    )

    def align(image: Image.Image | None, text: str, candidates: str) -> tuple:
        explanation = _explain(model, processor, image, text)
        names = [ALL_WORDS, *_word_names(explanation), *([REGIONS] if explanation.regions else [])]
        rows = [_region_row(region) for region in explanation.regions]
        return (
            explanation,
            show(explanation, ALL_WORDS),
            gr.Radio(names, value=ALL_WORDS, visible=True),
            gr.HighlightedText(_coloured(explanation), visible=True),
            f"Score **{explanation.score:.3f}**, the sum of the shares.",
            _rank(ranker, explanation, candidates),
            gr.Dataframe(rows, visible=bool(rows)),
        )

    outputs = [explained, overlaid, chosen, shares, score, ranked, regions]
    gr.on([button.click, sentence.submit], align, [picture, sentence, others], outputs)
    chosen.input(show, [explained, chosen], overlaid)
    examples, pictures = examples_for(processor.tokenizer), files("granalign_hf.model_cards")
    if examples:
        shown = [[str(pictures.joinpath(example.file)), example.title] for example in examples]
        gr.Examples(shown, [picture, sentence], label="Examples")
        gr.Markdown(credits(examples), elem_id="credits")


def _explain(model: Any, processor: Any, image: Image.Image | None, text: str) -> Explanation:
    """Raises gradio.Error, which the page shows: what is missing or cannot be read."""
    if image is None:
        raise gr.Error("Choose a picture first.")
    try:
        return explain(model, processor, image, text)
    except ValueError as error:
        raise gr.Error(str(error)) from error


def show(explanation: Explanation, name: str) -> Image.Image:
    """The picture under the map of a word, of the whole sentence, or divided into regions; one scale for all words."""
    picture, area = explanation.image, explanation.area
    if name == REGIONS:
        owners = explanation.region_owners
        assert owners is not None  # the name is offered with regions only
        return region_overlay(picture, owners, area=area)
    if name == ALL_WORDS:
        return overlay(picture, explanation.caption_map, area=area)
    word = explanation.content_words[_word_names(explanation).index(name)]
    scale = colour_scale([word.map for word in explanation.content_words])
    return overlay(picture, word.map, scale=scale, area=area)


def _word_names(explanation: Explanation) -> list[str]:
    """Of the content words, as they are spelt; the second of its kind is "dog (2)"."""
    names: list[str] = []
    texts = [word.text for word in explanation.content_words]
    for position, text in enumerate(texts):
        number = texts[: position + 1].count(text)
        names.append(text if number == 1 else f"{text} ({number})")
    return names


def _coloured(explanation: Explanation) -> list[tuple[str, str | float | None]]:
    """All tokens with their share, as a part of the largest, in [-1, 1]."""
    shares = explanation.word_shares
    largest = max((abs(share) for _, share in shares), default=0.0) or 1.0
    return [(word.text, share / largest) for word, share in shares]


def _region_row(region: Any) -> list:
    words = ", ".join(word.text for word, _ in region.words[:NUM_WORDS])
    spread = None if region.variance is None else round(region.variance**0.5, 4)
    return [region.index, round(region.weight, 3), spread, round(region.share, 3), words]


def _rank(ranker: Any, explanation: Explanation, candidates: str) -> Any:
    """The sentences with their probabilities, the best first; hidden if there is but one."""
    sentences = list(dict.fromkeys([explanation.caption, *filter(None, map(str.strip, candidates.splitlines()))]))
    if len(sentences) == 1:
        return gr.Label(visible=False)
    answers = ranker(image=explanation.image, candidates=sentences)
    sure = [sentences[one["index"]] for one in answers if one["is_in_answer_set"]]
    label = "Which sentence fits best" + (f" (90 % answer set: {'; '.join(sure)})" if sure else "")
    return gr.Label({sentences[one["index"]]: one["probability"] for one in answers}, label=label, visible=True)


# -------------------------------------------------------------------------------------------------------------- search


def _search_tab(index: Any) -> None:
    query = gr.Textbox(label=f"Search in {len(index)} pictures", elem_id="query", placeholder="two dogs on a beach")
    number = gr.Slider(1, 50, value=12, step=1, label="Pictures to show")
    button = gr.Button("Search", variant="primary", elem_id="search")
    found = gr.Gallery(label="The best first", elem_id="found", columns=4, height="auto", object_fit="contain")

    def search(text: str, top_k: int) -> list[tuple[Image.Image, str]]:
        try:
            return [_thumbnail(one) for one in index.search(text=text, top_k=int(top_k))]
        except ValueError as error:
            raise gr.Error(str(error)) from error

    gr.on([button.click, query.submit], search, [query, number], found)


def _thumbnail(one: Any) -> tuple[Image.Image, str]:
    picture = read_image(one.payload.get("path", one.id))
    picture.thumbnail(THUMBNAIL)
    return picture, f"{one.score:.3f}  {os.path.basename(one.id)}"


def main() -> None:
    """As a Space."""
    name, place = os.environ.get("GRANALIGN_MODEL"), os.environ.get("GRANALIGN_INDEX")
    if not name:
        raise SystemExit("Set the variable GRANALIGN_MODEL to the name of a checkpoint on the Hub.")
    model, processor = GranAlignModel.from_pretrained(name).eval(), GranAlignProcessor.from_pretrained(name)
    launch(build(model, processor, GranAlignIndex.open(place, model, processor) if place else None))


if __name__ == "__main__":
    main()
