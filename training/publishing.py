"""The best checkpoint of a run on the Hub, in the background: a training neither waits for it nor ends by it."""

from __future__ import annotations

import shlex
import shutil
from concurrent.futures import Future, wait
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from granalign_hf.hub import bundle, publish, push
from granalign_hf.training.arguments import RunArguments

logger = get_logger(__name__)
UNFINISHED = "push-unfinished-"


class Publishing:
    """The pushes of a run, one at a time, by its main process."""

    def __init__(self, run: RunArguments):
        assert run.hub_model_id is not None  # the settings were checked
        self.folder, self.repo_id, self.private = Path(run.output_dir), run.hub_model_id, run.hub_private_repo
        self.api, self.pushed = HfApi(), Future[None]()
        self.pushed.set_result(None)
        disable_progress_bars()  # they would run through that of the epoch
        for copy in self.folder.glob(f"{UNFINISHED}*"):  # of a run that was killed
            shutil.rmtree(copy)

    def start(self) -> None:
        """Begins to push the best checkpoint, unless another push is in flight: [`finish`] makes up for it.

        What is pushed is a copy, so that the next one may take the place of the checkpoint meanwhile.
        """
        if not self.pushed.done():
            return
        try:
            copy = TemporaryDirectory(prefix=UNFINISHED, dir=self.folder)  # here, where weights are linked, not copied
            bundle(self.folder, copy.name, self.repo_id)
        except Exception as error:
            logger.warning(f"The best checkpoint is not pushed: {error}")
        else:
            self.pushed = self.api.run_as_future(self._publish, copy)

    def _publish(self, copy: TemporaryDirectory) -> None:
        with copy:
            try:
                publish(copy.name, self.repo_id, private=self.private)
            except Exception as error:
                logger.warning(f"A push of the best checkpoint has failed: {error}")

    def finish(self) -> None:
        """Waits for the push in flight, pushes the best checkpoint with the card of all epochs, and tells the outcome."""
        wait([self.pushed])
        try:
            published = push(self.folder, self.repo_id, private=self.private)
        except Exception as error:
            command = ["granalign", "push", str(self.folder), self.repo_id, *(["--private"] if self.private else [])]
            print(f"The best checkpoint is not on the Hub. {error}\nTo push it by hand: {shlex.join(command)}")
        else:
            print(f"The best checkpoint is on the Hub, where it gives the same scores: {published.url}")
