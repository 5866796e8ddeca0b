"""The training script on several processes, replicated and in shards, and the configs that `accelerate launch` takes."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import run_processes
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from granalign_hf.training import launch, train
from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.launch import _deepspeed_problems
from granalign_hf.training.states import States

CONFIGS = Path(train.__file__).parent / "accelerate_configs"
# Nothing of chance within the model, so that it does not matter who encodes what.
RUN = [
    *("--num_scenes", "24", "--max_eval_images", "4", "--epochs", "2", "--eval_interval", "1", "--warmup_epochs", "1"),
    *("--report_to", "none"),
    *("--aligner", "max_mean", "--projection_dim", "16", "--patch_pool_size", "2", "--learning_rate", "1e-3"),
    *("--vision_config", json.dumps({"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "image_size": 48,
                                     "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8})),
    *("--text_config", json.dumps({"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "intermediate_size": 16, "max_position_embeddings": 48, "hidden_dropout_prob": 0.0,
                                   "attention_probs_dropout_prob": 0.0})),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train.main([*RUN, "--batch_size", "8", "--output_dir", str(folder)])


def assert_same_run(folder: Path, alone: tuple[Path, dict]) -> None:
    """The losses of every epoch and the weights of the best are those of one process."""
    expected_folder, state = alone
    history = json.loads((folder / "metrics.json").read_text())["history"]
    for record, expected in zip(history, state["history"], strict=True):
        for name in ("loss", "contrastive"):
            assert record[name] == pytest.approx(expected[name], abs=1e-5)
        assert record["validation"] == expected["validation"]
    expected = AutoModel.from_pretrained(expected_folder).state_dict()
    for name, weight in AutoModel.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def replicated(rank: int, folder: Path) -> None:
    train.main([*RUN, "--batch_size", "4", "--micro_batch_size", "3", "--output_dir", str(folder)])


def test_two_processes_train_the_weights_of_one(alone, tmp_path):
    run_processes(replicated, 2, tmp_path)
    assert_same_run(tmp_path, alone)


def poisoned(rank: int, folder: Path) -> None:
    """In the third step the second process has a gradient that is not finite."""
    original, gradients = train.build, []

    def poison(gradient):
        gradients.append(gradient)
        return gradient * torch.inf if rank == 1 and len(gradients) == 3 else gradient

    def build(*args):
        model, processor = original(*args)
        model.word_projection.weight.register_hook(poison)
        return model, processor

    train.build = build
    with pytest.raises(FloatingPointError) as raised:
        train.main([*RUN, "--batch_size", "4", "--output_dir", str(folder)])
    (folder / f"message-{rank}").write_text(str(raised.value))


def test_all_processes_stop_where_one_has_a_gradient_that_is_not_finite(tmp_path):
    run_processes(poisoned, 2, tmp_path)
    messages = [(tmp_path / f"message-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "The norm of the gradient is inf at epoch 1, step 3: loss 0." in messages[0] and "contrastive 0." in messages[0]
    assert messages[0].partition("Images of the batch: ")[2].count(",") == 7  # those of both processes
    assert (tmp_path / "state" / "step-2" / "progress.json").is_file()


def launch_environment(config: str, *words: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), *words, "train.py"])
    args, _, _ = _validate_launch_command(args)
    return {n: v for n, v in prepare_multi_gpu_env(args).items() if n.startswith(("FSDP_", "ACCELERATE_"))}


def shard(precision: str = "no") -> None:
    """Accelerate takes FSDP for accelerators only, so that it has to be told; the shards and their collectives are real."""
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    state = AcceleratorState(precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if precision != "no":
        plugin.set_mixed_precision(precision)  # as Accelerate does


def sharded_in_bf16(rank: int, folder: Path) -> None:
    shard("bf16")
    launch.cpu_has_bfloat16 = lambda: True  # slow as it may be
    original, dtypes = train.shared_loss, set()

    def shared_loss(model, tokens, *args):
        dtypes.update(values.dtype for values in tokens.values() if values.is_floating_point())
        return original(model, tokens, *args)

    train.shared_loss = shared_loss
    words = ["--mixed_precision", "bf16", "--batch_size", "4", "--epochs", "1"]
    train.main([*RUN, *words, "--output_dir", str(folder)])
    assert dtypes == {torch.float32}


def test_shards_in_bf16_score_tokens_in_float32(tmp_path):
    run_processes(sharded_in_bf16, 2, tmp_path, **launch_environment("fsdp2.yaml", "--num_processes", "2"))


def sharded(rank: int, folder: Path) -> None:
    shard()
    original = train.train_epoch

    def train_epoch(training, *args):
        parameters = dict(training.model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        assert training.model._no_split_modules == ["BertEmbeddings", "BertLayer", "ViTEmbeddings", "ViTLayer"]
        return original(training, *args)

    train.train_epoch = train_epoch
    argv = [*RUN, "--batch_size", "4", "--micro_batch_size", "2", "--output_dir", str(folder)]
    save = States.save

    def interrupt(states, state, step):
        save(states, state, step)
        raise KeyboardInterrupt

    States.save = interrupt
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    States.save = save
    train.main([*argv, "--resume"])


def test_shards_train_the_weights_of_one_process(alone, tmp_path):
    run_processes(sharded, 2, tmp_path, **launch_environment("fsdp2.yaml", "--num_processes", "2"))
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_every_field_of_a_config(path):
    config = load_config_from_file(str(path))  # refuses fields that it does not know
    settings = yaml.safe_load(path.read_text())
    args = vars(launch_command_parser().parse_args(["train.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(settings.get(section, {})) <= set(args), section  # the options of `accelerate launch`
    assert path.read_text().startswith(f"# accelerate launch --config_file training/accelerate_configs/{path.name} ")
    assert config.distributed_type == settings["distributed_type"] and config.num_processes == 8


def test_deepspeed_config_is_what_the_plugin_reads(monkeypatch):
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "deepspeed_zero2.yaml"), "train.py"])
    args, _, _ = _validate_launch_command(args)
    fields = DeepSpeedPlugin.__dataclass_fields__
    given = yaml.safe_load((CONFIGS / "deepspeed_zero2.yaml").read_text())["deepspeed_config"]
    assert {*given} - {"deepspeed_multinode_launcher"} <= {*fields}
    assert (args.use_deepspeed, args.zero_stage, args.gradient_clipping) == (True, 2, 2.0)


def test_what_was_launched_must_not_contradict_the_run(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # of the config of `accelerate launch`
    with pytest.raises(
        ValueError, match=r"`gradient_accumulation_steps` is 1 in the settings of the run and 4 in the config"
    ):
        train.main([*RUN, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": 2}, "`micro_batch_size` does not work under DeepSpeed"),
        ({"streaming": True}, "`streaming` does not work under DeepSpeed"),
        ({"max_grad_norm": 1.0}, "`max_grad_norm` is 1.0 in the settings of the run and `gradient_clipping` 2.0"),
    ],
)
def test_what_deepspeed_cannot_do_or_decides_alone_is_refused(settings, message):
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": 2.0})
    assert not _deepspeed_problems(RunArguments(), plugin)
    (problem,) = _deepspeed_problems(RunArguments(**settings), plugin)
    assert message in problem


def test_worked_example_of_several_machines_is_understood():
    text = (CONFIGS / "README.md").read_text()
    commands = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("accelerate launch")]
    ranks = []
    for command in commands:
        args = launch_command_parser().parse_args(shlex.split(command)[2:])
        assert (CONFIGS.parent.parent / args.config_file).is_file()
        assert (CONFIGS.parent.parent / args.training_script_args[0]).is_file() and args.num_processes == 16
        ranks.append((args.machine_rank, args.num_machines))
    assert ranks == [(0, 2), (1, 2)]
