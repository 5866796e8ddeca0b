"""What the index finds is what the model scores; what was acknowledged is there; what does not fit is refused by name."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import VISION, region_model_and_processor, tiny_model, tiny_processor
from transformers import ViTImageProcessorPil

from granalign_hf import GranAlignModel, GranAlignProcessor
from granalign_hf.explanation import align
from granalign_hf.retrieval import GranAlignIndex
from granalign_hf.tokens import TokenFormat, from_rows, to_rows
from granalign_hf.uncertainty import standard_errors

CAPTIONS = [
    "a red square",
    "the blue circle and a green dog",
    "dogs of the cat",
    "a cat on a red circle",
    "green squares",
    "the dog and the cat",
]
ALIGNERS = {
    "grm": {},
    "grm without prompts": {"aligner": "grm", "use_region_prompts": False},
    "grm without uncertainty": {"aligner": "grm", "use_region_uncertainty": False},
    "max_mean": {"aligner": "max_mean"},
    "chan": {"aligner": "chan"},
    "scan": {"aligner": "scan"},
    "laps": {"aligner": "laps"},
    "vse++ max": {"aligner": "vse++", "pooling": "max"},
    "vse++ mean": {"aligner": "vse++", "pooling": "mean"},
}


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def features(model, processor, images, captions):
    with torch.no_grad():
        image = model.get_image_features(**processor(images=images, return_tensors="pt"))
        text = model.get_text_features(**processor(text=captions, return_tensors="pt"))
    return image, text


def names(count):
    return [f"picture {n}" for n in range(count)]


def filled(path, model, processor, **options):
    """Twelve pictures whose payload has their number and whether it is even."""
    index = GranAlignIndex.create(path, model, processor, **options)
    payloads = [{"number": n, "is_even": n % 2 == 0} for n in range(12)]
    added = index.add(pictures(12), names(12), payloads, batch_size=5, is_quiet=True)
    assert (added.num_added, added.num_skipped, added.refused) == (12, 0, {})
    return index


# ------------------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize(
    ("aligner", "tokens", "atol"),
    [
        *((aligner, "float16", 2e-3) for aligner in ALIGNERS),
        *(
            (aligner, "auto", 1e-2) for aligner in ALIGNERS if aligner != "laps"
        ),  # which patches LAPS selects is all or nothing
    ],
)
def test_results_have_the_scores_of_the_model_for_images_and_captions(tmp_path, aligner, tokens, atol):
    model, processor = tiny_model(**ALIGNERS[aligner]), tiny_processor()
    scores = model.score(*features(model, processor, pictures(12), CAPTIONS))
    with filled(tmp_path / "images", model, processor, engine="torch", tokens=tokens) as index:
        for number, caption in enumerate(CAPTIONS):
            for exact in (False, True):
                found = index.search(text=caption, top_k=12, exact=exact)
                own = {result.id: result.score for result in found}
                np.testing.assert_allclose([own[name] for name in names(12)], scores[:, number], atol=atol)
                assert [result.score for result in found] == sorted(own.values(), reverse=True)
                assert all(result.payload["number"] == int(result.id.split()[1]) for result in found)
    options = {"contents": "captions", "engine": "torch", "tokens": tokens}
    with GranAlignIndex.create(tmp_path / "captions", model, processor, **options) as index:
        index.add(CAPTIONS, is_quiet=True)
        own = {result.id: result.score for result in index.search(image=pictures(12)[3])}
        np.testing.assert_allclose([own[caption] for caption in CAPTIONS], scores[3], atol=atol)


def test_edge_finds_what_brute_force_finds(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    with (
        filled(tmp_path / "edge", model, processor) as edge,
        filled(tmp_path / "torch", model, processor, engine="torch") as torch_,
    ):
        for caption in CAPTIONS:
            one, other = (index.search(text=caption, top_k=5, candidates=6) for index in (edge, torch_))
            assert [(result.id, result.score) for result in one] == [(result.id, result.score) for result in other]


def test_the_first_stage_chooses_and_the_second_ranks(tmp_path):
    """Without tokens the order is that of the regions; with them, of its first four by the score."""
    model, processor = tiny_model(), tiny_processor()
    image, text = features(model, processor, pictures(12), CAPTIONS[:1])
    words = (text.word_embeds * text.word_saliency[..., None])[0]
    regions = torch.nn.functional.normalize(image.region_embeds, dim=-1)
    first = torch.einsum("wd,ikd->iwk", words, regions).amax(2).mean(1)
    with filled(tmp_path / "regions", model, processor, engine="torch", tokens=None) as index:
        found = index.search(text=CAPTIONS[0], top_k=12)
        order = [int(result.id.split()[1]) for result in found]
        np.testing.assert_allclose([result.score for result in found], first[order], atol=2e-3)
        assert [result.score for result in found] == sorted([result.score for result in found], reverse=True)
        assert found[0].standard_error is None
        with pytest.raises(ValueError, match="`exact` needs tokens"):
            index.search(text=CAPTIONS[0], exact=True)
    with filled(tmp_path / "tokens", model, processor, engine="torch") as index:
        four = [int(result.id.split()[1]) for result in index.search(text=CAPTIONS[0], top_k=4, candidates=4)]
    scores = model.score(image, text)[:, 0]
    assert four == sorted(order[:4], key=lambda n: -scores[n])


def test_results_have_standard_errors_and_answer_sets(tmp_path):
    model, processor = tiny_model(conformal_thresholds=[0.01, 0.004], logit_scale=7.0), tiny_processor()
    image, text = features(model, processor, pictures(12), CAPTIONS[:1])
    errors, scores = standard_errors(model, image, text)[:, 0], model.score(image, text)[:, 0]
    with filled(tmp_path / "i", model, processor, engine="torch") as index:
        found = index.search(text=CAPTIONS[0], top_k=12)
    for result in found:
        number = result.payload["number"]
        assert result.standard_error == pytest.approx(errors[number].item(), rel=1e-2)
        assert result.is_in_answer_set == (result.score >= found[0].score - 0.004)
    assert 1 <= sum(result.is_in_answer_set for result in found) < 12
    assert scores[found[0].payload["number"]] == pytest.approx(scores.max().item(), abs=2e-3)


def test_word_maps_are_those_of_an_alignment(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    with filled(tmp_path / "i", model, processor, engine="torch", tokens="float16") as index:
        results = index.search(text=CAPTIONS[1], top_k=2, has_word_maps=True)
    for result in results:
        alignment = align(model, processor, pictures(12)[result.payload["number"]], CAPTIONS[1])
        assert [word for word, _ in result.word_maps] == [word.text for word in alignment.words]
        for (_, own), word in zip(result.word_maps, alignment.words):
            torch.testing.assert_close(own, word.map, atol=2e-3, rtol=0)


def test_filters_hold_in_both_stages(tmp_path):
    with filled(tmp_path / "i", tiny_model(), tiny_processor()) as index:
        for exact in (False, True):
            found = index.search(text=CAPTIONS[0], top_k=12, where={"is_even": True, "number": [0, 1, 2]}, exact=exact)
            assert sorted(result.id for result in found) == ["picture 0", "picture 2"]
            assert index.search(text=CAPTIONS[0], where={"number": "0"}, exact=exact) == []
        with pytest.raises(ValueError, match="`where`"):
            index.search(text=CAPTIONS[0], where={"number": {"$gt": 0}})


def test_a_query_that_does_not_fit_is_refused(tmp_path):
    with filled(tmp_path / "i", tiny_model(), tiny_processor(), engine="torch") as index:
        for query in ({}, {"image": pictures(1)[0]}, {"text": "a dog", "image": pictures(1)[0]}):
            with pytest.raises(ValueError, match="searched with `text`"):
                index.search(**query)
        with pytest.raises(ValueError, match="`top_k` and `candidates` must be at least 1, got 0"):
            index.search(text="a dog", top_k=0)


# ---------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_int8_tokens_are_close_and_half_as_large(aligner):
    model, processor = tiny_model(projection_dim=64, **ALIGNERS[aligner]), tiny_processor()
    image, text = features(model, processor, pictures(6), CAPTIONS)
    rows = {dtype: to_rows(image, TokenFormat(dtype)) for dtype in ("float16", "int8")}
    embeds = rows["float16"]["patch_embeds"].nbytes
    assert rows["float16"].nbytes - rows["int8"].nbytes == embeds / 2 - rows["int8"]["patch_embeds_scale"].nbytes
    scores = model.score(image, text)
    torch.testing.assert_close(model.score(from_rows(rows["float16"]), text), scores, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.score(from_rows(rows["int8"]), text), scores, atol=1e-2, rtol=0)
    words = from_rows(to_rows(text, TokenFormat("int8")))
    torch.testing.assert_close(model.score(image, words), scores, atol=1e-2, rtol=0)


def test_the_most_salient_patches_are_kept():
    model, processor = tiny_model(), tiny_processor()
    image, text = features(model, processor, pictures(6), CAPTIONS)
    kept = from_rows(to_rows(image, TokenFormat(max_patches=4)))
    order = image.patch_saliency.argsort(dim=1, descending=True)
    masked = image.patch_mask.clone().scatter(1, order[:, 4:], False)
    image.patch_mask = masked
    torch.testing.assert_close(model.score(kept, text), model.score(image, text), atol=2e-3, rtol=0)
    image.region_log_vars = image.region_log_vars.clone()
    torch.testing.assert_close(standard_errors(model, kept, text), standard_errors(model, image, text), rtol=1e-2, atol=0)


def test_what_cannot_be_stored_is_refused():
    model, processor = tiny_model(aligner="chan"), tiny_processor()
    image, _ = features(model, processor, pictures(2), CAPTIONS)
    with pytest.raises(ValueError, match="`max_patches` keeps the most salient patches"):
        to_rows(image, TokenFormat(max_patches=4))
    with pytest.raises(ValueError, match="`tokens` must be"):
        TokenFormat("float32")
    image.patch_embeds = image.patch_embeds * torch.nan
    for dtype in ("float16", "int8"):
        with pytest.raises(ValueError, match="`patch_embeds` does not fit float16"):
            to_rows(image, TokenFormat(dtype))


# --------------------------------------------------------------------------------------------------------------- writing


def test_what_is_in_is_skipped_and_what_cannot_be_read_is_named(tmp_path):
    for n, picture in enumerate(pictures(6)):
        picture.save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    paths = [tmp_path / f"{n}.png" for n in range(7)]  # the last is missing
    payloads = [{"n": n} for n in range(7)]
    payloads[4] = {"n": float("nan")}
    model, processor = tiny_model(), tiny_processor()
    with GranAlignIndex.create(tmp_path / "i", model, processor) as index:
        first = index.add([*paths, paths[0]], payloads=[*payloads, {}], batch_size=3, is_quiet=True)
        assert first.num_added == len(index) == 4
        assert set(first.refused) == {str(paths[n]) for n in (0, 3, 4, 6)}
        assert "came before" in first.refused[str(paths[0])]
        assert "cannot be read" in first.refused[str(paths[3])]
        assert "what JSON can hold, got {'n': nan}" in first.refused[str(paths[4])]
        pictures(1, seed=5)[0].save(paths[3])
        again = index.add(paths, batch_size=3, is_quiet=True)
        assert (again.num_added, again.num_skipped, set(again.refused)) == (2, 4, {str(paths[6])})
        assert {result.payload.get("n") for result in index.search(text="a dog")} == {0, 1, 2, 5, None}
        assert index.verify() == []


def test_one_that_does_not_fit_costs_its_batch_nothing(tmp_path):
    """Names that are not UTF-8, which file systems know, and features of another shape than those of the model."""
    bad = "caf\udce9.png"
    with GranAlignIndex.create(tmp_path / "i", tiny_model(), tiny_processor()) as index:
        added = index.add(pictures(3), ["a", bad, "c"], [{}, {}, {"path": bad}], is_quiet=True)
        assert (added.num_added, set(added.refused)) == (1, {bad, "c"})
        assert "that UTF-8 can hold" in added.refused[bad] and "what JSON can hold" in added.refused["c"]
    model, processor = region_model_and_processor(aligner="chan")
    boxes = [np.zeros((4, 6), np.float32), np.zeros((4, 7), np.float32), np.ones((4, 6), np.float32)]
    with GranAlignIndex.create(tmp_path / "j", model, processor, engine="torch") as index:
        added = index.add(boxes, list("abc"), is_quiet=True)
        assert (added.num_added, set(added.refused)) == (2, {"b"}) and set(index.get(list("abc"))) == {"a", "c"}


def test_columns_of_a_data_set_are_read_one_by_one(tmp_path):
    files = []
    for n, picture in enumerate(pictures(4)):
        picture.save(tmp_path / f"{n}.png")
        files.append({"path": None, "bytes": (tmp_path / f"{n}.png").read_bytes() if n != 2 else b"broken"})
    table = Dataset.from_dict(
        {"image": files, "name": list("abcd")}, features=Features({"image": ImageFeature(), "name": Value("string")})
    )
    with GranAlignIndex.create(tmp_path / "i", tiny_model(), tiny_processor(), engine="torch") as index:
        added = index.add(table["image"], table["name"], is_quiet=True)
        assert (added.num_added, list(added.refused)) == (3, ["c"])
        with pytest.raises(ValueError, match="`ids` must be given"):
            index.add(table["image"])


def test_features_of_regions_are_indexed(tmp_path):
    model, processor = region_model_and_processor(aligner="chan")
    boxes = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    with GranAlignIndex.create(tmp_path / "i", model, processor, engine="torch") as index:
        added = index.add([*boxes, np.full((4, 6), np.nan)], list("abcd"), is_quiet=True)
        assert added.num_added == 3 and "finite" in added.refused["d"]
        assert len(index.search(text="a dog")) == 3


def test_wrong_lengths_ids_and_captions_are_refused(tmp_path):
    with GranAlignIndex.create(tmp_path / "i", tiny_model(), tiny_processor(), contents="captions", engine="torch") as index:
        with pytest.raises(ValueError, match="must have the same length, got 2, 1 and 1"):
            index.add(["a dog", "a cat"], ["x"])
        for batch_size in (0, -1):
            with pytest.raises(ValueError, match=f"`batch_size` must be at least 1, got {batch_size}"):
                index.add(["a dog"], batch_size=batch_size)
        ids = [1, "x", "", "y", ["z"]]
        added = index.add(["a dog", " ", "a cat", "a cat", "a dog"], ids, [{}, {}, {}, [], {}], is_quiet=True)
        assert added.num_added == 0 and list(added.refused) == ["1", "x", "", "y", "['z']"]


def test_update_replaces_and_delete_forgets(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    other = pictures(1, seed=9)
    score = model.score(*features(model, processor, other, CAPTIONS[:1])).item()
    with filled(tmp_path / "i", model, processor) as index:
        updated = index.update(other * 2, ["picture 7", "unknown"])
        assert updated.num_added == 1 and list(updated.refused) == ["unknown"]
        found = {result.id: result for result in index.search(text=CAPTIONS[0], top_k=20)}
        assert found["picture 7"].score == pytest.approx(score, abs=2e-3)
        assert found["picture 7"].payload == {"number": 7, "is_even": False}
        assert index.delete(["picture 7", "picture 8", "unknown"]) == 2
        assert len(index) == 10
        assert not {"picture 7", "picture 8"} & {result.id for result in index.search(text=CAPTIONS[0], top_k=20)}
    with GranAlignIndex.open(tmp_path / "i", model, processor) as index:
        assert len(index) == 10
        with pytest.raises(ValueError, match="open for reading"):
            index.delete(["picture 1"])


def test_tokens_that_changed_are_found(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    with filled(tmp_path / "i", model, processor) as index:
        stats = index.stats()
        (shard,) = (tmp_path / "i" / "tokens").glob("*.bin")
        row = stats["token_bytes"] // 12
        assert stats["num_items"] == 12 and shard.stat().st_size == stats["token_bytes"] == 12 * row
        with open(shard, "r+b") as file:
            file.seek(4 * row + 10)
            file.write(b"\x01\x02\x03")
        assert index.verify() == ["picture 4"]


# --------------------------------------------------------------------------------------------------- models and processes


def test_another_model_or_preprocessing_is_refused_by_name(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    filled(tmp_path / "i", model, processor).close()
    darker = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4] * 3)
    others = [
        ("weights", tiny_model(seed=1), processor),
        ("config", tiny_model(level_weights=[0.3, 0.4, 0.3]), processor),
        ("image preprocessing", model, GranAlignProcessor(darker, processor.tokenizer)),
        ("tokenizer", model, tiny_processor(do_lower_case=False)),
        ("weights, config", tiny_model(VISION["deit"]().config), processor),
    ]
    for name, *other in others:
        with pytest.raises(ValueError, match=f"built with another model: {name} differ"):
            GranAlignIndex.open(tmp_path / "i", *other)
    with pytest.raises(ValueError, match="training mode"):
        GranAlignIndex.open(tmp_path / "i", tiny_model().train(), processor)
    GranAlignIndex.open(
        tmp_path / "i", tiny_model(kl_weight=0.5, margin=0.1), processor
    ).close()  # what training alone reads


def test_a_checkpoint_saved_and_calibrated_is_the_same_model(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    filled(tmp_path / "i", model, processor).close()
    model.config.logit_scale, model.config.conformal_thresholds = 20.0, [0.1, 0.2]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = GranAlignModel.from_pretrained(tmp_path / "model"), GranAlignProcessor.from_pretrained(tmp_path / "model")
    with GranAlignIndex.open(tmp_path / "i", *loaded) as index:
        assert index.search(text="a dog")[0].is_in_answer_set


def test_one_writer_and_many_readers(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    with filled(tmp_path / "i", model, processor) as writer:
        with pytest.raises(BlockingIOError, match="open for writing elsewhere"):
            GranAlignIndex.open(tmp_path / "i", model, processor, mode="a")
        with GranAlignIndex.open(tmp_path / "i", model, processor) as early:
            with pytest.raises(ValueError, match="is open for reading"):
                early.publish()
            writer.publish()
            with GranAlignIndex.open(tmp_path / "i", model, processor) as late:
                assert (len(early), len(late)) == (0, 12)
                writer.delete(["picture 3"])
                assert len(late.search(text="a dog", top_k=20, exact=True)) == 12
    with GranAlignIndex.open(tmp_path / "i", model, processor, mode="a") as index:
        assert len(index) == 11


def test_tokens_elsewhere_are_those_of_one_index(tmp_path):
    """Found where they are named, and never taken from another place: rows there would be scores of other pictures."""
    parts, (own, other, index) = (tiny_model(), tiny_processor()), (tmp_path / name for name in ("own", "other", "i"))
    filled(index, *parts, token_folder=own).close()
    filled(tmp_path / "j", *parts, token_folder=other).close()
    for place in (None, other, tmp_path / "nowhere"):
        for mode in ("r", "a"):
            with pytest.raises(ValueError, match="Name the folder that they are in as `token_folder`"):
                GranAlignIndex.open(index, *parts, mode, token_folder=place)
    assert not (tmp_path / "nowhere").exists() and not (index / "tokens").exists()
    with pytest.raises(ValueError, match="has the tokens of another index"):
        GranAlignIndex.create(tmp_path / "k", *parts, token_folder=own)
    with GranAlignIndex.open(index, *parts, "a", token_folder=own) as opened:
        opened.add(pictures(1, seed=1), ["one more"], is_quiet=True)
        assert len(opened) == 13 and opened.verify() == []


def test_places_and_arguments_that_do_not_fit_are_refused(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    filled(tmp_path / "i", model, processor, engine="torch").close()
    cases = [
        ("has other things in it", lambda: GranAlignIndex.create(tmp_path, model, processor)),
        (
            "only the aligner",
            lambda: GranAlignIndex.create(tmp_path / "k", tiny_model(aligner="chan"), processor, max_patches=4),
        ),
        (
            "name it as `token_folder`",
            lambda: GranAlignIndex.create("http://localhost:1/c", model, processor, tokens="int8"),
        ),
        ("is an index already", lambda: GranAlignIndex.create(tmp_path / "i", model, processor)),
        ("`contents` must be", lambda: GranAlignIndex.create(tmp_path / "j", model, processor, contents="videos")),
        ("`engine` must be", lambda: GranAlignIndex.create(tmp_path / "j", model, processor, engine="faiss")),
        ("`tokens` must be", lambda: GranAlignIndex.create(tmp_path / "j", model, processor, tokens="int4")),
        ("options of a collection", lambda: GranAlignIndex.create(tmp_path / "j", model, processor, shard_number=2)),
        ("There is no index", lambda: GranAlignIndex.open(tmp_path / "j", model, processor)),
        ("`mode` must be", lambda: GranAlignIndex.open(tmp_path / "i", model, processor, mode="w")),
        ("http://HOST:PORT/COLLECTION", lambda: GranAlignIndex.create("http://localhost:1", model, processor)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "j").exists()


def picture_files(folder, count):
    paths = [folder / f"{n:03d}.png" for n in range(count)]
    for path, picture in zip(paths, pictures(count)):
        picture.save(path)
    return paths


def add_and_acknowledge(folder, model, processor, paths, acknowledged):
    """In a child: four pictures after the other, in batches of two; each four written down once `add` has returned."""
    index = GranAlignIndex.open(folder, model, processor, mode="a")
    for start in range(0, len(paths), 4):
        index.add(paths[start : start + 4], batch_size=2, is_quiet=True)
        with open(acknowledged, "a") as file:
            file.writelines(f"{path}\n" for path in paths[start : start + 4])


def kill_at_random(folder, num_kills):
    """In a process that has all libraries loaded, so that a fork is at work at once."""
    model, processor = tiny_model(), tiny_processor()
    paths, rng = picture_files(folder, 400), random.Random(0)
    GranAlignIndex.create(folder / "i", model, processor).close()
    for _ in range(num_kills):
        child = os.fork()
        if child == 0:
            add_and_acknowledge(folder / "i", model, processor, paths, folder / "acknowledged")
            os._exit(0)
        time.sleep(rng.uniform(0.05, 1.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def read_while_written(folder, seconds):
    """Two children open, search and close, again and again; how many pictures they found becomes a file each."""
    model, processor = tiny_model(), tiny_processor()
    paths = picture_files(folder, 60)
    GranAlignIndex.create(folder / "i", model, processor).close()
    end = time.monotonic() + seconds
    readers = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            sizes = []
            while time.monotonic() < end:
                with GranAlignIndex.open(folder / "i", model, processor) as index:
                    sizes.append(len(index.search(text="a dog", top_k=100)))
            (folder / f"sizes-{number}.json").write_text(json.dumps(sizes))
            os._exit(0)
        readers.append(child)
    with GranAlignIndex.open(folder / "i", model, processor, mode="a") as writer:
        for start in range(0, 60, 10):
            writer.add(paths[start : start + 10], is_quiet=True)
            writer.publish()
            time.sleep(seconds / 10)
    assert all(os.waitpid(reader, 0)[1] == 0 for reader in readers)


@pytest.fixture(scope="module")
def after_processes(tmp_path_factory):
    """The folders after what processes did to them, one process for both, since it takes long to load what they need."""
    killed, read = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("read")
    process = multiprocessing.get_context("spawn").Process(target=fork_and_kill, args=(killed, read))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    return killed, read


def fork_and_kill(killed, read):
    torch.set_num_threads(1)
    kill_at_random(killed, 10)
    read_while_written(read, 5)


def test_what_was_acknowledged_outlives_kills(after_processes):
    tmp_path, _ = after_processes
    acknowledged = set((tmp_path / "acknowledged").read_text().split())
    model, processor = tiny_model(), tiny_processor()
    with GranAlignIndex.open(tmp_path / "i", model, processor) as reader:  # publishes what the last one could not
        present = {item.id for item in reader.engine.scan()}
        assert acknowledged and acknowledged <= present and reader.verify() == []
        found = {result.id: result.score for result in reader.search(text="a dog", top_k=len(present), exact=True)}
    chosen = sorted(present)
    scores = model.score(*features(model, processor, [Image.open(path) for path in chosen], ["a dog"]))[:, 0]
    np.testing.assert_allclose([found[path] for path in chosen], scores, atol=2e-3)
    with GranAlignIndex.open(tmp_path / "i", model, processor, mode="a") as writer:
        added = writer.add(sorted(tmp_path.glob("*.png")), is_quiet=True)
        assert (added.num_skipped, len(writer)) == (len(present), 400)


def test_two_processes_read_while_one_writes(after_processes):
    _, folder = after_processes
    sizes = [json.loads((folder / f"sizes-{number}.json").read_text()) for number in range(2)]
    for own in sizes:
        assert own == sorted(own) and len(set(own)) > 1 and set(own) <= {0, 10, 20, 30, 40, 50, 60}
