"""The handler as an Inference Endpoint runs it: a process that has the folder of a checkpoint, and HTTP."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_loading import WITHOUT_PACKAGE
from tiny import tiny_model, tiny_processor

from granalign_hf import handler
from granalign_hf.explanation import explain
from granalign_hf.hub import bundle

LABELS = ["a red dog", "the blue circle", "two dogs"]
# What the Inference Toolkit does: it loads handler.py by its path, takes JSON with `inputs` and pictures (query parameters
# are `parameters` then), decodes what stands under `image` of a task with pictures, and answers 400 to any error.
TOOLKIT = """
import base64, importlib.util, io, json
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qsl, urlsplit
from PIL import Image

folder, decodes = sys.argv[1], sys.argv[2] == "decodes"
spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)

def picture(content):
    return Image.open(io.BytesIO(content)).convert("RGB")

class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            is_json = self.headers["Content-Type"] == "application/json"
            data = json.loads(body) if is_json else {"inputs": picture(body)}
            if query := parse_qsl(urlsplit(self.path).query):
                data.setdefault("parameters", dict(query))
            if decodes and isinstance(data["inputs"], dict):
                data["inputs"]["image"] = picture(base64.b64decode(data["inputs"]["image"], validate=True))
            status, answer = 200, handler(data)
        except Exception as error:
            status, answer = 400, {"error": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Endpoint)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    saved, folder = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(saved)
    tiny_processor().save_pretrained(saved)
    bundle(saved, folder, "org/granalign")
    return folder


@pytest.fixture(scope="module", params=["as it is", "decodes"])
def endpoint(folder, tmp_path_factory, request):
    """The address of a running endpoint; older toolkits leave base64 to the handler, newer ones decode it."""
    home = str(tmp_path_factory.mktemp("home"))
    environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + TOOLKIT, str(folder), request.param]
    with subprocess.Popen(command, env=environment, cwd=home, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    noise = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def base64_of(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def post(url: str, body, content_type: str = "application/json") -> tuple[int, object]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def expected_labels(picture: Image.Image) -> list[dict]:
    with torch.no_grad():
        inputs = tiny_processor()(images=picture, text=LABELS, return_tensors="pt")
        probabilities = tiny_model()(**inputs).logits_per_image.softmax(1)[0].tolist()
    found = [{"label": label, "score": pytest.approx(p, abs=1e-6)} for label, p in zip(LABELS, probabilities, strict=True)]
    return [found[number] for number in torch.tensor(probabilities).argsort(descending=True).tolist()]


def test_labels_in_every_form_of_a_request(endpoint, picture):
    image, query = base64_of(picture), urllib.parse.urlencode({"candidate_labels": ", ".join(LABELS)})
    forms = [
        (endpoint, {"inputs": {"image": image, "candidate_labels": LABELS}}),
        (endpoint, {"inputs": {"image": image}, "parameters": {"candidate_labels": LABELS}}),
        (endpoint, {"inputs": image, "parameters": {"candidate_labels": LABELS}}),
        (f"{endpoint}?{query}", png(picture), "image/png"),
    ]
    for form in forms:
        assert post(*form) == (200, expected_labels(picture))


def test_words_of_a_sentence(endpoint, picture):
    text = "the green square on a cat"
    status, answer = post(endpoint, {"inputs": {"image": base64_of(picture), "text": text}})
    expected = explain(tiny_model(), tiny_processor(), picture, text)
    shares = [(word, share) for word, share in expected.word_shares if not word.is_special]
    assert status == 200 and answer["score"] == pytest.approx(expected.score, abs=1e-6)
    assert [(word["word"], word["start"], word["end"]) for word in answer["words"]] == [
        (word.text, word.start, word.end) for word, _ in shares
    ]
    for found, (word, share) in zip(answer["words"], shares, strict=True):
        assert found["share"] == pytest.approx(share, abs=1e-6)
        assert found["saliency"] == pytest.approx(word.saliency, abs=1e-6)
        assert [*found["box"].values()] == [round(side) for side in word.box]
    assert post(f"{endpoint}?{urllib.parse.urlencode({'text': text})}", png(picture), "image/png") == (200, answer)


def test_what_is_wrong_is_told_with_a_code(endpoint, picture):
    image = base64_of(picture)
    huge = base64_of(Image.new("1", (9000, 6000)))
    for request, told in {
        json.dumps({"inputs": {"image": image}}): "Pass either `text`, a sentence, or `candidate_labels`",
        json.dumps({"inputs": {"image": image, "text": "a", "candidate_labels": ["b"]}}): "Pass either `text`",
        json.dumps({"inputs": {"image": image, "txt": "a"}}): "Unknown: txt. Known are `image`, `text`",
        json.dumps({"inputs": {"image": image, "text": " "}}): "must be a sentence of at least one word",
        json.dumps({"inputs": {"image": image, "candidate_labels": ["a", ""]}}): "must be 1 to 1000 strings",
        json.dumps({"inputs": {"image": image, "candidate_labels": []}}): "must be 1 to 1000 strings",
        json.dumps({"inputs": {"image": image, "candidate_labels": [1]}}): "must be 1 to 1000 strings",
        json.dumps({"inputs": {"image": huge, "text": "a"}}): "The picture has 9000 x 6000 pixels, at most 50000000 are",
        json.dumps({"inputs": image[:400], "parameters": {"text": "a"}}): "cannot be read",
        json.dumps(
            {"inputs": "https://a.org/b.png", "parameters": {"text": "a"}}
        ): "not base64. .* URLs and paths are not read",
        json.dumps({"inputs": "/etc/hostname", "parameters": {"text": "a"}}): "is not base64|is no picture",
        json.dumps({"inputs": image, "parameters": ["a dog"]}): "`parameters` must be a dict, got list",
        json.dumps({"inputs": None, "parameters": {"text": "a"}}): "in base64, got NoneType",
    }.items():
        status, answer = post(endpoint, request.encode())
        assert status == 400, request
        with pytest.raises(ValueError, match=told):
            raise ValueError(answer["error"])
    assert post(endpoint, {"inputs": {"image": image, "text": "a dog"}})[0] == 200  # it lives on


def test_a_file_that_is_too_large_is_not_even_decoded(folder, picture, monkeypatch):
    monkeypatch.setattr(handler, "MAX_BYTES", 1000)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="The picture has more than 1000 bytes"):
        handler._picture(base64_of(picture))
