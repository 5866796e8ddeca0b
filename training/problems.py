"""What is wrong with the settings of a model, before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from granalign_hf.modeling.configuration_granalign import ALIGNER_FIELDS, GranAlignConfig

SWITCHES = {  # of GRM, with the fields that have no effect where it is off
    "use_region_prompts": ("num_regions", "region_logit_scale"),
    "use_region_uncertainty": ("kl_weight",),
}


def settle_fields(
    fields: dict, recipe: dict, given: set[str], checkpoint: str | None, where: Callable[[str], str]
) -> tuple[dict, list[str]]:
    """The fields of `GranAlignConfig` that count, and what is wrong with them.

    A field that has no effect is refused. One of the recipe that had an effect there, and has none since the command line
    names another aligner or switches a part off, is left out.

    Args:
        fields: as named in the recipe or on the command line. recipe: its settings. given: names on the command line.
        checkpoint: that the run starts from; it has the fields that are not named. where: of a name, where it was given.
    """
    before = _fields_of_checkpoint(checkpoint)
    if before is None and "aligner" not in fields:
        return fields, []  # of a model that is not here
    whole = {**(before or {}), **fields}
    useless, useless_in_recipe = _useless(whole), _useless({**(before or {}), **recipe})
    left_out = {name for name in fields if name in useless and name not in given and name not in useless_in_recipe}
    problems = [
        f"{name} ({where(name)}) has no effect: {useless[name]}"
        for name in fields
        if name in useless and name not in left_out
    ]
    try:
        GranAlignConfig(**{"special_token_ids": [0, 1], **{n: v for n, v in whole.items() if n not in useless}})
    except (StrictDataclassError, ValueError) as error:
        problems.append(str(error.__cause__ or error))
    return {name: value for name, value in fields.items() if name not in left_out}, problems


def _useless(fields: dict) -> dict[str, str]:
    """Field -> why it has no effect beside these."""
    aligner = fields.get("aligner", GranAlignConfig.aligner)
    own = ALIGNER_FIELDS.get(aligner)
    if own is None:
        return {}
    others = {name for names in ALIGNER_FIELDS.values() for name in names if name not in own}
    reasons = dict.fromkeys(others, f"the aligner {aligner} does not use it")
    for switch, names in SWITCHES.items():
        if switch in own and fields.get(switch) is False:
            reasons |= dict.fromkeys(names, f"{switch} is false")
    return reasons


def _fields_of_checkpoint(checkpoint: str | None) -> dict | None:
    """Those that `GranAlignConfig` adds; `None` where the checkpoint is not in a folder here."""
    if checkpoint is None:
        return {}
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    return {
        n: config[n] for n in GranAlignConfig.__annotations__ if n in config and n not in ("vision_config", "text_config")
    }
