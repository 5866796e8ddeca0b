"""The `evaluate` module, loaded from its file as a user does it, gives the numbers of `evaluation.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from granalign_hf.evaluation import fold_metrics, retrieval_metrics

pytest.importorskip("evaluate")
METRIC_FILE = Path(__file__).parents[1] / "granalign_hf" / "image_text_recall.py"

# `evaluate` reads its cache folders from the environment when it is imported, so a process of its own loads it.
PROGRAM = """
import json, sys
import evaluate
import numpy as np
cases = json.load(open(sys.argv[2], encoding="utf-8"))
recall = evaluate.load(sys.argv[1])
results = [recall.compute(**case) for case in cases]
arrays = np.array(cases[0]["predictions"], dtype=np.float32)
for start in range(0, len(arrays), 3):
    recall.add_batch(predictions=arrays[start:start + 3], references=cases[0]["references"][start:start + 3])
results.append(recall.compute())
print(json.dumps({"results": results, "package": "granalign_hf" in sys.modules, "name": recall.name}))
"""


def case(seed, num_images, max_captions):
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.repeat(np.arange(num_images), rng.integers(1, max_captions + 1, size=num_images)))
    scores = rng.integers(-4, 5, size=(num_images, len(index))) / 4  # ties, exact in float32
    return scores, index, [np.flatnonzero(index == image).tolist() for image in range(num_images)]


CASES = [case(0, 10, 4), case(1, 7, 1)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a fresh offline process prints that loads the metric with empty caches."""
    folder = tmp_path_factory.mktemp("evaluate")
    inputs = [{"predictions": scores.tolist(), "references": references} for scores, _, references in CASES]
    inputs.append({**inputs[0], "num_folds": 2})
    (folder / "cases.json").write_text(json.dumps(inputs), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_EVALUATE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [sys.executable, "-c", PROGRAM, str(METRIC_FILE), str(folder / "cases.json")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_loaded_metric_gives_the_numbers_of_evaluation(loaded, number):
    scores, index, _ = CASES[number]
    assert loaded["results"][number] == retrieval_metrics(scores, index)


def test_loaded_metric_takes_folds_and_batches_of_arrays(loaded):
    scores, index, _ = CASES[0]
    assert loaded["results"][2] == fold_metrics(scores, index, 2)
    assert loaded["results"][3] == retrieval_metrics(scores, index)


def test_loaded_metric_stands_alone(loaded):
    """The file brings `evaluation.py` along: nothing of the package is imported."""
    assert loaded["package"] is False
    assert loaded["name"] == "image_text_recall"


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [[0], [0]], "each of the 2 captions 0 to 1 exactly once.*got 2 captions, 1 of"),
        ([[1.0, 2.0], [3.0, 4.0]], [[0], [2]], "each of the 2 captions"),
        ([[1.0, 2.0], [3.0, 4.0]], [[0, 1], []], "no caption for 1 of 2 images, the first is image 1"),
        ([[1.0, 2.0], [3.0]], [[0], [1]], "`predictions` must score every caption.*lists of 1 to 2 scores"),
        ([[1.0, float("nan")], [3.0, 4.0]], [[0], [1]], r"1 NaN, the first at \(0, 1\)"),
    ],
)
def test_bad_inputs_are_refused(tmp_path, predictions, references, message):
    from granalign_hf.image_text_recall import ImageTextRecall

    recall = ImageTextRecall(cache_dir=str(tmp_path), keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        recall.compute(predictions=predictions, references=references)
