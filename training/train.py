"""Trains a GranAlign model.

    accelerate launch training/train.py [RECIPE.yaml] [--field value ...]

Without arguments it trains the demo's recipe on drawn scenes.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast, set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm
from transformers import get_scheduler

from granalign_hf.evaluation import RetrievalRanks, ranks_to_metrics, retrieval_ranks
from granalign_hf.model_card import write_model_card
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.arguments import RunArguments, parse_arguments
from granalign_hf.training.build import build
from granalign_hf.training.data import CaptionedImages, Collator, TrainingImages, load_split, noisy_order
from granalign_hf.training.distributed import shared_loss
from granalign_hf.training.features import FeatureCollator, FeatureImages, TokenFeatures, token_features
from granalign_hf.training.finite import check_finite, may_overflow
from granalign_hf.training.gradient_cache import CachedTokens, TokenEncoder
from granalign_hf.training.leaks import save_training_images
from granalign_hf.training.plot import plot_history
from granalign_hf.training.protocols import save_ranks
from granalign_hf.training.record import run_record
from granalign_hf.training.runtime import set_up_torch
from granalign_hf.training.scoring import scored_split

logger = get_logger(__name__)
MEASURED = ("metrics-*.json", "ranks-*.npz", "demo.png")


@dataclass
class Training:
    """All that the epochs need: what [`set_up`] makes of the settings."""

    run: RunArguments
    accelerator: Accelerator
    train_data: CaptionedImages
    val_data: CaptionedImages
    val_features: TokenFeatures | None
    processor: GranAlignProcessor
    model: torch.nn.Module  # a `TokenEncoder`, in what Accelerate wraps around it
    replica: GranAlignModel | None  # under FSDP, for the model in one piece
    images: TrainingImages | FeatureImages
    order: torch.Generator
    loader: torch.utils.data.DataLoader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @property
    def plain_model(self) -> GranAlignModel:
        """The model without what is wrapped around it; under FSDP its parameters are shards."""
        return self.accelerator.unwrap_model(self.model).model

    @property
    def whole_model(self) -> GranAlignModel:
        """The model in one piece, to validate and save; under FSDP as it was at the last [`~Training.gather_weights`]."""
        return self.plain_model if self.replica is None else self.replica

    def gather_weights(self) -> None:
        """Brings the replica of FSDP up to date. Every process has to call it."""
        if self.replica is not None:
            weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
            self.replica.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})


def main(argv: list[str] | None = None) -> dict:
    """Trains a model; returns the state of the run: `history`, `best_epoch`, `seconds`."""
    started = time.perf_counter()
    run, fields, command = parse_arguments(argv)
    output = Path(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=output,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_up_torch(run.matmul_precision, accelerator.num_processes)
    set_seed(run.seed)
    training = set_up(run, fields, accelerator)
    if not accelerator.is_main_process:
        set_seed(run.seed, device_specific=True)  # the same weights in all processes, but noise of its own in each
    state: dict = {"epoch": 0, "best_epoch": None, "seconds": 0.0, "history": []}
    if run.resume:
        state = resume(accelerator, output)
    elif accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / "state", ignore_errors=True)  # of an earlier run: `resume` would take it for this one's
    started -= state["seconds"]
    if run.report_to != "none":
        accelerator.init_trackers("granalign")
    for epoch in range(state["epoch"], run.epochs):
        try:
            record: dict = {"epoch": epoch + 1, **train_epoch(training, epoch, _last_rsum(state))}
        except FloatingPointError:
            accelerator.save_state(str(output / "before-failure"))
            raise
        is_due = (epoch + 1) % run.eval_interval == 0 or epoch + 1 == run.epochs
        ranks = None
        if is_due:
            ranks, figures = validate_epoch(training, epoch)
            record |= figures
        state["history"].append(record)
        state["epoch"] = epoch + 1
        state["seconds"] = time.perf_counter() - started
        if ranks is not None:
            keep_best(training, command, state, ranks)
        save_state(accelerator, output, state)
    accelerator.end_training()
    if accelerator.is_main_process:
        # Last, since no other process waits for it.
        if run.dataset != "scenes":
            save_training_images(training.train_data, output)
        print(f"best epoch {state['best_epoch']}: checkpoint and metrics in {output}")
    return state


def set_up(run: RunArguments, fields: dict, accelerator: Accelerator) -> Training:
    """Data, model, order, optimiser and schedule of a run.

    Args:
        fields: of `GranAlignConfig`, as named in the recipe or on the command line.

    Raises:
        ValueError: the data or the model cannot be had, there are fewer images than a batch needs, or DeepSpeed, which
            updates the weights at every call of `backward`, shall take a batch in parts.
    """
    if run.micro_batch_size is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("`micro_batch_size` does not work under DeepSpeed. Use FSDP, or leave it out.")
    # Data and model
    train_data = load_split(run.dataset, run.train_split, **run.load_options, num_scenes=run.num_scenes)
    train_data = train_data.first(run.max_train_images)
    val_data = load_split(run.dataset, run.validation_split, **run.load_options).first(run.max_eval_images)
    model, processor = build(run, fields, train_data.all_captions)
    processor(images=train_data.image(0))  # refuses pictures for a model of region features, and the other way round
    if accelerator.is_main_process:
        processor.warn_of_truncation(train_data.all_captions + val_data.all_captions)
    val_features = None
    caption_order = noisy_order(len(train_data.all_captions), run.caption_noise, run.seed)
    images: TrainingImages | FeatureImages
    collate: Collator | FeatureCollator
    if run.freeze_encoders:
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        model.to(accelerator.device)
        cache, is_quiet = Path("runs") / "features", not accelerator.is_main_process
        with accelerator.main_process_first():
            train_features = token_features(model, processor, train_data, cache, run.eval_batch_size, is_quiet)
            val_features = token_features(model, processor, val_data, cache, run.eval_batch_size, is_quiet)
        images = FeatureImages(train_features, run.captions_per_image, run.seed, caption_order)
        collate = FeatureCollator(train_features)
    else:
        images = TrainingImages(train_data.reordered(caption_order), run.captions_per_image, run.crop_scale, run.seed)
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
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=run.learning_rate)
    replica = copy.deepcopy(model) if accelerator.distributed_type == DistributedType.FSDP else None
    encoder, optimizer, loader = accelerator.prepare(TokenEncoder(model), optimizer, loader)
    if len(loader) == 0:
        needed = run.batch_size * accelerator.num_processes
        raise ValueError(f"`batch_size` {run.batch_size} needs {needed} training images for one step, got {len(images)}.")
    # Not prepared: Accelerate would step it once for every process, as if its length were counted in their batches.
    scheduler = make_scheduler(optimizer, run, math.ceil(len(loader) / run.gradient_accumulation_steps))
    accelerator.register_for_checkpointing(scheduler)
    return Training(
        *(run, accelerator, train_data, val_data, val_features, processor, encoder, replica),
        *(images, order, loader, optimizer, scheduler),
    )


def train_epoch(training: Training, epoch: int, last_rsum: str) -> dict[str, float]:
    """One pass over the training images; the mean of the loss and of each of its terms.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    run, accelerator, model = training.run, training.accelerator, training.model
    num_steps = len(training.loader)
    training.order.manual_seed(run.seed * 100_003 + epoch)
    training.images.epoch = epoch
    model.train()
    if run.freeze_encoders:
        training.plain_model.vision_model.eval()
        training.plain_model.text_model.eval()
    use_hard_negatives = epoch >= run.warmup_epochs
    totals: dict[str, float] = {}
    grad_norm = math.nan
    bar = tqdm(training.loader, desc=f"epoch {epoch + 1}/{run.epochs}", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar):
        where = f"epoch {epoch + 1}, step {step + 1}"
        with accelerator.accumulate(model):
            cached = CachedTokens(accelerator, model, batch, run.micro_batch_size)
            loss, values = shared_loss(training.plain_model, cached.tokens, batch, use_hard_negatives)
            check_finite(training, "loss", values["loss"], where, values, batch)
            loss.backward()
            cached.backward()
            if accelerator.sync_gradients:
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), run.max_grad_norm))
                if not may_overflow(accelerator):
                    check_finite(training, "norm of the gradient", grad_norm, where, values, batch)
            training.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                training.scheduler.step()
            training.optimizer.zero_grad()
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value / num_steps
        bar.set_postfix(loss=f"{values['loss']:.4f}", rsum=last_rsum)
        if step % 20 == 0:
            logged = {f"train/{name}": value for name, value in values.items()} | {"train/grad_norm": grad_norm}
            logged |= {f"lr/{group['name']}": group["lr"] for group in training.optimizer.param_groups}
            accelerator.log(logged, step=epoch * num_steps + step)
    warn_if_stuck(totals, run, training.plain_model.config.margin, use_hard_negatives)
    return totals


