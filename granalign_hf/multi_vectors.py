"""A checkpoint as a multi-vector encoder of sentence-transformers (version 6); it lies in the folder of a checkpoint, which
needs `modules.json` beside it.

A sentence is the vectors of its words, a picture those of its patches, and their similarity the mean over the words of the
best patch: the score of CHAN with mean pooling, the half of the original level of GRM that looks from words to patches. With
VSE++ both are the one vector that it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers.base.modality import infer_batch_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoModel, AutoProcessor


class MultiVectors(InputModule):
    """
    Args:
        model: a [`GranAlignModel`]. processor: its own.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @property
    def modalities(self) -> list:
        return ["text", "image"]

    def get_embedding_dimension(self) -> int:
        return self.model.config.projection_dim

    def preprocess(self, inputs: Sequence, prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """
        Sentences, or pictures, -> what the model takes.

        Args:
            inputs: strings; or PIL images, arrays and the paths and URLs of image files. Each may stand in a dict, under
                "text" or "image", and the features of regions have to: as arrays alone they would be taken for sound.

        Raises:
            ValueError: a sentence or picture that the processor refuses, or a prompt.
        """
        if prompt:
            raise ValueError(f"Captions were trained without prompts, got `prompt` {prompt!r}. Leave it out.")
        is_text = infer_batch_modality(inputs, supported_modalities=self.modalities) == "text"
        things = [next(iter(thing.values())) if isinstance(thing, dict) else thing for thing in inputs]
        return dict(self.processor(**{"text" if is_text else "images": things}, return_tensors="pt"))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings` (n, L, d) and, in the place of what the tokenizer gave, `attention_mask` (n, L)."""
        is_pooled = self.model.config.aligner == "vse++"
        aligner = self.model.aligner
        if "pixel_values" in features:
            image = self.model.get_image_features(**features)
            tokens, mask = image.patch_embeds, image.patch_mask
            pooled = aligner.pool_image(image) if is_pooled else None
        else:
            text = self.model.get_text_features(**features)
            tokens, mask = text.word_embeds, text.word_mask
            pooled = aligner.pool_text(text) if is_pooled else None
        if pooled is not None:
            tokens, mask = pooled[:, None], mask[:, :1] | True
        return {**features, "token_embeddings": tokens, "attention_mask": mask}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MultiVectors:
        where: dict[str, Any] = {"subfolder": subfolder, "token": token, "cache_dir": cache_folder, "revision": revision}
        where |= {"local_files_only": local_files_only, "trust_remote_code": kwargs.get("trust_remote_code", False)}
        model = AutoModel.from_pretrained(model_name_or_path, **where, **(kwargs.get("model_kwargs") or {}))
        return cls(model, AutoProcessor.from_pretrained(model_name_or_path, **where))
