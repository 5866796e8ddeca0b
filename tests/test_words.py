"""The words of a caption, their offsets and their tokens."""

import pytest
from PIL import Image
from skateboards import CAPTION, make_model, make_processor, make_tokenizer
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from granalign_hf.modeling.alignment import align
from granalign_hf.modeling.words import Word, with_other_tokens, words_of


def test_pieces_are_merged_to_words_with_offsets():
    words = words_of(CAPTION, make_tokenizer())
    expected = [  # [CLS] is token 0
        ("A", 0, (1,), False),
        ("skateboarder's", 3, (2, 3, 4, 5, 6), True),
        ("red", 18, (7,), True),
        ("T-shirt", 22, (8, 9, 10), True),
        (",", 29, (11,), False),
        ("café", 31, (12,), True),
        (".", 35, (13,), False),
    ]
    assert [(word.text, word.start, word.tokens, word.is_content) for word in words] == expected
    assert all(CAPTION[word.start : word.end] == word.text for word in words)


def test_combining_accents_belong_to_their_word():
    assert [word.text for word in words_of("cafe\u0301 dog", make_tokenizer())] == ["cafe\u0301", "dog"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_words_of_a_byte_level_tokenizer(trim_offsets):
    inner = ByteLevelBPETokenizer(trim_offsets=trim_offsets)
    inner.train_from_iterator(["the red dog", "a red dog"] * 50, vocab_size=270, min_frequency=1)
    words = words_of("red dog, naïve 🐕", PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer))
    assert [word.text for word in words] == ["red", "dog", ",", "naïve", "🐕"]
    assert [word.is_content for word in words] == [True, True, False, True, False]
    # red| dog|,| |n|a|ï as two bytes|v|e| |🐕 as four bytes
    assert [word.tokens for word in words] == [(0,), (1,), (2,), (4, 5, 6, 7, 8, 9), (11, 12, 13, 14)]


@pytest.mark.parametrize(
    ("caption", "content"),
    [
        ("The dog doesn't bite the man's hand", ["dog", "bite", "man's", "hand"]),
        ("two dogs in front of it and IT'S red", ["dogs", "front", "red"]),
        ("a trash can to the left of them", ["trash", "can", "left"]),
        ("of the, and - don’t !", []),
    ],
)
def test_content_words(caption, content):
    assert [word.text for word in words_of(caption, make_tokenizer()) if word.is_content] == content


def test_truncated_words_are_left_out():
    words = words_of("red dog skateboarder red", make_tokenizer(model_max_length=5))
    assert [(word.text, word.tokens) for word in words] == [("red", (1,)), ("dog", (2,)), ("skateboarder", (3,))]


@pytest.mark.parametrize("caption", ["", "  ", None, ["a dog"]])
def test_bad_captions_are_refused(caption):
    with pytest.raises(ValueError, match="`caption` must be a sentence"):
        words_of(caption, make_tokenizer())
    with pytest.raises(ValueError, match="`caption` must be a sentence"):
        align(make_model(), make_processor(), Image.new("RGB", (4, 4)), caption)


def test_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="fast tokenizers have, got object"):
        words_of("a dog", object())


def test_tokens_of_no_word_stand_for_themselves():
    """[CLS] red, a space of its own, dog [SEP] [PAD]: padding takes no part."""
    tokenizer = make_tokenizer()
    words = [Word("red", 0, 3, (1,), True), Word("dog", 4, 7, (3,), True)]
    offsets, ids = [(0, 0), (0, 3), (3, 4), (4, 7), (0, 0), (0, 0)], [2, 16, 15, 7, 3, 0]
    found = with_other_tokens(words, "red dog", offsets, ids, [True] * 5 + [False], tokenizer)
    assert [word.text for word in found] == ["[CLS]", "red", " ", "dog", "[SEP]"]
    assert [word.tokens for word in found] == [(0,), (1,), (2,), (3,), (4,)]
    assert [word.is_special for word in found if not word.is_content] == [True, False, True]