def validate_epoch(training: Training, epoch: int) -> tuple[RetrievalRanks, dict[str, dict]]:
    """The ranks, and `validation` and `diagnostics` of an epoch, logged too. Every process scores a part of the images."""
    run, accelerator = training.run, training.accelerator
    for buffer in training.plain_model.buffers():
        broadcast(buffer)  # each process has its own statistics of batch norm, and those of the main one are saved
    folder = Path(run.output_dir) / "validation-unfinished"
    data = (training.processor, training.val_data, run.eval_batch_size, folder, training.val_features)
    training.gather_weights()
    with scored_split(training.whole_model, *data) as (scores, diagnostics):
        ranks = retrieval_ranks(scores, training.val_data.caption_image_index)
    metrics = ranks_to_metrics(ranks)
    step = (epoch + 1) * len(training.loader)
    accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
    return ranks, {"validation": metrics, "diagnostics": diagnostics}


def keep_best(training: Training, command: str, state: dict, ranks: RetrievalRanks) -> None:
    """Writes the checkpoint, and the rank of every query, if the last epoch is the best on validation; the record always."""
    output, record = Path(training.run.output_dir), state["history"][-1]
    best = max((r for r in state["history"] if "validation" in r), key=lambda r: r["validation"]["rsum"])
    if best is record:
        state["best_epoch"] = record["epoch"]
    if not training.accelerator.is_main_process:
        return
    if best is record:
        save_checkpoint(training.whole_model, training.processor, output)
        save_ranks(output / f"ranks-{training.run.validation_split}.npz", [ranks])
    write_metrics(output, training, command, state)
    tqdm.write(f"epoch {record['epoch']}: loss {record['loss']:.4f}, validation rSum {record['validation']['rsum']:.1f}")


