"""Trains a GranAlign model.

    accelerate launch training/train.py [RECIPE.yaml] [--field value ...]

Without arguments it trains the demo's recipe on drawn scenes.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm import tqdm
from transformers import get_scheduler

from granalign_hf.evaluation import ranks_to_metrics, retrieval_ranks
from granalign_hf.model_card import write_model_card
from granalign_hf.training.arguments import RunArguments, parse_arguments
from granalign_hf.training.build import build
from granalign_hf.training.data import Collator, TrainingImages, load_split
from granalign_hf.training.evaluate import diagnostics, encode, score_matrix
from granalign_hf.training.features import FeatureCollator, FeatureImages, token_features
from granalign_hf.training.plot import plot_history
from granalign_hf.training.record import run_record
from granalign_hf.training.runtime import set_up_torch

logger = get_logger(__name__)


def main(argv: list[str] | None = None) -> dict:
    run, fields, command = parse_arguments(argv)
    output = Path(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_up_torch(run.matmul_precision, accelerator.num_processes)
    is_main = accelerator.is_main_process
    if is_main:
        output.mkdir(parents=True, exist_ok=True)
    set_seed(run.seed)

    # Data and model
    columns = (run.dataset_config, run.image_column, run.caption_column, run.image_id_column)
    train_data = load_split(run.dataset, run.train_split, *columns, num_scenes=run.num_scenes).first(run.max_train_images)
    val_data = load_split(run.dataset, run.validation_split, *columns).first(run.max_eval_images)
    model, processor = build(run, fields, [caption for captions in train_data.captions for caption in captions])
    val_features = None
    if run.freeze_encoders:
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        model.to(accelerator.device)
        cache = Path("runs") / "features"
        with accelerator.main_process_first():
            train_features = token_features(model, processor, train_data, cache, run.eval_batch_size, not is_main)
            val_features = token_features(model, processor, val_data, cache, run.eval_batch_size, not is_main)
        images = FeatureImages(train_features, run.captions_per_image, run.seed)
        collate = FeatureCollator(train_features)
    else:
        images = TrainingImages(train_data, run.captions_per_image, run.crop_scale, run.seed)
        collate = Collator(processor, run.caption_augmentation)

    # Order, optimiser, schedule
    order = torch.Generator()
    loader = torch.utils.data.DataLoader(
        images,
        run.batch_size,
        shuffle=True,
        generator=order,
        collate_fn=collate,
        num_workers=run.num_workers,
        drop_last=True,
    )
    if len(loader) == 0:
        raise ValueError(f"`batch_size` {run.batch_size} is larger than the {len(images)} training images.")
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=run.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = accelerator.prepare(make_scheduler(optimizer, run, len(loader)))
    state = {"epoch": 0, "best_epoch": None, "seconds": 0.0, "history": []}
    if run.resume:
        state = resume(accelerator, output)
    if accelerator.trackers or run.report_to != "none":
        accelerator.init_trackers("granalign")

    # Epochs
    for epoch in range(state["epoch"], run.epochs):
        started = time.perf_counter()
        order.manual_seed(run.seed * 100_003 + epoch)
        images.epoch = epoch
        model.train()
        if run.freeze_encoders:
            accelerator.unwrap_model(model).vision_model.eval()
            accelerator.unwrap_model(model).text_model.eval()
        use_hard_negatives = epoch >= run.warmup_epochs
        totals: dict[str, float] = {}
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{run.epochs}", disable=not is_main)
        for step, batch in enumerate(bar):
            out = model(**batch, return_loss=True, use_hard_negatives=use_hard_negatives)
            values = {name: value.detach().float().item() for name, value in {"loss": out.loss, **out.loss_terms}.items()}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"The loss is {values['loss']} at epoch {epoch + 1}, step {step + 1}: {values}")
            accelerator.backward(out.loss)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), run.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value / len(loader)
            bar.set_postfix(loss=f"{values['loss']:.4f}", rsum=_last_rsum(state))
            if step % 20 == 0:
                lrs = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
                accelerator.log(
                    {f"train/{n}": v for n, v in values.items()} | lrs | {"train/grad_norm": float(grad_norm)},
                    step=epoch * len(loader) + step,
                )
        warn_if_stuck(totals, run, fields["margin"], use_hard_negatives)

        # Validation selects the checkpoint that stays
        record = {"epoch": epoch + 1, **totals}
        is_last = epoch + 1 == run.epochs
        if is_main and ((epoch + 1) % run.eval_interval == 0 or is_last):
            record["validation"], record["diagnostics"] = validate(
                accelerator.unwrap_model(model), processor, val_data, val_features, run.eval_batch_size
            )
            accelerator.log({f"validation/{n}": v for n, v in record["validation"].items()}, step=(epoch + 1) * len(loader))
            tqdm.write(f"epoch {epoch + 1}: loss {totals['loss']:.4f}, validation rSum {record['validation']['rsum']:.1f}")
        state["history"].append(record)
        state["epoch"] = epoch + 1
        state["seconds"] += time.perf_counter() - started
        if is_main and "validation" in record:
            best = max((r for r in state["history"] if "validation" in r), key=lambda r: r["validation"]["rsum"])
            if best is record:
                state["best_epoch"] = epoch + 1
                save_checkpoint(accelerator.unwrap_model(model), processor, output)
            write_metrics(output, run, command, train_data, state)
        accelerator.wait_for_everyone()
        save_state(accelerator, output, state)
    accelerator.end_training()
    if is_main:
        print(f"best epoch {state['best_epoch']}: checkpoint and metrics in {output}")
    return state


def parameter_groups(model: torch.nn.Module, run: RunArguments) -> list[dict]:
    """New layers at the full rate, encoders at a part of it; weight decay for matrices only."""
    groups = []
    for is_encoder in (False, True):
        for decay in (run.weight_decay, 0.0):
            parameters = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and name.startswith(("vision_model.", "text_model.")) == is_encoder
                and (p.ndim > 1) == (decay > 0)
            ]
            factor = run.encoder_lr_factor if is_encoder else 1.0
            if parameters:
                name = "encoders" if is_encoder else "new_layers"
                groups.append({"params": parameters, "weight_decay": decay, "lr": run.learning_rate * factor, "name": name})
    return groups


def make_scheduler(optimizer, run: RunArguments, steps_per_epoch: int):
    if run.lr_scheduler == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in run.lr_milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, run.lr_gamma)
    num_steps = run.epochs * steps_per_epoch
    return get_scheduler(run.lr_scheduler, optimizer, int(run.lr_warmup_share * num_steps), num_steps)


def validate(model, processor, data, features, batch_size: int) -> tuple[dict, dict]:
    """Metrics and diagnostics on a split, with the model as it is."""
    model.eval()
    image, text = encode(model, processor, data, batch_size, features)
    metrics = ranks_to_metrics(retrieval_ranks(score_matrix(model, image, text), data.caption_image_index))
    return metrics, diagnostics(image, text)


def warn_if_stuck(totals: dict[str, float], run: RunArguments, margin: float, use_hard_negatives: bool) -> None:
    """A hinge of 2 x margin with hardest negatives means that all pairs score alike."""
    stuck = [
        name for name, value in totals.items() if name.startswith("contrastive") and abs(value - 2 * margin) < 0.02 * margin
    ]
    if use_hard_negatives and stuck:
        logger.warning(
            f"{', '.join(stuck)} stays at 2 x margin = {2 * margin:.3f}: all pairs score alike, the model has collapsed. "
            f"Raise `warmup_epochs` (now {run.warmup_epochs}) or lower `learning_rate`."
        )


def save_checkpoint(model, processor, output: Path) -> None:
    """The complete folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` read."""
    model.save_pretrained(output)
    processor.save_pretrained(output)


def write_metrics(output: Path, run: RunArguments, command: str, train_data, state: dict) -> None:
    """metrics.json, the learning curve and the card beside the best checkpoint."""
    (output / "metrics.json").write_text(json.dumps(run_record(run, command, train_data, state), indent=2) + "\n")
    plot_history(state["history"], output / "learning_curve.png")
    write_model_card(output)


def save_state(accelerator: Accelerator, output: Path, state: dict) -> None:
    """Everything that `--resume` needs, replaced as a whole so that a half-written state is never read."""
    new, last = output / "state.new", output / "state"
    accelerator.save_state(str(new))
    if accelerator.is_main_process:
        (new / "progress.json").write_text(json.dumps(state))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(last)
        new.rename(last)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> dict:
    folder = output / "state"
    if not (folder / "progress.json").is_file():
        raise ValueError(f"`resume` found no saved state in {folder}. Start without --resume, or name the right output_dir.")
    accelerator.load_state(str(folder))
    return json.loads((folder / "progress.json").read_text())


def _last_rsum(state: dict) -> str:
    done = [record["validation"]["rsum"] for record in state["history"] if "validation" in record]
    return f"{done[-1]:.1f}" if done else "-"


if __name__ == "__main__":
    main()
