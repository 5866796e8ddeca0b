"""Publishing, over HTTP: the real client against a small Hub, and back again in a process without this package."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from PIL import Image
from test_loading import WITHOUT_PACKAGE
from test_train import TINY
from tiny import region_model_and_processor, tiny_model, tiny_processor

from granalign_hf import fixed_scores, hub
from granalign_hf.evaluation import ranks_to_metrics
from granalign_hf.hub import CODE, SENTENCE_TRANSFORMERS, bundle, check_repo_id, publish, push
from granalign_hf.training import publishing, train
from granalign_hf.training.publishing import Publishing

REPO = "org/granalign"
TOKEN, OTHERS_TOKEN, EXPIRED = "hf_writer", "hf_somebody", "hf_expired"
# The client's own way of sending a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
BESIDE = ("metrics.json", "ranks-validation.npz", "notes.txt", "training.log")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint among the other files of a training."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    for name in BESIDE:
        (folder / name).write_text(json.dumps({"data_notes": [f"see {folder}/data"]}))
    (folder / "state" / "step-3").mkdir(parents=True)
    (folder / "state" / "step-3" / "model.safetensors").write_text("state")
    Image.new("RGB", (4, 4)).save(folder / "learning_curve.png")
    return folder


@pytest.fixture
def server(monkeypatch):
    with HubServer({TOKEN: {"org", "ann"}, OTHERS_TOKEN: {"bob"}}) as server:
        # What HF_ENDPOINT decides on when `huggingface_hub` is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "WAITS", (0, 0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def bundled(folder, tmp_path, monkeypatch) -> Path:
    """What is published of the checkpoint; its scores are taken as equal, which a test of their own looks at."""
    target = tmp_path / "bundle"
    target.mkdir()
    bundle(folder, target, REPO)
    monkeypatch.setattr(hub, "_scores", lambda *_: [0.5])
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def on_the_hub(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = dict(server.repositories[REPO].at(revision).files)
    del files[".gitattributes"]
    return files


# ---------------------------------------------------------------------------------------------------------- what is sent


def test_a_bundle_has_what_is_published_and_nothing_else(folder, tmp_path):
    bundle(folder, tmp_path, REPO)
    files = files_of(tmp_path)
    own = {"README.md", "handler.py", "multi_vectors.py", *SENTENCE_TRANSFORMERS, "widget-3.jpg", "widget-4.jpg"}
    saved = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {*files} == {path.name for path in tmp_path.iterdir()} == {*CODE} | own | saved | {"learning_curve.png"}
    for name in {*files} - own:
        assert files[name] == (folder / name).read_bytes(), name
    for name, content in files.items():
        assert str(folder).encode() not in content, name
    assert "license:" not in files["README.md"].decode()
    (tmp_path / "licensed").mkdir()
    bundle(folder, tmp_path / "licensed", REPO, license="cc-by-nc-4.0")
    assert "\nlicense: cc-by-nc-4.0\n" in (tmp_path / "licensed" / "README.md").read_text()
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in files["README.md"].decode()


def test_a_bundle_keeps_its_weights_when_the_next_checkpoint_takes_the_place(folder, tmp_path):
    run, target = tmp_path / "run", tmp_path / "target"
    target.mkdir()
    tiny_model().save_pretrained(run)
    tiny_processor().save_pretrained(run)
    before = (run / "model.safetensors").read_bytes()
    bundle(run, target, REPO)
    tiny_model(seed=1).save_pretrained(tmp_path / "next")
    (tmp_path / "next" / "model.safetensors").replace(run / "model.safetensors")  # as a training does it
    assert (target / "model.safetensors").read_bytes() == before != (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (["config.json"], "config.json missing"),
        (["model.safetensors"], "model.safetensors missing"),
        (CODE, f"{', '.join(CODE[:3])} and {len(CODE) - 3} more missing"),
    ],
)
def test_a_folder_that_is_no_checkpoint(folder, tmp_path, lost, told):
    for name, content in files_of(folder).items():
        if name not in lost:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"is no complete checkpoint of granalign: {told}"):
        push(tmp_path, REPO, token=TOKEN)
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        push(tmp_path / "nowhere", REPO, token=TOKEN)


@pytest.mark.parametrize("name", ["granalign", "org/a/b", "org/a b", "org/-a", "org/a--b", "/a", ""])
def test_names_that_no_repository_can_have(folder, name):
    with pytest.raises(ValueError, match=r"is named org/name, got"):
        check_repo_id(name)
    with pytest.raises(ValueError, match=r"is named org/name, got"):
        push(folder, name)


# ------------------------------------------------------------------------------------------------------- there and back

PULL = """
import sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

