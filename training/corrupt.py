"""Training images that cannot be read: found before the first step, named, counted, and left out up to a share."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.pictures import UnreadableImageError

logger = logging.getLogger(__name__)


class _Errors(Dataset):
    """For each image what is wrong with it, empty where it can be read."""

    def __init__(self, data: CaptionedImages):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> str:
        try:
            self.data.image(number)
        except UnreadableImageError as error:
            return str(error)
        return ""


def without_corrupt(data: CaptionedImages, max_share: float, num_workers: int) -> CaptionedImages:
    """The images that can be read; the others stand in `corrupt`. Every image is decoded once, by all processes together.

    Raises:
        ValueError: more than the share cannot be read; the message names the first of them.
    """
    state = PartialState()
    mine = range(state.process_index, len(data), state.num_processes)
    loader = DataLoader(Subset(_Errors(data), list(mine)), batch_size=32, num_workers=num_workers, collate_fn=list)
    bar = tqdm(loader, desc="reading every image once", disable=not state.is_main_process)
    found = zip(mine, itertools.chain.from_iterable(bar), strict=True)
    errors = dict(sorted(gather_object([(number, error) for number, error in found if error])))
    told = f"{len(errors)} of {len(data)} training images cannot be read"
    if len(errors) > max_share * len(data):
        raise ValueError(
            f"{told}, more than `max_corrupt_share` {max_share} allows. The first: {'; '.join([*errors.values()][:5])}"
        )
    if errors and state.is_main_process:
        logger.warning("%s and are left out:\n%s", told, "\n".join(errors.values()))
    readable = data.only(number for number in range(len(data)) if number not in errors)
    return replace(readable, corrupt=[data.image_ids[number] for number in errors])
