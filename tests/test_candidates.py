"""The few vectors of an item, by hand."""

import pytest
import torch
from tiny import region_model_and_processor, tiny_inputs, tiny_model

from granalign_hf.candidates import cell_means, num_search_vectors, pooled_vectors, search_vectors
from granalign_hf.modeling.outputs import GranAlignImageOutput


def described(**fields):
    model, inputs = tiny_model(**fields), tiny_inputs(4, 5)
    with torch.no_grad():
        return model, model.get_image_features(inputs.pop("pixel_values")), model.get_text_features(**inputs)


def test_cells_are_means_of_patches_by_hand():
    patches = torch.arange(2 * 17 * 1.0).reshape(2, 17, 1)
    image = GranAlignImageOutput(patch_embeds=patches, spatial_shapes=torch.tensor([[4, 4]] * 2))
    cells = cell_means(image)[0, :, 0]
    grid = torch.arange(1.0, 17).reshape(4, 4)
    columns = (slice(0, 2), slice(1, 3), slice(2, 4))  # of 4 columns in 3 cells, neighbours share some
    assert cells.tolist() == [0, *(grid[rows, c].mean().item() for rows in (slice(0, 2), slice(2, 4)) for c in columns)]


def test_boxes_are_cut_into_parts():
    image = GranAlignImageOutput(patch_embeds=torch.arange(12.0).reshape(1, 12, 1), spatial_shapes=torch.tensor([[12, 1]]))
    assert cell_means(image)[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]
    model, processor = region_model_and_processor(aligner="chan")
    with torch.no_grad():
        image = model.get_image_features(**processor(images=torch.randn(2, 4, 6), return_tensors="pt"))
    assert [own.shape for own in search_vectors(model, image)] == [(4, 16)] * 2


def test_grm_has_its_regions_and_the_salient_words():
    model, image, text = described(use_special_tokens=False, special_token_ids=[7])
    assert torch.equal(torch.stack(search_vectors(model, image)), image.region_embeds)
    for number, own in enumerate(search_vectors(model, text)):
        mask = text.word_mask[number]
        assert torch.equal(own, (text.word_embeds[number] * text.word_saliency[number, :, None])[mask])
    assert num_search_vectors(model.config, "images") == 3


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_product_of_the_vectors_of_vse_is_its_score(pooling):
    model, image, text = described(aligner="vse++", pooling=pooling)
    images, texts = (torch.cat(search_vectors(model, side)) for side in (image, text))
    torch.testing.assert_close(images @ texts.T, model.score(image, text))
    torch.testing.assert_close(pooled_vectors(model, image), images)
    assert num_search_vectors(model.config, "captions") == 1


@pytest.mark.parametrize("aligner", ["grm", "max_mean"])
def test_pooled_vectors_are_the_mean_tokens(aligner):
    model, image, text = described(aligner=aligner)
    for side, embeds in ((image, image.patch_embeds), (text, text.word_embeds)):
        expected = torch.nn.functional.normalize(embeds.mean(1), dim=-1)
        torch.testing.assert_close(pooled_vectors(model, side), expected)
