"""Run settings: a recipe file plus `--field value` overrides, both checked by the same parser."""

import dataclasses
import difflib
import json
import shlex
import sys
from dataclasses import dataclass, field, make_dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml
from accelerate.tracking import get_available_trackers
from transformers import HfArgumentParser

from granalign_hf.modeling.configuration_granalign import GranAlignConfig

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "demo-scenes.yaml"
# Of those in Transformers the ones that need no further numbers and no metric.
SCHEDULERS = (
    *("multistep", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    "inverse_sqrt",
)


def setting(default, description: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": description})
    return field(default=default, metadata={"help": description})


@dataclass
class RunArguments:
    """Everything of a run that is not a field of the model's config."""

    dataset: str = setting("scenes", "Hub name or folder of a data set; `scenes` draws one.")
    dataset_config: str | None = setting(None, "Configuration of the data set, where it has several.")
    train_split: str = setting("train", "Split to train on.")
    validation_split: str = setting("validation", "Split that selects the best epoch.")
    image_column: str | None = setting(None, "Column of the image. Default: the first image column.")
    caption_column: str | None = setting(None, "Column of the caption or captions. Default: found by name.")
    image_id_column: str | None = setting(None, "Column that names the image. Default: found by name.")
    max_train_images: int | None = setting(None, "Train on the first images only.")
    max_eval_images: int | None = setting(None, "Validate on the first images only.")
    num_scenes: int = setting(4000, "Number of training scenes, where `dataset` is `scenes`.")

    checkpoint: str | None = setting(None, "Start from this GranAlign checkpoint; names its encoders and its new layers.")
    vision_encoder: str | None = setting(None, "Hub name, folder, or `package:NAME/FOLDER` of an installed package.")
    text_encoder: str | None = setting(None, "Likewise.")
    vision_config: str | None = setting(
        None, "Config of a vision encoder to train from scratch (JSON; a mapping in a recipe)."
    )
    text_config: str | None = setting(None, "Config of a text encoder to train from scratch (JSON; a mapping in a recipe).")
    freeze_encoders: bool = setting(False, "Train projections and aligner only, on cached features.")

    output_dir: str = setting("runs/demo-scenes", "Folder of the checkpoint, metrics and logs.")
    seed: int = setting(0, "Seed of weights, order, noise and augmentation.")
    epochs: int = setting(30, "Passes over the training images.")
    batch_size: int = setting(128, "Images per process and step.")
    captions_per_image: int = setting(1, "Captions drawn for each image of a batch; 0 takes all.")
    learning_rate: float = setting(2e-4, "Learning rate of projections and aligner.")
    encoder_lr_factor: float = setting(0.1, "Factor on the learning rate for the encoders.")
    lr_scheduler: str = setting("multistep", f"One of {', '.join(SCHEDULERS)}; all but the first as in Transformers.")
    lr_milestones: list[int] = setting([9, 15, 20, 25], "Epochs after which `multistep` lowers the learning rate.")
    lr_gamma: float = setting(0.3, "Factor of each `multistep` drop.")
    lr_warmup_share: float = setting(0.0, "Share of the steps that the other schedulers warm up for.")
    weight_decay: float = setting(1e-4, "Weight decay of matrices.")
    max_grad_norm: float = setting(2.0, "Gradient norm above which gradients are scaled down.")
    warmup_epochs: int = setting(1, "Epochs over all negatives before hardest negatives.")
    crop_scale: float = setting(0.6, "Smallest share of an image that a random crop keeps; 1 switches crop and flip off.")
    caption_augmentation: float = setting(0.2, "Share of the caption tokens that are masked, replaced or deleted.")

    mixed_precision: str = setting("no", "`no`, `bf16` or `fp16`.")
    matmul_precision: str = setting("highest", "float32 products: `highest`, `high` or `medium` (see torch).")
    num_workers: int = setting(0, "Processes that load data.")
    eval_batch_size: int = setting(64, "Images per step in validation.")
    eval_interval: int = setting(1, "Epochs between validations.")
    report_to: str = setting("tensorboard", "An installed tracker that Accelerate knows, or `none`.")
    resume: bool = setting(False, "Go on from the last complete epoch in `output_dir`.")
    notes: list[str] = setting([], "Sentences for the card: what a reader of the figures must know.")
    data_notes: list[str] = setting([], "Sentences for the card about the data, its licence above all.")


def _model_arguments() -> type:
    """A dataclass of the fields that GranAlignConfig adds, so that every one of them is a run setting too.

    They are None unless given, so that those not named stay as GranAlignConfig, or the checkpoint, has them.
    """
    fields = []
    for name in GranAlignConfig.__annotations__:
        default = getattr(GranAlignConfig, name)
        if default is None:  # encoders, and what follows from them
            continue
        kind = list[float] if isinstance(default, tuple) else type(default)
        fields.append((name, kind | None, setting(None, f"See GranAlignConfig; {default} there.")))
    return make_dataclass("ModelArguments", fields)


ModelArguments = _model_arguments()


def parse_arguments(argv: list[str] | None = None) -> tuple[RunArguments, dict, str]:
    """`[RECIPE.yaml] [--field value ...]` -> run settings, the named fields of GranAlignConfig, and the command as typed.

    Raises:
        SystemExit: a field that does not exist or a value of the wrong type; the message names them all.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    has_recipe = bool(argv) and not argv[0].startswith("--")
    recipe = Path(argv[0]) if has_recipe else DEFAULT_RECIPE
    overrides = argv[has_recipe:]
    parser = HfArgumentParser((RunArguments, ModelArguments), description="Trains a GranAlign model.", allow_abbrev=False)
    words = _recipe_words(recipe, parser) + overrides
    run, model, unknown = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        parser.error(_unknown_message([word for word in unknown if word.startswith("--")] or unknown, "on the command line"))
    problems = _problems(run)
    if problems:
        parser.error("; ".join(problems))
    fields = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    return run, fields, shlex.join(["accelerate", "launch", "training/train.py", *argv])


def _recipe_words(recipe: Path, parser: HfArgumentParser) -> list[str]:
    """The recipe as command-line words, so that both go through the same checks."""
    if not recipe.is_file():
        parser.error(f"the recipe {recipe} does not exist")
    settings = yaml.safe_load(recipe.read_text()) or {}
    known = set(_field_names())
    unknown = [f"--{name}" for name in settings if name not in known]
    if unknown:
        parser.error(_unknown_message(unknown, f"in {recipe}"))
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words


def _field_names() -> list[str]:
    return [f.name for kind in (RunArguments, ModelArguments) for f in dataclasses.fields(kind)]


def _unknown_message(unknown: list[str], where: str) -> str:
    hints = []
    for word in unknown:
        close = difflib.get_close_matches(word.lstrip("-"), _field_names(), n=1)
        hints.append(f"{word.lstrip('-')}" + (f" (did you mean {close[0]}?)" if close else ""))
    return f"unknown fields {where}: {', '.join(hints)}"


def _problems(run: RunArguments) -> list[str]:
    """What no run could do, all at once."""
    problems = []
    for side in ("vision", "text"):
        given = [getattr(run, f"{side}_{kind}") is not None for kind in ("encoder", "config")]
        if sum(given) != (run.checkpoint is None):
            problems.append(f"give one of {side}_encoder (pretrained) and {side}_config (from scratch), or a checkpoint")
    for name in ("epochs", "batch_size", "eval_interval", "eval_batch_size", "num_scenes"):
        if getattr(run, name) < 1:
            problems.append(f"{name} must be at least 1, got {getattr(run, name)}")
    if not 0 < run.crop_scale <= 1:
        problems.append(f"crop_scale must lie in (0, 1], got {run.crop_scale}")
    if not 0 <= run.caption_augmentation < 1:
        problems.append(f"caption_augmentation must lie in [0, 1), got {run.caption_augmentation}")
    if run.freeze_encoders and (run.crop_scale != 1 or run.caption_augmentation != 0):
        problems.append(
            "freeze_encoders trains on stored features, which cannot change: set crop_scale 1 and caption_augmentation 0"
        )
    if run.captions_per_image < 0:
        problems.append(f"captions_per_image must be at least 0, got {run.captions_per_image}")
    trackers = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name, known in (
        ("matmul_precision", ("highest", "high", "medium")),
        ("mixed_precision", ("no", "bf16", "fp16")),
        ("lr_scheduler", SCHEDULERS),
        ("report_to", ("none", *trackers)),
    ):
        if getattr(run, name) not in known:
            problems.append(f"{name} must be one of {', '.join(known)}, got {getattr(run, name)}")
    return problems


def resolve(name_or_path: str) -> str:
    """`package:NAME/FOLDER` -> the folder inside an installed Python package; anything else unchanged.

    Raises:
        ValueError: the package is not installed.
    """
    if not name_or_path.startswith("package:"):
        return name_or_path
    package, _, folder = name_or_path.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"`{name_or_path}` needs the Python package {package}. Install it with pip.")
    return str(Path(spec.submodule_search_locations[0]) / folder)
