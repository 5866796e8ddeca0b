"""Image-text retrieval recall as a module of the `evaluate` library: `evaluate.load("<path>/image_text_recall.py")`.

The numbers are those of `evaluation.retrieval_metrics`; `evaluate` copies that file along by the relative import, so
the metric also loads where this package is not installed.
"""

import datasets
import evaluate
import numpy as np

from .evaluation import fold_metrics

_DESCRIPTION = """
Recall at 1, 5 and 10 of image-to-text and text-to-image retrieval, their sum (rsum), and the median ranks. An image
may have any number of captions. The rank of an image is that of its best own caption; ties count against the model.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each image the list of its scores with every caption of the gallery, higher is better.
    references: for each image the list of the indices of its own captions in that list. Every caption belongs to
        exactly one image, every image has at least one.
    num_folds: mean over this many consecutive folds of images, each a gallery of its own (MS-COCO 1K: 5). Default 1.
Returns:
    image_to_text_r1, image_to_text_r5, image_to_text_r10, text_to_image_r1, text_to_image_r5, text_to_image_r10 in
    percent, rsum in [0, 600], image_to_text_median_rank, text_to_image_median_rank.
Examples:
    >>> recall = evaluate.load("image_text_recall.py")
    >>> result = recall.compute(predictions=[[0.9, 0.8, 0.1], [0.2, 0.3, 0.7]], references=[[0, 1], [2]])
    >>> result["rsum"]
    600.0
"""

_CITATION = """
@inproceedings{faghri2018vse++,
  title={VSE++: Improving Visual-Semantic Embeddings with Hard Negatives},
  author={Faghri, Fartash and Fleet, David J. and Kiros, Jamie Ryan and Fidler, Sanja},
  booktitle={BMVC},
  year={2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ImageTextRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # float64: narrower scores keep their ties, wider ones gain none.
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
        )

    def _compute(self, predictions, references, num_folds: int = 1) -> dict[str, float]:
        num_captions = len(predictions[0])
        lengths = {len(row) for row in predictions}
        if len(lengths) > 1:
            raise ValueError(
                "`predictions` must score every caption of the gallery for each image, got lists of "
                f"{min(lengths)} to {max(lengths)} scores."
            )
        return fold_metrics(predictions, _caption_image_index(references, num_captions), num_folds)


def _caption_image_index(references, num_captions: int) -> np.ndarray:
    """Captions of each image -> image of each caption, (num_captions,)."""
    captions = np.concatenate([np.asarray(own, dtype=np.int64) for own in references])
    if not np.array_equal(np.sort(captions), np.arange(num_captions)):
        raise ValueError(
            f"`references` must name each of the {num_captions} captions 0 to {num_captions - 1} exactly once, one "
            f"list for each image; got {len(captions)} captions, {len(np.unique(captions))} of them different."
        )
    index = np.empty(num_captions, dtype=np.int64)
    index[captions] = np.repeat(np.arange(len(references)), [len(own) for own in references])
    return index
