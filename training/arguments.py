"""Run settings: a recipe file plus `--field value` overrides, both checked by the same parser."""

import dataclasses
import inspect
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml
from accelerate.tracking import get_available_trackers
from huggingface_hub import get_token

from granalign_hf.hub import check_repo_id
from granalign_hf.modeling.configuration_granalign import CALIBRATED_FIELDS, GranAlignConfig
from granalign_hf.training.energy import energy_problems
from granalign_hf.training.parser import SettingsParser, as_words, choice_problems, range_problems, setting
from granalign_hf.training.problems import settle_fields

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "demo-scenes.yaml"
ABOUT = (
    "Trains a GranAlign model. What neither the recipe nor the command line names has the default below. Without a recipe "
    f"that of the demo is taken, {DEFAULT_RECIPE.name}."
)
# Of those in Transformers the ones that need no further numbers and no metric.
SCHEDULERS = (
    *("multistep", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    "inverse_sqrt",
)
PRECISIONS = ("highest", "high", "medium")
LORA_ENCODERS = ("vision", "text", "both")
SOURCES = {  # what a side of the model starts from
    "vision": ("checkpoint", "vision_encoder", "vision_config"),
    "text": ("checkpoint", "text_encoder", "text_config"),
}


@dataclass
class DataArguments:
    """A data set, and where its images and captions stand."""

    dataset: str = setting("scenes", "Hub name or folder of a data set; `scenes` draws one.")
    dataset_config: str | None = setting(None, "Configuration of the data set, where it has several.")
    split_column: str | None = setting(
        None, "Column that names the split of a row, in a data set of one table. Default: `split`, if it has the one wanted."
    )
    image_column: str | None = setting(None, "Column of the image. Default: the first image column.")
    image_folder: str | None = setting(None, "Folder of the pictures, where the data set has their file names only.")
    features_column: str | None = setting(
        None, "Column of the features of regions. Default: `features`, where there is no column of images."
    )
    caption_column: str | None = setting(None, "Column of the caption or captions. Default: found by name.")
    image_id_column: str | None = setting(None, "Column that names the image. Default: found by name.")

    @property
    def columns(self) -> dict[str, str | None]:
        """What is named of the columns, as `find_columns` takes it."""
        names = ("image_column", "image_folder", "features_column", "caption_column", "image_id_column")
        return {name: getattr(self, name) for name in names}

    @property
    def load_options(self) -> dict[str, str | None]:
        """The keyword arguments of `load_split`."""
        return {"config": self.dataset_config, "split_column": self.split_column, **self.columns}


@dataclass
class RunArguments(DataArguments):
    """Everything of a run that is not a field of the model's config."""

    train_split: str = setting("train", "Split to train on; `train+restval` joins two.")
    validation_split: str = setting("validation", "Split that selects the best epoch.")
    max_train_images: int | None = setting(None, "Train on the first images only.")
    max_eval_images: int | None = setting(None, "Validate on the first images only.")
    num_scenes: int = setting(4000, "Number of training scenes, where `dataset` is `scenes`.")
    streaming: bool = setting(
        False, "Read the training images as a stream, as their files come; the validation split is read into memory."
    )
    steps_per_epoch: int | None = setting(None, "Steps of an epoch of a stream; the next epoch goes on where it ended.")
    shuffle_buffer: int = setting(1000, "Rows that each process and worker keeps of a stream, to draw the next one from.")
    max_corrupt_share: float = setting(
        0.0,
        "Share of the training images that may be unreadable: they are named, counted and left out. Without a stream every "
        "image is read once before the first step. 0: the first that is met ends the run.",
    )

    checkpoint: str | None = setting(
        None,
        "Start from this GranAlign checkpoint. On the command line it replaces the model of the recipe, with all fields of "
        "GranAlignConfig there, unless that starts from a checkpoint too.",
    )
    vision_encoder: str | None = setting(None, "Hub name, folder, or `package:NAME/FOLDER` of an installed package.")
    text_encoder: str | None = setting(None, "Likewise.")
    vision_config: str | None = setting(
        None, "Config of a vision encoder to train from scratch (JSON; a mapping in a recipe)."
    )
    text_config: str | None = setting(None, "Config of a text encoder to train from scratch (JSON; a mapping in a recipe).")
    freeze_encoders: bool = setting(False, "Train projections and aligner only, on cached features.")
    lora_rank: int = setting(
        0, "Rank of the LoRA adapters that train in the place of the encoders' own weights; 0: the weights train."
    )
    lora_alpha: float = setting(16.0, "The adapters are multiplied by `lora_alpha` / `lora_rank`.")
    lora_encoders: str = setting(
        "both", f"Which encoders get adapters: {', '.join(LORA_ENCODERS)}. The other one is frozen."
    )

    output_dir: str = setting("runs/demo-scenes", "Folder of the checkpoint, metrics and logs.")
    seed: int = setting(0, "Seed of weights, order, noise and augmentation.")
    epochs: int = setting(30, "Passes over the training images.")
    batch_size: int = setting(128, "Images per process and step. The negatives are those of all processes.")
    micro_batch_size: int | None = setting(
        None, "Encode so many images of a batch at a time, with the gradients of the whole batch in less memory (GradCache)."
    )
    gradient_accumulation_steps: int = setting(
        1, "Steps whose gradients are averaged for one update. It adds no negatives: `micro_batch_size` does."
    )
    captions_per_image: int = setting(1, "Captions drawn for each image of a batch; 0 takes all.")
    learning_rate: float = setting(2e-4, "Learning rate of projections and aligner.")
    encoder_lr_factor: float = setting(0.1, "Factor on the learning rate for the encoders, or for their adapters.")
    layer_decay: float = setting(1.0, "Factor on the encoders' learning rate for each layer further down; 1: all the same.")
    lr_scheduler: str = setting("multistep", f"One of {', '.join(SCHEDULERS)}; all but the first as in Transformers.")
    lr_milestones: list[int] = setting([9, 15, 20, 25], "Epochs after which `multistep` lowers the learning rate.")
    lr_gamma: float = setting(0.3, "Factor of each `multistep` drop.")
    lr_warmup_share: float = setting(0.0, "Share of the steps that the other schedulers warm up for.")
    weight_decay: float = setting(1e-4, "Weight decay of matrices.")
    max_grad_norm: float = setting(2.0, "Gradient norm above which gradients are scaled down.")
    warmup_epochs: int = setting(1, "Epochs over all negatives before hardest negatives.")
    crop_scale: float = setting(
        0.6,
        "Smallest share of a picture that a random crop keeps; 1 switches crop and flip off, as features of regions need.",
    )
    caption_augmentation: float = setting(0.2, "Share of the caption tokens that are masked, replaced or deleted.")

    caption_noise: float = setting(0.0, "Share of the training captions that change places, to see what wrong pairs do.")

    mixed_precision: str = setting("no", "`no`, `bf16` or `fp16`.")
    matmul_precision: str = setting("highest", "float32 products: `highest`, `high` or `medium` (see torch).")
    num_workers: int = setting(0, "Processes that load data.")
    eval_batch_size: int = setting(64, "Images per step in validation, at most 128.")
    eval_interval: int = setting(1, "Epochs between validations.")
    report_to: list[str] = setting(
        ["tensorboard"], "Trackers that Accelerate knows and that are installed, `all` or `none`."
    )
    save_steps: int | None = setting(None, "Save a state after so many steps too, not only after each epoch.")
    total_limit: int = setting(1, "States that are kept, the last ones; the best checkpoint stays beside them.")
    resume: bool = setting(False, "Go on from the last complete state in `output_dir`; begin where there is none.")
    push_to_hub: bool = setting(False, "Push each new best checkpoint to the Hub, in the background, and at the end.")
    hub_model_id: str | None = setting(None, "Repository on the Hub, `org/name`; it is made if it does not exist.")
    hub_private_repo: bool | None = setting(
        None, "Whether a repository that is made is private. Default: what is set for `org`."
    )
    measure_energy: bool = setting(False, "Energy of the machine of the main process, as CodeCarbon estimates it.")
    emissions_country: str | None = setting(None, "Three letters of its country, such as FRA, for the CO2 of that energy.")
    notes: list[str] = setting([], "Sentences for the card: what a reader of the figures must know.")
    data_notes: list[str] = setting([], "Sentences for the card about the data, its licence above all.")


def _config_help() -> dict[str, str]:
    """Field of GranAlignConfig -> what its docstring says of it, with the type and the default there."""
    entries = re.findall(r"^    (\w[\w, ]*) \((.*)\):\n((?: {8}.*\n)+)", inspect.getdoc(GranAlignConfig) or "", flags=re.M)
    texts = {}
    for names, kind, text in entries:
        for name in names.split(", "):
            texts[name] = f"{' '.join(text.split())} ({kind.replace('`', '')})".replace("%", "%%")
    return texts


def _model_arguments() -> type:
    """A dataclass of the fields that GranAlignConfig adds, so that every one of them is a run setting too.

    They are None unless given, so that those not named stay as GranAlignConfig, or the checkpoint, has them.
    """
    fields = []
    texts = _config_help()
    for name, kind in GranAlignConfig.__annotations__.items():
        if name in ("vision_config", "text_config", *CALIBRATED_FIELDS):  # settings of the run, and what comes after it
            continue
        default = getattr(GranAlignConfig, name)
        if default is not None:  # without the further types that the config converts from
            kind = (list[float] if isinstance(default, tuple) else type(default)) | None
        fields.append((name, kind, setting(None, texts[name])))
    return make_dataclass("ModelArguments", fields)


ModelArguments = _model_arguments()


def parse_arguments(
    argv: list[str] | None = None, data_problems: Callable[[RunArguments], list[str]] = lambda run: []
) -> tuple[RunArguments, dict, str]:
    """`[RECIPE.yaml] [--field value ...]` -> run settings, the named fields of GranAlignConfig, and the command as typed.

    Args:
        data_problems: what is wrong with the data set, which is told together with the rest.

    Raises:
        SystemExit: a field that does not exist or has no effect, a value of the wrong type or out of range, settings that
            exclude each other; the message names them all.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    has_recipe = bool(argv) and not argv[0].startswith("--")
    path = Path(argv[0]) if has_recipe else DEFAULT_RECIPE
    overrides = argv[has_recipe:]
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")}
    parser = SettingsParser((RunArguments, ModelArguments), description=ABOUT)
    recipe, problems = _read_recipe(path, parser)
    words = as_words(_without_replaced_model(recipe, given)) + overrides
    run, model, unknown = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    problems += parser.unknown_fields(unknown, "on the command line")

    def where(name: str) -> str:
        return "on the command line" if name in given else f"in {path}"

    fields = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    fields, problems_of_fields = settle_fields(fields, recipe, given, run.checkpoint, where)
    problems += _source_problems(run, where) + _problems(run) + _stream_problems(run) + problems_of_fields
    problems += _useless_problems(run, recipe, given)
    parser.refuse(problems + data_problems(run))
    return run, fields, shlex.join(["accelerate", "launch", "training/train.py", *argv])


def _read_recipe(recipe: Path, parser: SettingsParser) -> tuple[dict, list[str]]:
    """The known fields of a recipe, and what is wrong with the others."""
    if not recipe.is_file():
        parser.error(f"the recipe {recipe} does not exist")
    try:
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"the recipe {recipe} is not YAML: {' '.join(str(error).split())}")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        parser.error(f"the recipe {recipe} must be lines of `field: value`, got {type(settings).__name__}: {settings!r:.60}")
    unknown = [f"--{name}" for name in settings if name not in parser.field_names]
    known = {name: value for name, value in settings.items() if name in parser.field_names}
    return known, parser.unknown_fields(unknown, f"in {recipe}")


def _without_replaced_model(settings: dict, given: set[str]) -> dict:
    """The recipe without what the command line (the names `given` there) puts in the place of its model."""
    replaced = {name for names in SOURCES.values() if given & {*names} for name in names}
    if "checkpoint" in given and settings.get("checkpoint") is None:
        # They describe the recipe's model, not the one in the checkpoint, whose layers may have other shapes.
        replaced |= {f.name for f in dataclasses.fields(ModelArguments)}
    return {name: value for name, value in settings.items() if name not in replaced}


def _source_problems(run: RunArguments, where: Callable[[str], str]) -> list[str]:
    """Sides of the model with no source or several; `where` tells where a source was given."""
    problems = []
    for side, names in SOURCES.items():
        sources = [f"{name} ({where(name)})" for name in names if getattr(run, name) is not None]
        if len(sources) > 1:
            problems.append(f"the {side} side has {len(sources)} sources, {' and '.join(sources)}: keep one")
        elif not sources:
            choice = f"{side}_encoder (pretrained), {side}_config (from scratch) or, for both sides, a checkpoint"
            problems.append(f"the {side} side has no source: give {choice}")
    return problems


def _problems(run: RunArguments) -> list[str]:
    """What no run could do, all at once."""
    counts = ["epochs", "batch_size", "eval_interval", "eval_batch_size", "num_scenes"]
    counts += ["max_train_images", "max_eval_images", "save_steps", "total_limit", "steps_per_epoch"]
    counts += ["shuffle_buffer", "micro_batch_size", "gradient_accumulation_steps"]
    problems = range_problems(run, counts, "must be at least 1", lambda value: value >= 1)
    not_negative = ["captions_per_image", "encoder_lr_factor", "weight_decay", "warmup_epochs", "num_workers", "seed"]
    not_negative += ["lora_rank"]
    problems += range_problems(run, not_negative, "must be at least 0", lambda value: 0 <= value < math.inf)
    positive = ("learning_rate", "lr_gamma", "max_grad_norm", "lora_alpha")
    problems += range_problems(run, positive, "must be greater than 0 and finite", lambda value: 0 < value < math.inf)
    shares = ["lr_warmup_share", "caption_noise"]
    problems += range_problems(run, shares, "must lie in [0, 1]", lambda value: 0 <= value <= 1)
    problems += range_problems(run, ["crop_scale", "layer_decay"], "must lie in (0, 1]", lambda value: 0 < value <= 1)
    shares = ["caption_augmentation", "max_corrupt_share"]
    problems += range_problems(run, shares, "must lie in [0, 1)", lambda value: 0 <= value < 1)
    if run.freeze_encoders and (run.crop_scale != 1 or run.caption_augmentation != 0):
        problems.append(
            "freeze_encoders trains on stored features, which cannot change: set crop_scale 1 and caption_augmentation 0"
        )
    in_encoders = {"lora_rank": run.lora_rank > 0, "layer_decay": run.layer_decay < 1}
    useless = [name for name, is_set in in_encoders.items() if run.freeze_encoders and is_set]
    problems += [f"{name} has no effect: freeze_encoders leaves nothing in the encoders to train" for name in useless]
    if run.micro_batch_size is not None and run.micro_batch_size > run.batch_size:
        problems.append(f"micro_batch_size must not be above batch_size {run.batch_size}, got {run.micro_batch_size}")
    if run.lora_rank and find_spec("peft") is None:
        problems.append('lora_rank needs the Python package peft: pip install "granalign-hf[peft]"')
    problems += energy_problems(run.measure_energy, run.emissions_country)
    if run.features_column is not None and (run.image_column is not None or run.image_folder is not None):
        problems.append("features_column replaces pictures: leave out image_column and image_folder")
    problems += _hub_problems(run) if run.push_to_hub else []
    trackers = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    choices = {"matmul_precision": PRECISIONS, "mixed_precision": ("no", "bf16", "fp16"), "lr_scheduler": SCHEDULERS}
    choices |= {"lora_encoders": LORA_ENCODERS}
    problems += choice_problems(run, choices)
    unknown = [name for name in run.report_to if name not in ("all", "none", *trackers)]
    known = f"all, none, {', '.join(trackers)} (other trackers of Accelerate are not installed)"
    problems += [f"report_to must be one of {known}, got {name}" for name in unknown]
    if len(run.report_to) > 1 and {"all", "none"} & {*run.report_to}:
        problems.append(f"report_to takes all and none alone, got {' '.join(run.report_to)}")
    return problems + [problem for name in ("vision_config", "text_config") for problem in _config_problems(run, name)]


def _hub_problems(run: RunArguments) -> list[str]:
    """What would let a push fail for certain, be it after days of training."""
    problems = []
    if run.hub_model_id is None:
        problems.append("push_to_hub needs hub_model_id, the repository as org/name")
    else:
        try:
            check_repo_id(run.hub_model_id)
        except ValueError as error:
            problems.append(f"hub_model_id: {error}")
    if get_token() is None:
        problems.append("push_to_hub needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN")
    return problems


# Settings -> the one that decides whether they have an effect, and the value with which they have none.
CONDITIONS = {
    ("lora_alpha", "lora_encoders"): ("lora_rank", lambda rank: rank == 0),
    ("hub_model_id", "hub_private_repo"): ("push_to_hub", lambda is_pushed: not is_pushed),
    ("emissions_country",): ("measure_energy", lambda is_measured: not is_measured),
    ("shuffle_buffer",): ("streaming", lambda is_stream: not is_stream),
    ("lr_milestones", "lr_gamma"): ("lr_scheduler", lambda scheduler: scheduler != "multistep"),
    ("lr_warmup_share",): ("lr_scheduler", lambda scheduler: scheduler == "multistep"),
}


def _useless_problems(run: RunArguments, recipe: dict, given: set[str]) -> list[str]:
    """Settings that nothing reads; those of a recipe may lose their effect by the command line."""
    problems = []
    for names, (decider, is_off) in CONDITIONS.items():
        value = getattr(run, decider)
        named = given if decider in given else given | {*recipe}
        problems += [f"{name} has no effect: {decider} is {value}" for name in names if name in named and is_off(value)]
    return problems


def _stream_problems(run: RunArguments) -> list[str]:
    """What a stream needs, and what cannot be done with one."""
    if not run.streaming:
        return [] if run.steps_per_epoch is None else ["steps_per_epoch is for streaming: an epoch is all images once"]
    problems = []
    if run.steps_per_epoch is None:
        problems.append("streaming needs steps_per_epoch: a stream does not tell how many images it has")
    whole = {
        "freeze_encoders": (run.freeze_encoders, "stores the features of all images"),
        "text_config": (run.text_config is not None, "takes its vocabulary from all captions: give text_encoder"),
        "max_train_images": (run.max_train_images is not None, "counts images, a stream has steps_per_epoch"),
        "caption_noise": (run.caption_noise > 0, "exchanges captions of the whole split"),
        "dataset scenes": (run.dataset == "scenes", "is drawn and comes from no file"),
    }
    return problems + [f"streaming excludes {name}, which {why}" for name, (is_set, why) in whole.items() if is_set]


def _config_problems(run: RunArguments, name: str) -> list[str]:
    text = getattr(run, name)
    try:
        config = {"model_type": None} if text is None else dict(json.loads(text))
        is_config = "model_type" in config
    except (TypeError, ValueError):
        is_config = False
    if is_config and config["model_type"] == "region_features" and run.crop_scale != 1:
        return [f"crop_scale must be 1 for region_features, which cannot be cropped, got {run.crop_scale}"]
    return [] if is_config else [f"{name} must be a JSON object with a model_type, or a mapping in a recipe, got {text!r}"]


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
