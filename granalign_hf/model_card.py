"""The model card of a saved checkpoint, from the files that measured it and from nothing else.

A card holds no figure of its own: training leaves `metrics.json` beside the checkpoint, evaluation `metrics-<split>.json`,
and what no file carries is called not measured. `model_cards/template.md` holds the words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .card_sections import finite, is_part, markdown_table, measured_sections
from .examples import PHOTOGRAPHS, SCENES, credits
from .whole_files import write_whole

DESCRIPTIONS = {
    "grm": "Fine-grained image-text alignment after GRM (AAAI 2026): salient patches and words, regions as a mixture of "
    "Gaussians, and a score that sums each word's best patch and each patch's best word on three levels.",
    "chan": "Fine-grained image-text alignment after CHAN (CVPR 2023): each word counts with its best patch only.",
    "max_mean": "Fine-grained image-text alignment by the bidirectional maximum: each word's best patch and each patch's "
    "best word.",
    "scan": "Fine-grained image-text alignment after SCAN (ECCV 2018): each token is compared with what it attends to on "
    "the other side.",
    "laps": "Fine-grained image-text alignment after LAPS (CVPR 2024): each caption selects the patches that it is matched "
    "with.",
    "vse++": "Image-text retrieval after VSE++ (BMVC 2018): one pooled vector a picture and one a caption, a baseline "
    "without alignment of words.",
}
ABOUT_EVALUATION = ("protocol", "num_images", "num_captions", "num_images_trained_on", "date", "command")
PICTURES = {"learning_curve.png": "Loss and validation rSum by epoch", "demo.png": "Heat maps of the words of a caption"}
_METRIC_TITLES = {"rsum": "rSum", "image_to_text": "Image to text", "text_to_image": "Text to image"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# An absolute path, one from the home folder, a Windows path or one that begins with a dot; not a URL, not `a/b`.
_MACHINE_PATH = re.compile(
    r"(?:\bfile://|(?<![\w.~/\\-]))(?:~[\w-]*|\.{1,2}|[A-Za-z]:)?[/\\](?!/)(?:[^\s/\\\"'`,;:)]+[/\\]*)+"
)


def write_model_card(folder: str | os.PathLike, **arguments: Any) -> Path:
    """Writes [`model_card`] into `README.md` of the folder, over the one that is there, and returns its path."""
    text = model_card(folder, **arguments)
    card = Path(folder).resolve() / "README.md"
    write_whole(card, text)
    return card


def model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    base_models: Sequence[str] | None = None,
    data_notes: Sequence[str] | None = None,
    template: str | None = None,
) -> str:
    """
    The card of a checkpoint.

    Reads `config.json`; `metrics.json` of training and every `metrics-<split>.json`, `grounding-<split>.json`,
    `foils-<split>.json` and `uncertainty-<split>.json` where they exist, but none of the first images of a split
    (`-first-<number>`). Paths in them are cut to their last name: a card tells nothing about
    the machine it was written on.

    Args:
        folder: a folder that `save_pretrained` wrote.
        repo_id: name on the Hub, for the title, for the code that loads the model, and for examples of the Hub's widget,
            whose pictures [`bundle`] adds. Default: the name of the folder, and no examples.
        license: licence of the weights, as the Hub spells it. Default: `license` of `metrics.json`; without either the card
            claims none, since the data may forbid what the code allows.
        datasets: ids of the training data on the Hub. Default: the recorded data set, if its name is such an id.
        base_models: ids of the encoders on the Hub. Default: the recorded encoders whose names are such ids.
        data_notes: sentences about the data, its licence above all. Default: `data_notes` of `metrics.json`.
        template: text of another template. Default: `model_cards/template.md`.

    Raises:
        ValueError: `config.json` is missing, a file is not readable or lacks what its kind must have, a figure is not a
            finite number, or the template has a placeholder that nothing fills.
    """
    folder = Path(folder).resolve()
    config = _read(folder / "config.json")
    if config is None:
        raise ValueError(f"`folder` must hold a config.json, {folder} has none. Save a model there with `save_pretrained`.")
    training = _read(folder / "metrics.json") or {}
    evaluations = [_read_evaluation(path) for path in sorted(folder.glob("metrics-*.json")) if not is_part(path)]
    aligner = config.get("aligner", "grm")
    name = (repo_id or folder.name).rpartition("/")[2]
    encoders = [_encoder_name(name) for name in training.get("encoders", {}).values()]
    datasets = [training.get("dataset", "")] if datasets is None else datasets
    base_models = encoders if base_models is None else base_models
    license = training.get("license") if license is None else license
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["granalign", "image-text-retrieval", "image-text-alignment", aligner],
        license=license,
        datasets=_hub_ids(datasets),
        base_model=_hub_ids(base_models),
        model_name=name,
        co2_eq_emissions=_emissions(training),
        eval_results=[result for evaluation in evaluations for result in _eval_results(evaluation)],
    )
    if not metadata.eval_results:  # the Hub refuses a model index without results
        metadata.eval_results = metadata.model_name = None
    is_of_scenes = training.get("dataset") == "scenes"
    image_code = _image_code(config, is_of_scenes)
    examples = SCENES if is_of_scenes else PHOTOGRAPHS
    has_widget = repo_id is not None and _has_pictures(config)
    if has_widget:
        metadata.widget = [
            {"src": one.file, "example_title": one.title, "candidate_labels": ", ".join(one.labels)} for one in examples
        ]
    values = {
        "metadata": metadata.to_yaml(),
        "model_name": name,
        "model_id": repo_id or folder.name,
        "description": DESCRIPTIONS.get(aligner, f"Image-text alignment with the aligner `{aligner}`."),
        "encoders": _encoder_section(config, training),
        **image_code,
        "results": "\n\n".join(filter(None, [_result_section(evaluations), measured_sections(folder)])),
        "training": _training_section(training, folder),
        "data": "\n\n".join(
            filter(None, [_data_section(training, data_notes, license), credits(examples) if has_widget else ""])
        ),
        "notes": _bullets(training.get("notes", [])),
    }
    return _fill(template or _default_template(), values)


# --------------------------------------------------------------------------------------------------------------- files


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file without machine paths; `None` if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return _without_paths(content)


def _read_evaluation(path: Path) -> dict[str, Any]:
    content = _read(path) or {}
    missing = [name for name in ("dataset", "split", "metrics") if not content.get(name)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Write it with `training/evaluate.py`.")
    return content


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, str):
        return _MACHINE_PATH.sub(lambda match: _last_name(match.group()), " ".join(value.split()))
    return value


def _last_name(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _encoder_name(name: str) -> str:
    """What a card calls an encoder: its id on the Hub, its Python package, or the last name of a local path."""
    if name.startswith("package:"):
        return name.removeprefix("package:").split("/")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).is_dir() else _last_name(name)


def _hub_ids(names: Sequence[str]) -> list[str] | None:
    return list(dict.fromkeys(name for name in names if _HUB_ID.fullmatch(name))) or None


def _default_template() -> str:
    return files("granalign_hf.model_cards").joinpath("template.md").read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    try:
        return Template(template).substitute(values)
    except KeyError as error:
        raise ValueError(
            f"The template has the placeholder ${error.args[0]}, which nothing fills; known are {', '.join(sorted(values))}."
        ) from error
    except ValueError as error:
        raise ValueError(f"The template has a $ without a placeholder ({error}); write $$ for the sign itself.") from error


# ------------------------------------------------------------------------------------------------------------- figures


def _figure(value: Any, name: str) -> str:
    """Recalls with one digit, as papers print them; anything else with four."""
    number = finite(value, name)
    return f"{number:.1f}" if name == "rsum" or re.search(r"_r\d+$", name) else f"{number:.4g}"


def _metric_title(name: str) -> str:
    for prefix, title in _METRIC_TITLES.items():
        if name.startswith(prefix):
            rest = re.sub(r"^r(?=\d+$)", "R@", name.removeprefix(prefix).strip("_")).replace("_", " ")
            return f"{title}, {rest}" if rest else title
    return name.replace("_", " ").capitalize()


def _eval_results(evaluation: dict[str, Any]) -> Iterator[EvalResult]:
    for name, value in evaluation["metrics"].items():
        yield EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-Text Retrieval",
            dataset_type=evaluation["dataset"],
            dataset_name=evaluation["dataset"],
            dataset_split=evaluation["split"],
            metric_type=name,
            metric_name=_metric_title(name),
            metric_value=round(finite(value, name), 2),
        )


# ------------------------------------------------------------------------------------------------------------ sections


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _encoder_section(config: dict[str, Any], training: dict[str, Any]) -> str:
    names = {}
    for side in ("vision", "text"):
        name = _encoder_name(training.get("encoders", {}).get(side, "not recorded"))
        names[side] = f"{side} {name} ({config.get(f'{side}_config', {}).get('model_type', 'type not recorded')})"
    return ", ".join(names.values())


def _has_pictures(config: dict[str, Any]) -> bool:
    return config.get("vision_config", {}).get("model_type") != "region_features"


def _image_code(config: dict[str, Any], is_of_scenes: bool) -> dict[str, str]:
    """How the example has its image and its captions: a drawn scene, a photograph, or the features of its regions."""
    vision = config.get("vision_config", {})
    code = {"image_kind": "", "image_import": "from PIL import Image"}
    if is_of_scenes:
        code["image_kind"] = " (the model knows no other pictures, and the words of their captions alone)"
        return code | {"picture": "drawn scene", "image": 'Image.open("scene.png")', "captions": str(list(SCENES[0].labels))}
    code |= {"picture": "photograph", "captions": '["a dog catches a red ball", "two people row a boat"]'}
    if _has_pictures(config):
        return code | {"image": 'Image.open("photo.jpg")'}
    kind = f", given as the features of {vision['num_boxes']} regions with {vision['hidden_size']} numbers each"
    return code | {"image_kind": kind, "image_import": "import numpy as np", "image": 'np.load("features.npy")'}


def _result_section(evaluations: Sequence[dict[str, Any]]) -> str:
    if not evaluations:
        return "Not measured: the checkpoint has no `metrics-<split>.json` of `training/evaluate.py`."
    return "\n\n".join(_evaluation_section(evaluation) for evaluation in evaluations)


def _evaluation_section(evaluation: dict[str, Any]) -> str:
    intervals = evaluation.get("intervals", {})
    rows = []
    for name, value in evaluation["metrics"].items():
        interval = " to ".join(_figure(bound, name) for bound in intervals.get(name, ()))
        rows.append((_metric_title(name), _figure(value, name), interval or "not measured"))
    parts = [
        f"### {evaluation['dataset']}, {evaluation['split']}",
        (
            "Protocol: {protocol}. Images: {num_images}, captions: {num_captions}; images that the training had seen: "
            "{num_images_trained_on}. Measured: {date}, `{command}`."
        ).format_map({n: "not recorded" if evaluation.get(n) is None else evaluation[n] for n in ABOUT_EVALUATION}),
        markdown_table(("metric", "value", "95 % interval"), rows),
    ]
    if evaluation.get("diagnostics"):
        parts += ["How much saliency and regions were at work:", _metric_table(evaluation["diagnostics"])]
    return "\n\n".join(parts)


def _metric_table(metrics: dict[str, Any]) -> str:
    return markdown_table(
        ("metric", "value"), [(_metric_title(name), _figure(value, name)) for name, value in metrics.items()]
    )


def _training_section(training: dict[str, Any], folder: Path) -> str:
    if not training:
        return "Not measured: the checkpoint has no `metrics.json` of `training/train.py`."
    epochs = [record["epoch"] for record in training.get("history", []) if "epoch" in record]
    versions = ", ".join(f"{name} {version}" for name, version in training.get("versions", {}).items())
    rows = {
        "recipe": training.get("recipe"),
        "command": f"`{training['command']}`" if training.get("command") else None,
        "seed": training.get("seed"),
        "best epoch": f"{training.get('best_epoch')} of {max(epochs)}" if epochs else training.get("best_epoch"),
        "frozen encoders": None if "frozen_encoders" not in training else "yes" if training["frozen_encoders"] else "no",
        "hours": _sum(training, "hours", lambda run: run.get("hours")),
        "energy (kWh)": _sum(training, "energy", lambda run: (run.get("energy") or {}).get("kwh")),
        "energy measured": _measured_by(training.get("energy")),
        "hardware": training.get("hardware"),
        "date": training.get("date"),
        "versions": versions or None,
    }
    lora = training.get("lora")
    if lora:
        where = "both encoders" if lora["encoders"] == "both" else f"the {lora['encoders']} encoder"
        rows["LoRA"] = f"rank {lora['rank']}, alpha {lora['alpha']:g}, in {where}"
    before = training.get("started_from")
    if before:
        rows["started from"] = f"best epoch, {before.get('best_epoch')}, of `{before.get('command')}`"
    recorded = [(name, "not recorded" if value is None else value) for name, value in rows.items()]
    parts = [markdown_table(("setting", "value"), recorded)]
    if training.get("validation"):
        parts += ["On the validation split, at the best epoch:", _metric_table(training["validation"])]
    parts += [f"![{title}]({name})" for name, title in PICTURES.items() if (folder / name).is_file()]
    return "\n\n".join(parts)


def _sum(training: dict[str, Any], name: str, of: Callable[[dict[str, Any]], Any]) -> str | None:
    """A figure of the run, and the sum with that of the run that it went on from, where there is one."""
    if of(training) is None:
        return None
    own = finite(of(training), name)
    earlier = of(training.get("started_from") or {})
    if earlier is None:
        return f"{own:.4g}"
    return f"{own:.4g}, and {finite(earlier, name):.4g} of the run that it started from: {own + earlier:.4g}"


def _measured_by(energy: dict[str, Any] | None) -> str | None:
    """By what, and over how much of the run, which may have gone on without."""
    if energy is None:
        return None
    hours = f" in {finite(energy['hours'], 'hours'):.4g} of the hours" if "hours" in energy else ""
    return f"by {energy['source']}{hours}"


def _emissions(training: dict[str, Any]) -> dict[str, Any] | None:
    """As the Hub shows them: grams, those of the run that it started from included."""
    runs = [training, *([training["started_from"]] if training.get("started_from") else [])]
    energies = [run.get("energy") or {"co2_kg": None} for run in runs]
    if None in (energy["co2_kg"] for energy in energies):
        return None
    return {
        "emissions": round(1000 * sum(finite(energy["co2_kg"], "co2_kg") for energy in energies), 3),
        "source": energies[0]["source"],
        "geographical_location": energies[0]["country"],
        "hardware_used": training.get("hardware", "not recorded"),
    }


def _data_section(training: dict[str, Any], notes: Sequence[str] | None, license: str | None) -> str:
    notes = training.get("data_notes", []) if notes is None else notes
    if training:
        size = (
            f"{training.get('num_train_images', 'not recorded')} images with "
            f"{training.get('num_train_captions', 'not recorded')} captions"
        )
        if training.get("num_train_images", 0) is None:
            size = "a stream of images, which was not counted"
        used = (
            f"Trained on {training.get('dataset', 'data without a recorded name')}, split "
            f"{training.get('train_split', 'not recorded')}: {size}."
        )
        if training.get("num_corrupt_images"):
            used += f" Images that could not be read were left out: {training['num_corrupt_images']}."
    else:
        used = "Not recorded: the checkpoint has no `metrics.json`."
    licence = f"Licence of the weights: {license or 'not recorded'}."
    return f"{used}\n\n{_bullets([*(notes or ['No note on the licence of the data was recorded.']), licence])}"
