"""The published form of a checkpoint as a multi-vector encoder, by the real sentence-transformers."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repository
from PIL import Image
from test_loading import WITHOUT_PACKAGE
from tiny import region_model_and_processor, tiny_model, tiny_processor

from granalign_hf.hub import bundle

sentence_transformers = pytest.importorskip(
    "sentence_transformers", minversion="6", reason="sentence-transformers is not installed"
)

REPO = "org/granalign"
CAPTIONS = ["a red dog", "the blue cat and a square", "two green circles with a dog"]
ALIGNERS = {
    "chan": {"aligner": "chan"},
    "grm": {"use_prefix_tokens": True, "use_special_tokens": False, "special_token_ids": [0, 2, 3]},
    "vse++": {"aligner": "vse++", "pooling": "max"},
}


def pictures():
    """Of three sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((16, 16), (20, 40), (33, 17))]


def publish(folder, model, processor):
    """What is published of a checkpoint, in a folder."""
    target = folder / "bundle"
    target.mkdir()
    model.save_pretrained(folder / "run")
    processor.save_pretrained(folder / "run")
    bundle(folder / "run", target, REPO)
    return target


@pytest.fixture(scope="module", params=ALIGNERS)
def published(request, tmp_path_factory):
    """Model, processor, and the folder of what is published of them."""
    model, processor = tiny_model(**ALIGNERS[request.param]), tiny_processor()
    return model, processor, publish(tmp_path_factory.mktemp("published"), model, processor)


@pytest.fixture(scope="module")
def encoder(published):
    return sentence_transformers.MultiVectorEncoder(str(published[2]), trust_remote_code=True, device="cpu")


def best_patches(model, processor):
    """(captions, images): the mean over the words of the best patch, pair by pair."""
    with torch.no_grad():
        image = model.get_image_features(**processor(images=pictures(), return_tensors="pt"))
        texts = [model.get_text_features(**processor(text=caption, return_tensors="pt")) for caption in CAPTIONS]
    if model.config.aligner == "vse++":
        return torch.cat([model.score(image, text) for text in texts], 1).T
    rows = []
    for text in texts:
        words = text.word_embeds[0][text.word_mask[0]]
        rows.append([
            (words @ patches[mask].T).amax(1).mean() for patches, mask in zip(image.patch_embeds, image.patch_mask)
        ])  # fmt: skip
    return torch.tensor(rows)


def test_the_similarity_is_the_mean_over_the_words_of_the_best_patch(published, encoder):
    model, processor, _ = published
    queries, documents = encoder.encode_query(CAPTIONS), encoder.encode_document(pictures())
    found = encoder.similarity(queries, documents)
    torch.testing.assert_close(torch.as_tensor(found), best_patches(model, processor), atol=1e-5, rtol=0)
    if model.config.aligner == "chan":
        scores = model.score(
            model.get_image_features(**processor(images=pictures(), return_tensors="pt")),
            model.get_text_features(**processor(text=CAPTIONS, return_tensors="pt")),
        )
        torch.testing.assert_close(torch.as_tensor(found).T, scores.detach(), atol=1e-5, rtol=0)


def test_neither_batch_nor_order_matters(encoder, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, path in zip(pictures(), paths, strict=True):
        picture.save(path)
    for whole, parts in (
        (encoder.encode_query(CAPTIONS), encoder.encode_query(CAPTIONS[::-1], batch_size=1)[::-1]),
        (encoder.encode_document(pictures()), encoder.encode_document([str(path) for path in paths], batch_size=2)),
    ):
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_inputs_in_dicts(encoder):
    for encode, name, things in (
        (encoder.encode_query, "text", CAPTIONS),
        (encoder.encode_document, "image", pictures()),
    ):
        for one, other in zip(encode(things), encode([{name: thing} for thing in things]), strict=True):
            assert torch.equal(one, other) and one.shape[1] == encoder.get_embedding_dimension()


def test_features_of_regions(tmp_path):
    model, processor = region_model_and_processor(aligner="chan")
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    encoder = sentence_transformers.MultiVectorEncoder(str(publish(tmp_path, model, processor)), trust_remote_code=True)
    documents = encoder.encode_document([{"image": one} for one in features])
    with torch.no_grad():
        scores = model(**processor(images=features, text=CAPTIONS, return_tensors="pt")).logits_per_text
    torch.testing.assert_close(encoder.similarity(encoder.encode_query(CAPTIONS), documents), scores, atol=1e-5, rtol=0)


def test_a_prompt_is_refused(encoder):
    with pytest.raises(ValueError, match="trained without prompts"):
        encoder.encode_query(CAPTIONS, prompt="query: ")


LOAD = """
import sys, torch
from PIL import Image
from sentence_transformers import MultiVectorEncoder

repo, out, picture, *captions = sys.argv[1:]
encoder = MultiVectorEncoder(repo, trust_remote_code=True, device="cpu")
assert type(encoder[0].model).__module__.startswith("transformers_modules."), type(encoder[0].model)
vectors = encoder.encode_query(captions), encoder.encode_document([picture, Image.open(picture)])
encoder.save_pretrained("again")
again = MultiVectorEncoder("again", trust_remote_code=True, device="cpu")
torch.save((*vectors, encoder.similarity(*vectors), again.similarity(*vectors)), out)
"""


def test_a_stranger_loads_it_from_the_hub_and_saves_it(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    files = {path.name: path.read_bytes() for path in publish(tmp_path, model, processor).iterdir()}
    pictures()[1].save(tmp_path / "picture.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with HubServer({}) as server:
        server.repositories[REPO] = Repository(is_private=False)
        server.repositories[REPO].commit("main", "by push", files)
        server.blobs = {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        names = [REPO, "vectors.pt", "picture.png", *CAPTIONS]
        command = [sys.executable, "-c", WITHOUT_PACKAGE + LOAD, *names]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    words, patches, *scores = torch.load(tmp_path / "vectors.pt")
    with torch.no_grad():
        image = model.get_image_features(**processor(images=pictures()[1], return_tensors="pt"))
        text = model.get_text_features(**processor(text=CAPTIONS, return_tensors="pt"))
    for found, expected, mask in zip(words, text.word_embeds, text.word_mask, strict=True):
        torch.testing.assert_close(found, expected[mask], atol=1e-6, rtol=0)
    for found in patches:
        torch.testing.assert_close(found, image.patch_embeds[0], atol=1e-6, rtol=0)
    assert torch.equal(*scores) and scores[0].shape == (3, 2)
