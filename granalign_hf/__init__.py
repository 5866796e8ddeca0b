"""granalign: fine-grained image-text alignment for Transformers. Importing it registers the Auto classes and pipelines."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_granalign import GranAlignConfig
from .modeling.modeling_granalign import (
    GranAlignImageOutput,
    GranAlignModel,
    GranAlignOutput,
    GranAlignPreTrainedModel,
    GranAlignTextOutput,
)
from .modeling.pipelines import PIPELINES
from .modeling.processing_granalign import GranAlignProcessor
from .modeling.region_features import RegionFeaturesProcessor
from .modeling.similarity import token_similarity

__version__ = "0.1.0"

AutoConfig.register("granalign", GranAlignConfig, exist_ok=True)
AutoModel.register(GranAlignConfig, GranAlignModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(GranAlignConfig, GranAlignModel, exist_ok=True)
AutoProcessor.register(GranAlignConfig, GranAlignProcessor, exist_ok=True)
for _task, _pipeline in PIPELINES.items():
    PIPELINE_REGISTRY.register_pipeline(_task, _pipeline, pt_model=AutoModel, type="multimodal")

# Saved checkpoints carry this code, so that they load where the package is not installed.
GranAlignConfig.register_for_auto_class()
GranAlignModel.register_for_auto_class("AutoModel")
GranAlignProcessor.register_for_auto_class("AutoProcessor")
RegionFeaturesProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "GranAlignConfig",
    "GranAlignImageOutput",
    "GranAlignModel",
    "GranAlignOutput",
    "GranAlignPreTrainedModel",
    "GranAlignProcessor",
    "GranAlignTextOutput",
    "token_similarity",
]