repo, picture, captions = sys.argv[1], Image.open(sys.argv[2]), sys.argv[4:]
model = AutoModel.from_pretrained(repo, **code)
processor = AutoProcessor.from_pretrained(repo, **code)
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    scores = model(**processor(images=picture, text=captions, return_tensors="pt")).logits_per_image
words = pipeline("image-text-alignment", model=repo, **code)(picture, text=captions[0])
torch.save((scores, words), sys.argv[3])
"""


def test_there_and_back_in_processes_of_their_own(folder, tmp_path):
    """`granalign push` and a stranger's three lines, both through HF_ENDPOINT."""
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "picture.png")
    captions = ["a red dog", "the green square on a cat"]
    with HubServer({TOKEN: {"org"}}) as server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""}
        options = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
        command = [sys.executable, "-m", "granalign_hf.cli", "push", str(folder), REPO, "--private", "--json"]
        pushed = subprocess.run(command, **options)
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        answer = json.loads(pushed.stdout)
        assert answer["difference"] == 0 and answer["commit"] == server.repositories[REPO].main.oid
        assert server.repositories[REPO].is_private and len(server.repositories[REPO].commits) == 2
        names = [REPO, "picture.png", "scores.pt", *captions]
        pulled = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE + PULL, *names], **options)
        assert pulled.returncode == 0, pulled.stderr[-3000:]
    scores, words = torch.load(tmp_path / "scores.pt")
    inputs = tiny_processor()(images=Image.fromarray(noise.numpy()), text=captions, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(scores, tiny_model()(**inputs).logits_per_image)
    assert [word["word"] for word in words["words"]] == captions[0].split()


def test_what_is_published_is_compared(bundled, server, monkeypatch):
    server.spoilt.add("config.json")
    with pytest.raises(OSError, match=r"/commit/\w+ was published, but what comes back from there has other files"):
        publish(bundled, REPO)
    server.spoilt.clear()
    scores = iter([[0.5, 0.25], [0.5, 0.26]])
    monkeypatch.setattr(hub, "_scores", lambda *_: next(scores))
    with pytest.raises(OSError, match=r"has scores that differ by 0\.01"):
        publish(bundled, REPO)


def test_what_does_not_run_here_is_not_published(folder, tmp_path, server):
    for name, content in files_of(folder).items():
        (tmp_path / name).write_bytes(content[:-100] if name == "model.safetensors" else content)
    with pytest.raises(ValueError, match=r"The checkpoint does not run in a process of its own: .*Safetensor"):
        push(tmp_path, REPO)
    assert not server.requests


def test_scores_of_features_of_regions(tmp_path):
    model, processor = region_model_and_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scores = torch.tensor(fixed_scores.fixed_scores(str(tmp_path)))
    assert scores.shape == (2, 3) and scores.std() > 0


def test_large_files_go_in_several_pieces_and_come_back_by_range(bundled, server, tmp_path, monkeypatch):
    publish(bundled, REPO)
    weights = (bundled / "model.safetensors").read_bytes()
    pieces = [line for line in server.requests if line.startswith("PUT /lfs/") and line.count("/") == 3]
    assert len(weights) > 50_000 and len(pieces) >= -(-len(weights) // 50_000)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.failures.append(("GET /cdn/", "answer"))
    path = HfApi().hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == weights and not server.failures
    assert server.ranges == [f"bytes={len(weights) // 2 // 10_000 * 10_000}-"]


def test_again_makes_no_commit(bundled, server):
    first, second = publish(bundled, REPO), publish(bundled, REPO)
    assert first.commit == second.commit == server.repositories[REPO].main.oid
    assert len(server.repositories[REPO].commits) == 2
    assert on_the_hub(server) == files_of(bundled) and sorted(on_the_hub(server)) == first.files


def test_what_is_no_longer_in_the_checkpoint_goes_and_what_others_wrote_stays(bundled, server):
    publish(bundled, REPO)
    repository = server.repositories[REPO]
    shards = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "vocab.txt": b"a"}
    others = {"notes.md": b"by hand", "images/a.model": b"b"}
    repository.commit("main", "by hand", repository.main.files | shards | others)
    published = publish(bundled, REPO, commit_message="the second")
    assert on_the_hub(server) == files_of(bundled) | others
    assert repository.main.oid == published.commit and repository.main.message == "the second"


def test_a_branch(bundled, server):
    main = publish(bundled, REPO)
    (bundled / "README.md").write_text("---\ntags: [another]\n---\n")
    branch = publish(bundled, REPO, revision="second")
    repository = server.repositories[REPO]
    assert repository.branches == {"main": main.commit, "second": branch.commit}
    assert on_the_hub(server, "second")["README.md"] == (bundled / "README.md").read_bytes()
    assert on_the_hub(server, main.commit)["README.md"] == on_the_hub(server)["README.md"] != b""
    assert HfApi().model_info(REPO, revision=main.commit[:40]).sha == main.commit


# ------------------------------------------------------------------------------------------------------- what goes wrong


def test_without_a_token(bundled, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(bundled / "no token"))
    with pytest.raises(PermissionError, match=r"There is no token for the Hub\. Log in with `hf auth login`"):
        publish(bundled, REPO)
    assert not server.requests


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("token", "told"),
    [(EXPIRED, "does not accept the token: it is wrong or has expired"), (OTHERS_TOKEN, f"no right to write to {REPO}")],
)
def test_tokens_that_are_refused(bundled, server, token, told, exists):
    if exists:
        publish(bundled, REPO)
        (bundled / "README.md").write_text("---\ntags: [another]\n---\n")
    before = dict(server.repositories)
    with pytest.raises(PermissionError, match=told):
        publish(bundled, REPO, token=token)
    assert server.repositories == before and (not exists or len(before[REPO].commits) == 2)


