"""What `accelerate launch` decides on meets the settings of the run; where they contradict each other, nothing starts."""

from __future__ import annotations

from datetime import timedelta

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.runtime import computes_on_cpu, cpu_has_bfloat16

logger = get_logger(__name__)


def start_accelerator(run: RunArguments) -> Accelerator:
    """The accelerator of a run, in every process.

    Raises:
        ValueError: what was launched contradicts the settings; the message names both.
    """
    precision = supported_precision(run.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if run.report_to == ["none"] else run.report_to,
        project_dir=run.output_dir,
        step_scheduler_with_optimizer=False,  # else it takes a step for every process, not one for all of them
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=4)),  # the first one may compute features alone
        ],
    )
    if problems := _problems(run, accelerator):
        raise ValueError("\n".join(problems))
    if precision != run.mixed_precision:
        logger.warning(
            f"`mixed_precision` {run.mixed_precision}: this CPU has no instructions for bfloat16, with which a product "
            "would take a hundred times as long. The run computes in float32, and its record says so."
        )
    if plugin := getattr(accelerator.state, "fsdp_plugin", None):
        plugin.mixed_precision_policy = MixedPrecisionPolicy()  # autocast alone rounds: tokens and gradients stay float32
    return accelerator


def supported_precision(mixed_precision: str) -> str:
    """`no` in the place of `bf16` on a CPU without instructions for it, where a product takes a hundred times as long."""
    return "no" if mixed_precision == "bf16" and computes_on_cpu() and not cpu_has_bfloat16() else mixed_precision


def _problems(run: RunArguments, accelerator: Accelerator) -> list[str]:
    problems = []
    if run.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        problems.append("`mixed_precision` fp16 needs a GPU: Accelerate would compute in float32 here. Use bf16 or no.")
    launched = accelerator.gradient_accumulation_steps
    if launched != run.gradient_accumulation_steps:
        problems.append(
            f"`gradient_accumulation_steps` is {run.gradient_accumulation_steps} in the settings of the run and {launched} "
            "in the config of `accelerate launch`, which would win. Write the same in both."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        problems += _deepspeed_problems(run, accelerator.state.deepspeed_plugin)
    return problems


def _deepspeed_problems(run: RunArguments, plugin) -> list[str]:
    problems = [
        f"`{name}` does not work under DeepSpeed, {why}. Use FSDP, or leave it out."
        for name, is_set, why in (
            (
                "micro_batch_size",
                run.micro_batch_size is not None,
                "which updates the weights with the first part of a batch",
            ),
            ("streaming", run.streaming, "which takes its batch size from the loader of a table"),
        )
        if is_set
    ]
    clipping = plugin.deepspeed_config.get("gradient_clipping")
    if clipping != run.max_grad_norm:
        problems.append(
            f"`max_grad_norm` is {run.max_grad_norm} in the settings of the run and `gradient_clipping` {clipping} in the "
            "config of DeepSpeed, which alone counts there. Write the same in both."
        )
    return problems
