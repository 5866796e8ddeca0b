"""The examples: pictures that are there, and only those whose words a model knows."""

from importlib.resources import files

from PIL import Image
from tiny import tiny_processor

from granalign_hf.examples import PHOTOGRAPHS, SCENES, credits, examples_for
from granalign_hf.training.build import word_tokenizer


def test_each_example_is_a_small_picture_of_the_package():
    for example in (*SCENES, *PHOTOGRAPHS):
        path = files("granalign_hf.model_cards").joinpath(example.file)
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and max(picture.size) <= 600
        assert len(path.read_bytes()) < 100_000


def test_a_model_gets_those_whose_words_it_knows():
    knows_scenes = word_tokenizer([example.title.lower() for example in SCENES])
    assert examples_for(knows_scenes) == [*SCENES]
    knows_all = word_tokenizer([example.title.lower() for example in (*SCENES, *PHOTOGRAPHS)])
    assert examples_for(knows_all) == [*SCENES, *PHOTOGRAPHS]
    assert credits(SCENES) == "" and credits(examples_for(knows_all)).count("CC0") == 2
    assert examples_for(tiny_processor().tokenizer) == []
