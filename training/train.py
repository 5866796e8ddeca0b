"""Trains a GranAlign model.

    accelerate launch training/train.py [RECIPE.yaml] [--field value ...]

Without arguments it trains the demo's recipe on drawn scenes.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast, gather_object, set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm
from transformers import get_scheduler

from granalign_hf.evaluation import RetrievalRanks, ranks_to_metrics, retrieval_ranks
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.training.arguments import RunArguments, parse_arguments
from granalign_hf.training.batches import Collator, TrainingImages, TrainingSet, noisy_order
from granalign_hf.training.build import build
from granalign_hf.training.checkpointing import best_record, keep_best
from granalign_hf.training.data import CaptionedImages, load_split
from granalign_hf.training.distributed import shared_loss
from granalign_hf.training.energy import EnergyMeter
from granalign_hf.training.features import FeatureCollator, FeatureImages, TokenFeatures, token_features
from granalign_hf.training.finite import Rollback, check_finite, may_overflow
from granalign_hf.training.gradient_cache import CachedTokens, TokenEncoder
from granalign_hf.training.interruption import Interruption, end_training
from granalign_hf.training.launch import start_accelerator
from granalign_hf.training.leaks import save_training_images
from granalign_hf.training.loaders import prepare, training_data, training_loader
from granalign_hf.training.observing import epoch_means, log_step, log_validation, log_word_maps, start_trackers
from granalign_hf.training.publishing import Publishing
from granalign_hf.training.runtime import set_up_torch
from granalign_hf.training.scoring import scored_split
from granalign_hf.training.states import States, one_clear_error, refuse_to_replace, run_settings
from granalign_hf.training.streams import StreamedImages
from granalign_hf.training.tables import data_problems
from granalign_hf.training.throughput import Throughput, shown
from granalign_hf.training.tuning import add_adapters, parameter_groups, rest_frozen_encoders

logger = get_logger(__name__)


@dataclass
class Training:
    """All that the epochs need: what [`set_up`] makes of the settings."""

    run: RunArguments
    accelerator: Accelerator
    train_data: CaptionedImages | StreamedImages
    val_data: CaptionedImages
    val_features: TokenFeatures | None
    processor: GranAlignProcessor
    model: torch.nn.Module  # a `TokenEncoder`, in what Accelerate wraps around it
    replica: GranAlignModel | None  # under FSDP, for the model in one piece
    images: TrainingSet
    order: torch.Generator
    loader: torch.utils.data.DataLoader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    publishing: Publishing | None  # of the main process, if the run is pushed
    meter: EnergyMeter | None  # of the main process, if energy is measured

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
    """Trains a model; returns the state of the run: `history`, `best_epoch`, `seconds`.

    Raises:
        SystemExit: a setting is wrong, or SIGTERM or Ctrl-C has ended the run, with 128 + the number of the signal.
        ValueError: an unfinished run has its states in the output folder, or see [`start_accelerator`], [`set_up`] and
            [`States.load`].
        OSError: the output folder cannot be written.
    """
    started = time.perf_counter()
    run, fields, command = parse_arguments(argv, data_problems)
    output = Path(run.output_dir)
    with one_clear_error("output folder", output):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    if not run.resume:
        refuse_to_replace(output / "state")
    accelerator = start_accelerator(run)
    set_up_torch(run.matmul_precision, accelerator.num_processes)
    set_seed(run.seed)
    training = set_up(run, fields, accelerator)
    if not accelerator.is_main_process:
        set_seed(run.seed, device_specific=True)  # the same weights in all processes, but noise of its own in each
    states = States(accelerator, output / "state", run.total_limit)
    settings = run_settings(run, fields, accelerator.num_processes, len(training.loader))
    state = states.load(settings) if run.resume else states.begin(settings)
    start_trackers(accelerator, run, fields)
    with Interruption(accelerator) as interruption:
        train_epochs(training, state, states, interruption, command, started - state["seconds"])
    end_training(accelerator)
    if accelerator.is_main_process:
        # Last, since no other process waits for it.
        if run.dataset != "scenes" and isinstance(training.train_data, CaptionedImages):
            before = None if run.checkpoint is None else Path(run.checkpoint)
            save_training_images(training.train_data, output, before)
        print(f"best epoch {state['best_epoch']}: checkpoint and metrics in {output}")
        if training.publishing:
            training.publishing.finish()
    return state


def train_epochs(
    training: Training, state: dict, states: States, interruption: Interruption, command: str, started: float
) -> None:
    """The epochs that are left, with their validations; saves on the way, and ends early where a signal asks for it."""
    run, accelerator = training.run, training.accelerator

    def count() -> None:
        state["seconds"] = time.perf_counter() - started
        if training.meter:
            state["energy"] = training.meter.add_to(state.get("energy"))

    def save() -> None:
        count()
        states.save(state, num_steps(training, state))

    def leave_if_asked() -> None:
        if signal := interruption.agreed_signal():
            save()
            end_training(accelerator)
            if accelerator.is_main_process:
                tqdm.write(f"{signal.name}: the run is saved in {states.newest}. It goes on with --resume.")
            raise SystemExit(128 + signal)

    for epoch in range(state["epoch"], run.epochs):
        try:
            for _ in train_epoch(training, state):
                leave_if_asked()
                if run.save_steps and num_steps(training, state) - states.step >= run.save_steps:
                    save()
        except FloatingPointError:
            save()
            raise
        record: dict = {"epoch": epoch + 1, **epoch_means(state["totals"])}
        if run.streaming:
            record["corrupt_images"] = sum(gather_object([training.images.num_corrupt]))
        ranks = None
        if (epoch + 1) % run.eval_interval == 0 or epoch + 1 == run.epochs:
            save()  # a kill in the validation costs no step
            ranks, figures = validate_epoch(training, epoch)
            record |= figures
        state |= {"epoch": epoch + 1, "step": 0, "totals": {}, "history": [*state["history"], record]}
        count()
        if ranks is not None:
            state["best_epoch"] = best_record(state["history"])["epoch"]
            if accelerator.is_main_process:
                parts = (training.whole_model, training.processor, training.train_data)
                is_best = keep_best(run, command, *parts, state, ranks)
                if is_best and training.publishing and state["epoch"] < run.epochs:  # the last one has `finish`
                    training.publishing.start()
        save()
    leave_if_asked()


def set_up(run: RunArguments, fields: dict, accelerator: Accelerator) -> Training:
    """Data, model, order, optimiser and schedule of a run.

    Args:
        fields: of `GranAlignConfig`, as named in the recipe or on the command line.

    Raises:
        ValueError: the data or the model cannot be had, or there are fewer images than a batch needs.
    """
    meter = EnergyMeter(run.emissions_country) if run.measure_energy and accelerator.is_main_process else None

    # Data and model
    train_data = training_data(run, accelerator)
    val_data = load_split(run.dataset, run.validation_split, **run.load_options, streaming=run.streaming)
    val_data = val_data.first(run.max_eval_images)
    captions = [] if isinstance(train_data, StreamedImages) else train_data.all_captions
    model, processor = build(run, fields, captions)
    first = train_data.first_image() if isinstance(train_data, StreamedImages) else train_data.image(0)
    processor(images=first)  # refuses pictures for a model of region features, and the other way round
    if accelerator.is_main_process:
        processor.warn_of_truncation(captions + val_data.all_captions)
    val_features = None
    caption_order = noisy_order(len(captions), run.caption_noise, run.seed)
    images: TrainingSet
    collate: Collator | FeatureCollator = Collator(processor, run.caption_augmentation)
    if run.lora_rank:
        add_adapters(model, run)
    if isinstance(train_data, StreamedImages):
        images = train_data
    elif run.freeze_encoders:
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        model.to(accelerator.device)
        cache, is_quiet = Path("runs") / "features", not accelerator.is_main_process
        train_features = token_features(model, processor, train_data, cache, run.eval_batch_size, is_quiet)
        val_features = token_features(model, processor, val_data, cache, run.eval_batch_size, is_quiet)
        images = FeatureImages(train_features, run.captions_per_image, run.seed, caption_order)
        collate = FeatureCollator(train_features)
    else:
        images = TrainingImages(train_data.reordered(caption_order), run.captions_per_image, run.crop_scale, run.seed)

    # Order, optimiser, schedule
    order = torch.Generator()
    is_on_gpu = accelerator.device.type == "cuda"
    loader = training_loader(images, collate, run.batch_size, run.num_workers, order, is_pinned=is_on_gpu)
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=run.learning_rate)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    replica = copy.deepcopy(model).to(accelerator.device) if is_sharded else None
    encoder, optimizer, loader = prepare(accelerator, TokenEncoder(model), optimizer, loader)
    if len(loader) == 0:
        needed = run.batch_size * accelerator.num_processes
        raise ValueError(f"`batch_size` {run.batch_size} needs {needed} training images for one step, got {len(images)}.")
    num_updates = math.ceil(len(loader) / run.gradient_accumulation_steps)
    scheduler = accelerator.prepare_scheduler(make_scheduler(optimizer, run, num_updates))
    return Training(
        *(run, accelerator, train_data, val_data, val_features, processor, encoder, replica),
        *(images, order, loader, optimizer, scheduler),
        Publishing(run) if run.push_to_hub and accelerator.is_main_process else None,
        meter,
    )


def num_steps(training: Training, state: dict) -> int:
    """Those finished since the start of the run."""
    return state["epoch"] * len(training.loader) + state["step"]


def train_epoch(training: Training, state: dict) -> Iterator[None]:
    """What is left of an epoch; comes back after each step, when `state` tells of it.

    Its `totals` are the sums of the loss, of its terms and of what else [`log_step`] counts.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    run, accelerator, model = training.run, training.accelerator, training.model
    epoch, steps_per_epoch = state["epoch"], len(training.loader)
    training.order.manual_seed(run.seed * 100_003 + epoch)
    training.images.epoch = epoch
    model.train()
    rest_frozen_encoders(training.plain_model)
    use_hard_negatives = epoch >= run.warmup_epochs
    batches = training.loader
    if state["step"]:
        batches = skip_first_batches(batches, state["step"])  # of the order that the seed of the epoch decides on
    title, is_quiet = f"epoch {epoch + 1}/{run.epochs}", not accelerator.is_main_process
    bar = tqdm(batches, title, steps_per_epoch, initial=state["step"], disable=is_quiet)
    sums, names, before = copy.deepcopy(state["totals"]), [], Rollback(model, accelerator.device)
    throughput = Throughput(accelerator.num_processes)
    for step, batch in enumerate(throughput.watch(bar), state["step"]):
        where, grad_norm = f"epoch {epoch + 1}, step {step + 1}", None
        names += batch["image_names"]
        with before, accelerator.accumulate(model):
            cached = CachedTokens(accelerator, model, batch, run.micro_batch_size)
            loss, values = shared_loss(training.plain_model, cached.tokens, batch, use_hard_negatives)
            check_finite("loss", values["loss"], where, values, names, run.output_dir)
            loss.backward()
            cached.backward(accumulation_weight(step, steps_per_epoch, run.gradient_accumulation_steps))
            if accelerator.sync_gradients:
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), run.max_grad_norm))
                if not may_overflow(accelerator):
                    check_finite("norm of the gradient", grad_norm, where, values, names, run.output_dir)
            figures = (values, grad_norm, throughput.rates())
            now = state["epoch"] * steps_per_epoch + step
            log_step(accelerator, training.optimizer, sums, now, now // run.gradient_accumulation_steps, *figures)
            training.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                training.scheduler.step()
            training.optimizer.zero_grad()
        told = shown(throughput.rates(), training.images.num_corrupt)
        bar.set_postfix(loss=f"{values['loss']:.4f}", rsum=last_rsum(state), **told)
        if accelerator.sync_gradients:  # a state has no gradients that wait for others
            state |= {"step": step + 1, "totals": copy.deepcopy(sums)}
            names, before = [], Rollback(model, accelerator.device)
            yield
    warn_if_stuck(epoch_means(state["totals"]), run, training.plain_model.config.margin, use_hard_negatives)


def accumulation_weight(step: int, steps_per_epoch: int, accumulation_steps: int) -> float:
    """Of a step's gradient, on top of 1 / `accumulation_steps`: the last update of an epoch is the mean of fewer steps."""
    return accumulation_steps / min(accumulation_steps, steps_per_epoch - step // accumulation_steps * accumulation_steps)


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
    log_validation(accelerator, metrics, diagnostics, step)
    log_word_maps(accelerator, training.whole_model, training.processor, training.val_data, step)
    return ranks, {"validation": metrics, "diagnostics": diagnostics}


def make_scheduler(optimizer, run: RunArguments, steps_per_epoch: int):
    if run.lr_scheduler == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in run.lr_milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, run.lr_gamma)
    num_steps = run.epochs * steps_per_epoch
    return get_scheduler(run.lr_scheduler, optimizer, int(run.lr_warmup_share * num_steps), num_steps)


def warn_if_stuck(record: dict, run: RunArguments, margin: float, use_hard_negatives: bool) -> None:
    """A hinge of 2 x margin with hardest negatives means that all pairs score alike."""
    stuck = [
        name for name, value in record.items() if name.startswith("contrastive") and abs(value - 2 * margin) < 0.02 * margin
    ]
    if use_hard_negatives and stuck:
        logger.warning(
            f"{', '.join(stuck)} stays at 2 x margin = {2 * margin:.3f}: all pairs score alike, the model has collapsed. "
            f"Raise `warmup_epochs` (now {run.warmup_epochs}) or lower `learning_rate`."
        )


def last_rsum(state: dict) -> str:
    done = [record["validation"]["rsum"] for record in state["history"] if "validation" in record]
    return f"{done[-1]:.1f}" if done else "-"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step, after the last one, or for the second time
        raise SystemExit(128 + SIGINT) from None
