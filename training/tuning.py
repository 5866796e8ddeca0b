"""Which parts of the encoders learn, and how fast: groups of the optimiser, layer-wise rates, LoRA, frozen sides."""

from __future__ import annotations

import re

from torch import Tensor, nn

from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.training.arguments import RunArguments

SIDES = ("vision", "text")
_ADAPTER = "default"  # PEFT's own name of the first adapter
# A block: an element of a list of layers, or of the list within a stage (Swin, ConvNeXt, ResNet); a GRU is one block.
_BLOCK = re.compile(r"(?:^|.*?\.)(?:stages|layers?)\.\d+(?:\.(?:blocks|layers)\.\d+)?(?=\.)|^gru(?=\.)")


# --------------------------------------------------------------------------------------------------------------- rates


def parameter_groups(model: GranAlignModel, run: RunArguments) -> list[dict]:
    """What trains, for the optimiser: new layers at the full rate, encoders at a part of it; weight decay for matrices only.

    With `layer_decay` below 1 an encoder of n blocks has n + 2 rates, its own times layer_decay^(n + 1 - depth), see
    [`layer_depths`] (Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022).
    """
    of_encoders = _encoder_factors(model, run)
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        label, factor = of_encoders.get(name, ("new_layers", 1.0))
        is_matrix = parameter.ndim > 1
        decay = run.weight_decay if is_matrix else 0.0
        group = {"params": [], "weight_decay": decay, "lr": run.learning_rate * factor, "name": label}
        groups.setdefault((label, is_matrix), group)["params"].append(parameter)
    return list(groups.values())


def _encoder_factors(model: GranAlignModel, run: RunArguments) -> dict[str, tuple[str, float]]:
    """Parameter of an encoder -> the name of its group, and the factor on the learning rate."""
    factors = {}
    for side in SIDES:
        depths, num_blocks = layer_depths(getattr(model, f"{side}_model"))
        for name, depth in depths.items():
            label = "encoders" if run.layer_decay == 1 else f"{side}_{depth}"
            factor = run.encoder_lr_factor * run.layer_decay ** (num_blocks + 1 - depth)
            factors[f"{side}_model.{name}"] = (label, factor)
    return factors


def layer_depths(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter -> how deep it lies in an encoder of n blocks: 0 embeddings, 1 to n the blocks, n + 1 what follows; and n.

    What stands between two blocks (the merging of patches in Swin, the downsampling in ConvNeXt) goes with the second.
    """
    names = [name for name, _ in encoder.named_parameters()]  # in the order of the layers
    found = {name: match[0] for name in names if (match := _BLOCK.match(name))}
    lists = dict.fromkeys(found.values())
    blocks = [block for block in lists if not any(other.startswith(f"{block}.") for other in lists)]  # no stages
    number = {block: depth for depth, block in enumerate(blocks, start=1)}
    depths, depth = {}, len(blocks) + 1
    for name in reversed(names):
        depth = number.get(found.get(name, ""), depth)
        depths[name] = depth
    first = next((place for place, name in enumerate(names) if found.get(name) in number), len(names))
    # Tables that all blocks share are registered after them: MPNet's relative positions.
    tables = {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Embedding)}
    shared = [name for name in names if name in tables and found.get(name) not in number]
    return depths | dict.fromkeys([*names[:first], *shared], 0), len(blocks)


# ---------------------------------------------------------------------------------------------------------------- LoRA


def add_adapters(model: GranAlignModel, run: RunArguments) -> None:
    """LoRA (Hu et al., 2022) in the encoders that `lora_encoders` names; all else in both encoders is frozen.

    Raises:
        ValueError: an encoder has no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra, which the settings have asked for

    for side in SIDES:
        encoder = getattr(model, f"{side}_model")
        if run.lora_encoders not in (side, "both"):
            encoder.requires_grad_(False)
            continue
        targets = adapted_layers(encoder)
        if not targets:
            raise ValueError(
                f"LoRA adapts linear layers, and the {side} encoder ({encoder.config.model_type}) has none. Set "
                f"`lora_encoders` to the other side, or train without `lora_rank`."
            )
        inject_adapter_in_model(LoraConfig(r=run.lora_rank, lora_alpha=run.lora_alpha, target_modules=targets), encoder)


def adapted_layers(encoder: nn.Module) -> list[str]:
    """The linear layers that get an adapter: the projections of attention, or all where there is no attention."""
    linear = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False))
    ]
    attention = [f"{name}." for name, module in encoder.named_modules() if type(module).__name__.endswith("Attention")]
    # Swin v2 has a small network of its position biases in there.
    return [name for name in linear if name.startswith((*attention,)) and "position_bias" not in name] or linear


def merged_state(model: GranAlignModel) -> dict[str, Tensor]:
    """The weights of a plain model: every adapter is added to the matrix that it stands beside, W + (alpha / rank) B A.

    The model itself stays as it is: adding to its weights and subtracting again would not give them back.
    """
    merged = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (merged.pop(f"{name}.{part}.{_ADAPTER}.weight") for part in ("lora_A", "lora_B"))
            merged[f"{name}.base_layer.weight"] = merged[f"{name}.base_layer.weight"] + module.scaling[_ADAPTER] * (
                up @ down
            )
    return {name.replace(".base_layer.", "."): value for name, value in merged.items()}


def rest_frozen_encoders(model: GranAlignModel) -> None:
    """An encoder without anything to learn leaves training mode: no dropout, and statistics of batch norm stay."""
    for encoder in (model.vision_model, model.text_model):
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