def parameter_groups(model: torch.nn.Module, run: RunArguments) -> list[dict]:
    """New layers at the full rate, encoders at a part of it; weight decay for matrices only."""
    groups = []
    for is_encoder in (False, True):
        for is_matrix in (True, False):
            parameters = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and name.startswith(("vision_model.", "text_model.")) == is_encoder
                and (p.ndim > 1) == is_matrix
            ]
            rate = run.learning_rate * (run.encoder_lr_factor if is_encoder else 1.0)
            decay = run.weight_decay if is_matrix else 0.0
            if parameters:
                name = "encoders" if is_encoder else "new_layers"
                groups.append({"params": parameters, "weight_decay": decay, "lr": rate, "name": name})
    return groups


def make_scheduler(optimizer, run: RunArguments, steps_per_epoch: int):
    if run.lr_scheduler == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in run.lr_milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, run.lr_gamma)
    num_steps = run.epochs * steps_per_epoch
    return get_scheduler(run.lr_scheduler, optimizer, int(run.lr_warmup_share * num_steps), num_steps)


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
    """The complete folder that `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` read.

    What evaluations have measured on the weights of before goes: it would stand beside others.
    """
    for pattern in MEASURED:
        for path in output.glob(pattern):
            path.unlink()
    model.save_pretrained(output)
    processor.save_pretrained(output)


def write_metrics(output: Path, training: Training, command: str, state: dict) -> None:
    """metrics.json, the learning curve and the card beside the best checkpoint."""
    record = run_record(training.run, command, training.plain_model.config, training.train_data, state)
    (output / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_history(state["history"], output / "learning_curve.png")
    write_model_card(output)


def save_state(accelerator: Accelerator, output: Path, state: dict) -> None:
    """Everything that `--resume` needs, in a folder of its own; those of earlier epochs are removed after that.

    A folder counts from the moment that it holds progress.json, which is written last and appears as a whole.
    """
    new = output / "state" / f"epoch-{state['epoch']}"
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()  # each process writes its own random state
    if accelerator.is_main_process:
        (new / "progress.tmp").write_text(json.dumps(state))
        (new / "progress.tmp").replace(new / "progress.json")
        for other in (output / "state").iterdir():
            if other != new:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> dict:
    """Loads the newest complete state of [`save_state`] and returns the progress of the run.

    Raises:
        ValueError: there is none.
    """
    complete = [path.parent for path in (output / "state").glob("epoch-*/progress.json")]
    if not complete:
        raise ValueError(
            f"`resume` found no saved state in {output / 'state'}. Start without --resume, or name the right output_dir."
        )
    newest = max(complete, key=lambda folder: int(folder.name.removeprefix("epoch-")))
    accelerator.load_state(str(newest))
    return json.loads((newest / "progress.json").read_text())


def _last_rsum(state: dict) -> str:
    done = [record["validation"]["rsum"] for record in state["history"] if "validation" in record]
    return f"{done[-1]:.1f}" if done else "-"


if __name__ == "__main__":
    main()
