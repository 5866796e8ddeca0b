"""The scores that a checkpoint gives to fixed inputs, in a process of its own.

    python -m granalign_hf.fixed_scores FOLDER OUT.json

With this package, as above, the checkpoint is loaded by it. Where it is missing, the code in the folder is run: so what a
stranger gets is compared with what is here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

CAPTIONS = ["a red circle above a blue square", "two dogs", "a picture of a green star, a black ring and an orange cross"]
SIZES = ((64, 48), (40, 40))  # of the pictures, in pixels


def fixed_scores(folder: str, **code: Any) -> list[list[float]]:
    """Scores of two pictures, or features of regions, with three sentences. `code`: `trust_remote_code`."""
    model = AutoModel.from_pretrained(folder, **code).eval()
    processor = AutoProcessor.from_pretrained(folder, **code)
    inputs = processor(images=_images(model, processor), text=CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.double().tolist()


def _images(model: Any, processor: Any) -> Any:
    if getattr(processor.image_processor, "reads_pictures", True):
        return [
            Image.frombytes("RGB", (w, h), bytes((i * i // 7 + 3 * i) % 256 for i in range(3 * w * h))) for w, h in SIZES
        ]
    shape = (len(SIZES), model.config.vision_config.num_boxes, model.config.vision_config.hidden_size)
    return torch.arange(float(torch.Size(shape).numel())).sin().view(shape)


if __name__ == "__main__":
    has_package = sys.modules.get("granalign_hf") is not None
    scores = fixed_scores(sys.argv[1], **({} if has_package else {"trust_remote_code": True}))
    Path(sys.argv[2]).write_text(json.dumps(scores))