def test_the_hub_is_not_there(bundled, server, monkeypatch):
    server.server.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=rf"127\.0\.0\.1:9 cannot be reached: .*refused\. Nothing was published to {REPO}"
    ):
        publish(bundled, REPO)


@pytest.mark.parametrize(
    "request_of",
    [
        "POST /api/repos/create",
        "GET /api/models",
        "POST /api/validate-yaml",
        "POST .*/preupload/",
        "POST .*/objects/batch",
        "PUT /lfs/",
        "/verify",
        "/commit/",
    ],
)
@pytest.mark.parametrize("answer", [503, "request", "answer"])
def test_one_failure_is_made_good(bundled, server, request_of, answer, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.failures.append((request_of, answer))
    published = publish(bundled, REPO)
    assert not server.failures and on_the_hub(server) == files_of(bundled)
    assert server.repositories[REPO].main.oid == published.commit and len(server.repositories[REPO].commits) == 2


@pytest.mark.parametrize("request_of", ["PUT /lfs/", "/commit/"])
@pytest.mark.parametrize("answer", [500, "request"])
def test_an_upload_that_fails_for_good_leaves_the_repository_as_it_was(bundled, server, request_of, answer, monkeypatch):
    publish(bundled, REPO)
    before = server.repositories[REPO].main
    (bundled / "model.safetensors").write_bytes(os.urandom(1000))
    (bundled / "config.json").write_text("{}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.failures += [(request_of, answer)] * 100
    with pytest.raises(OSError, match=f"Nothing was published to {REPO}") as error:
        publish(bundled, REPO)
    assert isinstance(error.value, ConnectionError) == (answer == "request")
    assert server.repositories[REPO].main is before and len(server.repositories[REPO].commits) == 2


def test_somebody_else_was_faster(bundled, server):
    publish(bundled, REPO)
    (bundled / "README.md").write_text("---\ntags: [another]\n---\n")
    server.failures.append(("/commit/", 412))
    publish(bundled, REPO)
    assert on_the_hub(server) == files_of(bundled)
    server.failures += [("/commit/", 409)] * 3
    (bundled / "README.md").write_text("---\ntags: [a third]\n---\n")
    with pytest.raises(ValueError, match=f"refuses {REPO}: .*409"):
        publish(bundled, REPO)


# -------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def train_and_push(server, tmp_path, monkeypatch, capsys):
    """A short run, whose epochs get better and better, and what it told."""
    monkeypatch.setattr(hub, "_scores", lambda *_: [0.5])
    rsums = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(train, "ranks_to_metrics", lambda ranks: ranks_to_metrics(ranks) | {"rsum": next(rsums)})

    def run(*words: str) -> str:
        (tmp_path / "push-unfinished-killed").mkdir()
        train.main([*TINY, "--output_dir", str(tmp_path), "--push_to_hub", "--hub_model_id", REPO, *words])
        assert not list(tmp_path.glob("push-unfinished-*"))
        return capsys.readouterr().out

    return run


def test_the_best_checkpoints_of_a_training_are_pushed_while_it_goes_on(train_and_push, server, tmp_path, monkeypatch):
    """Here the first push hangs until the last epoch is over, so that the end has to make up for the second."""
    is_over, publish_now, finish = threading.Event(), publishing.publish, Publishing.finish
    monkeypatch.setattr(publishing, "publish", lambda *args, **options: is_over.wait(120) and publish_now(*args, **options))
    monkeypatch.setattr(Publishing, "finish", lambda self: (is_over.set(), finish(self)))
    told = train_and_push("--epochs", "3", "--hub_private_repo", "true")
    assert f"The best checkpoint is on the Hub, where it gives the same scores: {server.url}/{REPO}/commit/" in told
    assert server.repositories[REPO].is_private
    first, last = list(server.repositories[REPO].commits.values())[1:]
    assert b"| best epoch | 1 of 1 |" in first.files["README.md"] and b"| best epoch | 3 of 3 |" in last.files["README.md"]
    assert first.files["model.safetensors"] != last.files["model.safetensors"]
    assert last.files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_a_failed_push_ends_no_training(train_and_push, server, tmp_path):
    server.failures += [("POST /api/repos/create", 403)] * 10
    told = train_and_push("--epochs", "2", "--hub_private_repo", "true")
    assert f"The best checkpoint is not on the Hub. The token has no right to write to {REPO}" in told
    assert f"To push it by hand: granalign push {tmp_path} {REPO} --private\n" in told
    assert json.loads((tmp_path / "metrics.json").read_text())["best_epoch"] == 2 and not server.repositories
