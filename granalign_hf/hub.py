"""Checkpoints on the Hub: what of a folder is published, in one commit, and whether what was published scores the same."""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from . import fixed_scores, modeling
from .examples import PHOTOGRAPHS, SCENES
from .model_card import PICTURES, model_card

HERE = Path(__file__).parent
CODE = sorted(path.name for path in Path(modeling.__file__).parent.glob("*.py") if path.name != "__init__.py")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
# What a processor writes: that of this package, and the tokenizers of all kinds.
PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
KEPT = ("config.json", *WEIGHTS, *PROCESSOR, *CODE, *PICTURES)
SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "multi_vectors.MultiVectors"}],
    "config_sentence_transformers.json": {"model_type": "MultiVectorEncoder", "similarity_fn_name": "meanmaxsim"},
}
WAITS = (1, 5)  # seconds before another try
# Of `huggingface_hub`, where the Hub is the reason: a RuntimeError is around another one, and a gateway sends no JSON.
FAILURES = (HTTPError, RuntimeError, json.JSONDecodeError)
TOLERANCE = 1e-6  # of a score: a GRU rounds by where its weights lie in memory
WITHOUT_PACKAGE = f"""
import sys
sys.modules["granalign_hf"] = None  # as if it were not installed
exec({Path(fixed_scores.__file__).read_text(encoding="utf-8")!r})
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """What a push has left on the Hub.

    Attributes:
        url: of the commit. commit: its id; that of before, if nothing had changed. files: all that were pushed.
        difference: the largest one between a score here and one of what was downloaded again.
    """

    repo_id: str
    url: str
    commit: str
    files: list[str]
    difference: float


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    license: str | None = None,
    token: str | None = None,
) -> Published:
    """
    Publishes a checkpoint, in one commit, downloads it again and compares its scores in a process without this package.

    Args:
        folder: a checkpoint, such as the `output_dir` of a training. What else is in there stays here.
        repo_id: `org/name`. The repository is made if it does not exist.
        private: for a new repository. Default: what is set for `org`.
        revision: a branch, made if it does not exist. Default: `main`.
        license: of the weights, as the Hub spells it, such as "cc-by-nc-4.0". Default: none is claimed.
        token: Default: that of `hf auth login` or of `HF_TOKEN`.

    Raises:
        ValueError: the folder is no checkpoint, or the name of the repository is wrong.
        PermissionError: there is no token, it has expired, or it has no right to write there.
        ConnectionError: the Hub cannot be reached.
        OSError: the Hub fails, or what was published does not run without this package, or scores differently. What was
            published by then stays, and the message tells; a repository that had to be made may stay, empty.
    """
    check_repo_id(repo_id)
    with TemporaryDirectory() as target:
        bundle(folder, target, repo_id, license)
        return publish(target, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless the Hub could have a repository of this name."""
    try:
        validate_repo_id(repo_id)
        problem = "" if "/" in repo_id else "the name of the user or organisation is missing"
    except HFValidationError as error:
        problem = str(error).rstrip(".")
    if problem:
        raise ValueError(f"A repository on the Hub is named org/name, got {repo_id!r}: {problem}.")


def bundle(folder: str | os.PathLike, target: str | os.PathLike, repo_id: str, license: str | None = None) -> None:
    """
    Copies what is published of a checkpoint into another folder: weights, configs, tokenizer, code and pictures; and adds
    the card, `handler.py` for Inference Endpoints, what sentence-transformers loads, and the pictures of the widget.

    Raises:
        ValueError: the folder is no checkpoint; the message tells what is missing.
    """
    folder, target = Path(folder), Path(target)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    kept = [name for name in names if _matches(name, KEPT)]
    missing = [name for name in ("config.json", "processor_config.json", *CODE) if name not in kept]
    missing += [] if any(_matches(name, WEIGHTS) for name in kept) else ["model.safetensors"]
    if missing:
        told = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{folder} is no complete checkpoint of granalign: {told} missing. Load model and processor with this "
            "version and save both with `save_pretrained`."
        )
    for name in kept:
        _place(folder / name, target / name)
    shutil.copyfile(HERE / "handler.py", target / "handler.py")
    add_multi_vectors(target)
    card = model_card(folder, repo_id=repo_id, license=license)
    (target / "README.md").write_text(card, encoding="utf-8")
    for example in (*SCENES, *PHOTOGRAPHS):
        if example.file in card:
            (target / example.file).write_bytes(files("granalign_hf.model_cards").joinpath(example.file).read_bytes())


def add_multi_vectors(folder: Path) -> None:
    """Writes beside a checkpoint what sentence-transformers needs to load it as a multi-vector encoder."""
    shutil.copyfile(HERE / "multi_vectors.py", folder / "multi_vectors.py")
    for name, content in SENTENCE_TRANSFORMERS.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
) -> Published:
    """Publishes all files of a folder that [`bundle`] filled, and compares. Arguments and errors as in [`push`]."""
    token = token or get_token()
    if token is None:
        raise PermissionError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    folder, api = Path(folder), HfApi(token=token)
    names = sorted(path.name for path in folder.iterdir())
    expected = _scores(folder, ["-m", fixed_scores.__name__])  # first, since nobody can use what does not even load here

    def commit() -> Any:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        # Of other weights or another tokenizer nothing may stay: shards of before would be loaded in the place of these.
        old = [file.rfilename for file in before.siblings or [] if _matches(file.rfilename, KEPT)]
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in names]
        operations += [CommitOperationDelete(name) for name in old if name not in names]
        target = {"revision": revision, "parent_commit": before.sha}
        return api.create_commit(repo_id, operations, commit_message=commit_message, **target)

    with _clear_errors(repo_id, api.endpoint, f"Nothing was published to {repo_id}."):
        done = _with_retries(commit)
    with TemporaryDirectory() as fresh:
        with _clear_errors(repo_id, api.endpoint, f"{done.commit_url} was published, but not compared."):
            _with_retries(lambda: api.snapshot_download(repo_id, revision=done.oid, local_dir=fresh, allow_patterns=names))
        is_same = filecmp.cmpfiles(folder, fresh, names, shallow=False)[0] == names
        try:
            scores = _scores(Path(fresh), ["-c", WITHOUT_PACKAGE]) if is_same else []
        except ValueError as error:
            raise OSError(f"{done.commit_url} was published, but without this package: {error}") from error
    difference = max((abs(one - other) for one, other in zip(expected, scores)), default=math.inf)
    if not difference <= TOLERANCE:
        told = f"scores that differ by {difference:.2g}" if is_same else "other files"
        raise OSError(f"{done.commit_url} was published, but what comes back from there has {told}. Push once more.")
    return Published(repo_id, str(done.commit_url), done.oid, names, difference)


def _scores(folder: Path, words: Sequence[str]) -> list[float]:
    """Of fixed inputs by a process that starts with these words.

    Raises:
        ValueError: the checkpoint cannot be loaded or run.
    """
    with TemporaryDirectory() as place:
        out = Path(place, "scores.json")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": place, "HF_MODULES_CACHE": place}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *words, str(folder.resolve()), str(out)]
        run = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
            raise ValueError(f"The checkpoint does not run in a process of its own: {reason}")
        return [score for row in json.loads(out.read_text()) for score in row]


# ------------------------------------------------------------------------------------------------------- what goes wrong


def _with_retries(call: Callable[[], T]) -> T:
    """Tries again where the Hub failed, was not reached, or the repository had changed meanwhile.

    The call has to begin anew and not to repeat what has arrived, although its answer got lost.
    """
    for wait in WAITS:
        try:
            return call()
        except FAILURES as error:
            status = _status(error)
            if status is not None and status < 500 and status not in (408, 409, 412, 429):
                raise
            time.sleep(wait)
    return call()


def _status(error: Exception) -> int | None:
    """What the Hub has answered, if it has."""
    response = getattr(_cause(error), "response", None)
    return None if response is None else response.status_code


def _cause(error: Exception) -> BaseException:
    """Of an upload that failed: `huggingface_hub` wraps it."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


@contextmanager
def _clear_errors(repo_id: str, endpoint: str, outcome: str) -> Iterator[None]:
    """One message for what the Hub or the way to it did, with what has come of it; raises as [`push`] tells."""
    try:
        yield
    except (*FAILURES, ConnectionError, LocalEntryNotFoundError) as error:
        if not isinstance(_cause(error), HTTPError | OSError | json.JSONDecodeError):
            raise
        status, cause = _status(error), " ".join(str(_cause(error)).split()).rstrip(".")
        if status == 401:
            raise PermissionError(
                f"{endpoint} does not accept the token: it is wrong or has expired. Log in with `hf auth login`, or set "
                f"HF_TOKEN. {outcome}"
            ) from error
        if status == 403:
            raise PermissionError(
                f"The token has no right to write to {repo_id} on {endpoint}. Mend the name, or take a token that has it. "
                f"{outcome}"
            ) from error
        if status is None:
            raise ConnectionError(f"{endpoint} cannot be reached: {cause}. {outcome}") from error
        if status < 500:
            raise ValueError(f"{endpoint} refuses {repo_id}: {cause}.") from error
        raise OSError(f"{endpoint} fails with {status}, also when asked again. {outcome}") from error


# ---------------------------------------------------------------------------------------------------------------- files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _place(source: Path, target: Path) -> None:
    """Weights are linked where they can be: they are large, and written anew each time, never changed."""
    if _matches(source.name, WEIGHTS):
        with suppress(OSError):
            os.link(source.resolve(), target)  # in the Hub's cache files are symbolic links
            return
    shutil.copyfile(source, target)
