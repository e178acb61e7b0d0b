"""Where weights come from: files that are none, torchvision's and timm's names, addresses; nothing hangs."""

import contextlib
import hashlib
import inspect
import json
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from small_weights import assert_holds, refused, state_of, tiny
from torchvision.models import Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

from resnext_backbones import UsageError, load_weights, resnet18, seresnext50_32x4d, sources

Answer = tuple[int, dict[str, str], bytes]


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(state: dict[str, torch.Tensor] | None = None, **metadata: str) -> bytes:
    return safetensors.torch.save(state or state_of(), metadata or None)


# Sources that cannot be read


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_is_unpickled(suffix: str, legacy: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / f"a{suffix}", tmp_path / "exploded"
    torch.save({**state_of(), "x": Bomb(mark)}, path, _use_new_zipfile_serialization=not legacy)
    refused(tiny(), path, "more than tensors")
    path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    refused(tiny(), path, "more than tensors")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["a.pkl", "R-50.PKL", "a.pickle"])
def test_a_pickle_is_to_be_converted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"model": Bomb(tmp_path / "exploded")}))
    refused(tiny(), path, "pickle", ".safetensors", "docs/backbones.md", "Weights")
    refused(tiny(), f"https://example.org/{name}", "pickle", "docs/backbones.md")
    assert not (tmp_path / "exploded").exists()


def test_unreadable_files_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    refused(tiny(), path, "no weights at")
    path.write_bytes(b"")
    refused(tiny(), path, "empty")
    path.write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    refused(tiny(), path, "web page")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tiny(), path, "git lfs pull")
    path.write_bytes(bytes(range(256)) * 8)
    refused(tiny(), path, "damaged")
    torch.save([torch.ones(3)], path)
    refused(tiny(), path, "no tensors under names")
    torch.save(torch.ones(3), path)
    refused(tiny(), path)
    loop: dict[str, Any] = {}
    loop["again"] = loop
    torch.save(loop, path)
    refused(tiny(), path, "damaged")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_that_are_not_plain_numbers_are_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pth", state_of()
    for odd in (state["conv1.weight"].to_sparse(), torch.empty(64, 3, 7, 7, device="meta")):
        torch.save({**state, "conv1.weight": odd}, path)
        refused(tiny(), path, "conv1.weight", "dense")
    torch.save({**state, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, path)
    refused(tiny(), path, "conv1.weight", "int8")


def header(content: Any, length: int | None = None, rest: bytes = bytes(64)) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        header({"conv1.weight": TENSOR}, length=2**63),
        header({"conv1.weight": TENSOR}, length=2**40),
        header(b"{" * 1000),
        header(b'{"conv1.weight": ' + b"[" * 100_000),
        header(b"\xff\xfe not JSON"),
        header({"conv1.weight": {**TENSOR, "shape": [2**62, 2**62]}}),
        header({"conv1.weight": {**TENSOR, "shape": [-4]}}),
        header({"conv1.weight": {**TENSOR, "data_offsets": [0, 2**60]}}),
        header({"conv1.weight": {**TENSOR, "data_offsets": [16, 0]}}),
        header({"conv1.weight": TENSOR, "bn1.weight": TENSOR}),
        header({"conv1.weight": {**TENSOR, "dtype": "PICKLE"}}),
        header({"__metadata__": {"epoch": 3}, "conv1.weight": TENSOR}, rest=bytes(16)),
        header({"__metadata__": "text", "conv1.weight": TENSOR}, rest=bytes(16)),
    ],
)
def test_hostile_safetensors_end_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(tiny(), path, "again")


def test_a_terminal_is_not_painted_by_names_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    evil = {
        "\x1b]0;owned\x07" + "x" * 10_000: torch.ones(2),
        "a\nb": torch.ones(2),
        "." * 100_000: torch.ones(2),
    }
    safetensors.torch.save_file(evil, path)
    refused(tiny(), path, "\\x1b")
    safetensors.torch.save_file({**state_of(), **evil}, path)
    began = time.monotonic()
    assert "\x1b" not in str(load_weights(tiny(), path))
    assert time.monotonic() - began < 5  # a name of 100,000 dots has as many endings


def test_twenty_thousand_prefixes_are_soon_looked_through(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"p{i}.conv1.weight": torch.ones(1) for i in range(20_000)}, path)
    began = time.monotonic()
    refused(tiny(), path, "fits equally well", "and 19996 more")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state_of(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(tiny(), path, "again")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    refused(tiny(), tmp_path, "checkpoints/best.ckpt")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "/dev/null", "file:///etc/passwd", "s3://a/b.pth"])
def test_names_that_no_weights_can_have(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_weights(tiny(), name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [False, 3, ["a"], "", " ", None])
def test_what_is_no_text_names_no_weights(given: Any) -> None:
    """A command line may give any of them."""
    with pytest.raises(UsageError, match="null for none"):
        sources.find(given)


# torchvision's names


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_says_how_to_go_on(hub: Path) -> None:
    name = "ResNeXt50_32X4D_Weights.IMAGENET1K_V2"
    where = str(hub / "checkpoints/resnext50_32x4d-1a0047aa.pth")
    refused(tiny(), name, "cannot download", "Name or service not known", "https://", where)
    refused(
        tiny(), "https://example.org/a.pth", "cannot download", "Name or service not known", "file's path"
    )
    assert not [path for path in hub.rglob("*") if path.is_file()]


def test_misspelt_names_get_the_nearest(hub: Path) -> None:
    refused(tiny(), "ResNeXt50_32x4d_Weights.IMAGENET1K_V2", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2")
    refused(tiny(), "ResNet18_Weights.IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1")
    refused(tiny(), "resnext50", "ResNeXt50_32X4D_Weights.IMAGENET1K_V2")


def test_a_name_is_downloaded_once_and_checked(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, remote = state_of(), tmp_path / "remote.pth"
    torch.save(state, remote)
    digest = digest_of(remote.read_bytes())
    url = f"https://example.org/models/tiny-{digest[:8]}.pth"
    asked = []

    class Tiny_Weights(WeightsEnum):
        V1 = Weights(
            url, partial(ImageClassification, crop_size=224, std=(0.2, 0.3, 0.4)), {"license": "MIT"}
        )
        DEFAULT = V1

    def download(address: str, path: str, hash_prefix: str) -> None:
        asked.append((address, hash_prefix))
        Path(path).write_bytes(remote.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torchvision.models, "get_weight", lambda name: Tiny_Weights[name.partition(".")[2]])
    for member in ("V1", "DEFAULT"):
        body = tiny()
        receipt = load_weights(body, f"Tiny_Weights.{member}")
        assert receipt.sha256 == digest
        assert receipt.source == "Tiny_Weights.V1"
        assert receipt.licence == "MIT"
        assert receipt.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.2, 0.3, 0.4]}
        assert_holds(body, state)
    assert asked == [(url, digest[:8])]

    cached = hub / f"checkpoints/tiny-{digest[:8]}.pth"
    cached.write_bytes(cached.read_bytes()[:-10])
    with pytest.raises(UsageError, match=re.escape(f"{cached} is damaged")):
        load_weights(tiny(), "Tiny_Weights.V1")


def test_torchvisions_own_file_is_known_by_path_and_address(
    hub: Path, server: "Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = packed()
    name = f"tiny-{digest_of(content)[:8]}.safetensors"

    class Tiny_Weights(WeightsEnum):
        V1 = Weights(
            f"https://example.org/models/{name}",
            partial(ImageClassification, crop_size=224, std=(0.2, 0.3, 0.4)),
            {"license": "MIT", "categories": ["cat", "dog"]},
        )

    monkeypatch.setattr(sources, "_torchvision_names", lambda: ["Tiny_Weights.V1"])
    monkeypatch.setattr(torchvision.models, "get_weight", lambda name: Tiny_Weights[name.partition(".")[2]])
    for folder, file in (("a", name), ("b", f"other-{name}"), ("c", name)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(packed() if folder == "c" else content)
    server.files[f"/m/{name}"] = 200, {}, content
    for source in (str(tmp_path / "a" / name), f"{server.url}/m/{name}?download=true"):
        found = sources.find(source)
        assert found.name == f"{source}, Tiny_Weights.V1"
        assert found.classes == ("cat", "dog")
        assert load_weights(tiny(), source).normalisation["std"] == [0.2, 0.3, 0.4]
    for source in (tmp_path / "b" / f"other-{name}", tmp_path / "c" / name):  # another name; other bytes
        assert sources.find(source) == sources.Source(source, str(source))


def test_networks_whose_eps_torchvision_sets_to_0_are_known() -> None:
    """Every one whose builder says so, and no other."""
    models, said = torchvision.models, set()
    for name in models.list_models():
        code = inspect.getsource(models.get_model_builder(name))
        if "overwrite_eps(model, 0.0)" in code:
            said |= set(re.findall(r"weights == (\w+\.\w+):", code))
    assert len(said) > 3
    assert said == sources.WITHOUT_EPS


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("SSD300_VGG16_Weights.COCO_V1", None),  # its mean and std, of another scale, are in its builder
        ("FCOS_ResNet50_FPN_Weights.COCO_V1", {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
    ],
)
def test_what_a_detectors_images_were_normalised_with(
    name: str, known: Any, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub / "checkpoints" / torchvision.models.get_weight(name).url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(sources, "sha256", lambda path: path.stem.rpartition("-")[2])
    found = sources.find(name)
    assert found.normalisation == known
    assert found.classes[0] == "person"


def test_every_torchvision_address_carries_its_hash() -> None:
    models = torchvision.models
    for weights in (w for name in models.list_models() for w in models.get_model_weights(name)):
        if not type(weights).__name__.endswith("_QuantizedWeights"):  # these are of no use to a float body
            assert re.search(r"-[0-9a-f]{8,}\.pth$", weights.url), weights


# Addresses


class Server:
    """Answers on this machine from `files`; knows what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, Answer | Callable[[], Answer]] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                answer = outer.files.get(self.path.partition("?")[0], (404, {}, b"<html>nothing here</html>"))
                status, headers, content = answer() if callable(answer) else answer
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(ConnectionError):  # who asked has gone
                        self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def kept_in(hub: Path) -> list[str]:
    return [path.name for path in hub.rglob("*") if path.is_file()]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".ckpt", ".bin"])
def test_an_address_is_fetched_once(suffix: str, server: Server, hub: Path, tmp_path: Path) -> None:
    state, file = state_of(), tmp_path / "a"
    torch.save({"state_dict": state}, file)
    content = packed(state) if suffix == ".safetensors" else file.read_bytes()
    server.files[f"/m/x{suffix}"] = 200, {}, content
    for _ in range(2):
        body = tiny()
        receipt = load_weights(body, f"{server.url}/m/x{suffix}?download=true")
        assert receipt.sha256 == digest_of(content)
        assert receipt.source == f"{server.url}/m/x{suffix}?download=true"
        assert_holds(body, state)
    assert server.asked == [f"GET /m/x{suffix}?download=true"]
    assert kept_in(hub) == [f"{digest_of(content)}{suffix}"]


def test_what_came_first_is_trusted_until_it_changes(server: Server, hub: Path) -> None:
    first, second = packed(), packed()
    url, server.files["/x.safetensors"] = f"{server.url}/x.safetensors", (200, {}, first)
    assert load_weights(tiny(), url).sha256 == digest_of(first)
    server.files["/x.safetensors"] = 200, {}, second
    assert load_weights(tiny(), url).sha256 == digest_of(first)  # not asked again

    (kept,) = (path for path in hub.rglob("*") if path.is_file())
    kept.write_bytes(second)
    with pytest.raises(UsageError, match=re.escape(f"{kept} is damaged")):
        load_weights(tiny(), url)
    kept.unlink()
    assert load_weights(tiny(), url).sha256 == digest_of(second)


def test_a_pinned_address(server: Server, hub: Path) -> None:
    right, wrong = packed(), packed()
    url = f"{server.url}/x.safetensors"
    pinned = f"{url}#sha256={digest_of(right).upper()}"
    server.files["/x.safetensors"] = 200, {}, wrong
    with pytest.raises(UsageError, match=f"{digest_of(wrong)}, not {digest_of(right)}"):
        load_weights(tiny(), pinned)
    assert kept_in(hub) == []
    assert load_weights(tiny(), url).sha256 == digest_of(wrong)
    server.files["/x.safetensors"] = 200, {}, right
    for _ in range(2):
        assert load_weights(tiny(), pinned).sha256 == digest_of(right)
    assert len(server.asked) == 3
    refused(tiny(), url, "several versions", digest_of(right), digest_of(wrong), "#sha256=")


@pytest.mark.parametrize(
    "fragment", ["sha256=12", "sha256=", "sha=" + 64 * "a", "sha256=" + 64 * "g", "main"]
)
def test_a_pin_that_pins_nothing_is_refused(fragment: str, hub: Path) -> None:
    refused(tiny(), f"https://example.org/x.safetensors#{fragment}", "64 hexadecimal")


def test_a_hash_in_the_name_is_held_to(server: Server, hub: Path) -> None:
    content = packed()
    right, wrong = f"/x-{digest_of(content)[:8]}.safetensors", "/x-20240131.safetensors"
    server.files |= dict.fromkeys((right, wrong), (200, {}, content))
    assert load_weights(tiny(), server.url + right).sha256 == digest_of(content)
    refused(tiny(), server.url + wrong, "not 20240131", f"#sha256={digest_of(content)}")
    pinned = f"{server.url}{wrong}#sha256={digest_of(content)}"  # what looked like a hash was a date
    assert load_weights(tiny(), pinned).sha256 == digest_of(content)


def test_a_download_that_is_no_weights_leaves_nothing(server: Server, hub: Path) -> None:
    content, url = packed(), f"{server.url}/x.safetensors"
    refused(tiny(), url, "cannot download", "404")
    answers: dict[str, Answer] = {
        "web page": (200, {}, b"<html>please log in</html>"),
        "again": (200, {"Content-Length": str(len(content))}, content[:-1000]),  # cut short
        "empty": (200, {}, b""),
        "500": (500, {}, b"<html>"),
        "not allowed": (302, {"Location": "file:///etc/passwd"}, b""),
        "infinite loop": (302, {"Location": "/x.safetensors"}, b""),
    }
    for words, answer in answers.items():
        server.files["/x.safetensors"] = answer
        refused(tiny(), url, words)
        assert kept_in(hub) == []
    server.files |= {"/y": (200, {}, content), "/x.safetensors": (302, {"Location": "/y"}, b"")}
    assert load_weights(tiny(), url).sha256 == digest_of(content)


@pytest.mark.parametrize(
    "path",
    ["/../../../x.safetensors", "/..%2f..%2fx.safetensors", "//etc/x.safetensors", f"/{'x' * 3000}.pth"],
)
def test_names_do_not_leave_the_folder(path: str, server: Server, hub: Path, tmp_path: Path) -> None:
    torch.save(state_of(), tmp_path / "a.pth")
    content = packed() if path.endswith(".safetensors") else (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").unlink()
    server.files[path] = server.files[re.sub("^//", "/", path)] = 200, {}, content
    assert load_weights(tiny(), server.url + path).sha256 == digest_of(content)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [re.fullmatch(r"[0-9a-f]{64}\.\w+", file.name) is not None for file in files] == [True]
    assert files[0].is_relative_to(hub)


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///x.safetensors",
        "https://[::1/x.safetensors",
        "https://example.org/x y.safetensors\n",
        "https://example.org/ü.safetensors",
        "https://me:hunter2@example.org/x.safetensors",
        "https://example.org/x",
        "https://example.org/x.tar.gz",
    ],
)
def test_addresses_that_are_none(url: str, hub: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_weights(tiny(), url)
    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)


def test_a_silent_server_is_given_up(hub: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    over = threading.Event()

    def silent() -> Answer:
        over.wait(10)
        return 500, {}, b""

    server.files["/x.safetensors"] = silent
    began = time.monotonic()
    refused(tiny(), f"{server.url}/x.safetensors", "timed out")
    over.set()
    assert time.monotonic() - began < 5
    assert kept_in(hub) == []


def test_an_interrupted_download_leaves_nothing(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(address: str, path: str) -> None:
        Path(path).write_bytes(packed()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_weights(tiny(), "https://example.org/x.safetensors")
    assert kept_in(hub) == []


def test_two_at_once_get_the_same_file(server: Server, hub: Path) -> None:
    state = state_of()
    both = threading.Barrier(2)

    def answer() -> Answer:
        both.wait(10)  # answered only when both have asked
        return 200, {}, packed(state)

    server.files["/x.safetensors"] = answer
    bodies = tiny(), tiny()
    jobs = [threading.Thread(target=load_weights, args=(b, f"{server.url}/x.safetensors")) for b in bodies]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for body in bodies:
        assert_holds(body, state)
    assert kept_in(hub) == [f"{digest_of(packed(state))}.safetensors"]
    assert socket.getdefaulttimeout() is None  # the limit of a download is not the process's


# timm's names

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hugging_face(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client with an empty cache, and this machine's server instead of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "hf"


def cache(folder: Path, repository: str, file: str, content: bytes) -> Path:
    """Puts a file where the hub's client keeps it; returns the file behind its links."""
    folder = folder / f"models--{repository.replace('/', '--')}"
    blob, link = folder / "blobs" / digest_of(content), folder / "snapshots" / COMMIT / file
    for path in (blob, link, folder / "refs/main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs/main").write_text(COMMIT)
    return blob


def test_timms_weights_from_the_cache_without_a_network(hugging_face: Path, server: Server) -> None:
    theirs = timm.create_model("seresnext50_32x4d").eval()
    content = packed({k: v for k, v in state_of(theirs).items() if "tracked" not in k})
    theirs.load_state_dict(safetensors.torch.load(content), strict=False)
    cache(hugging_face, "timm/seresnext50_32x4d.racm_in1k", "model.safetensors", content)
    ours = seresnext50_32x4d(num_classes=1000)
    receipt = load_weights(ours, "timm:seresnext50_32x4d")  # racm_in1k is its default tag
    assert server.asked == []
    assert receipt.source == "timm:seresnext50_32x4d.racm_in1k"
    assert receipt.licence == "apache-2.0"  # as timm/models/resnet.py says
    assert receipt.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert receipt.sha256 == digest_of(content)
    assert receipt.unexpected == ()
    assert_holds(ours, theirs.state_dict())


def test_timms_weights_are_fetched_and_kept(hugging_face: Path, server: Server, tmp_path: Path) -> None:
    state, file = state_of(resnet18()), tmp_path / "a.bin"
    torch.save(state, file)
    content = file.read_bytes()
    base = "/timm/resnet18.fb_swsl_ig1b_ft_in1k/resolve/main"
    server.files[f"{base}/model.safetensors"] = 404, {"X-Error-Code": "EntryNotFound"}, b""
    headers = {"ETag": f'"{digest_of(content)}"', "X-Repo-Commit": COMMIT}
    server.files[f"{base}/pytorch_model.bin"] = 200, headers, content
    for _ in range(2):
        body = resnet18()
        receipt = load_weights(body, "timm:resnet18.fb_swsl_ig1b_ft_in1k")
        assert_holds(body, state)
        assert receipt.licence == "cc-by-nc-4.0"
        assert receipt.sha256 == digest_of(content)
    assert server.asked.count(f"GET {base}/pytorch_model.bin") == 1


def test_a_damaged_cache_says_what_to_delete(hugging_face: Path) -> None:
    blob = cache(hugging_face, "timm/resnet18.a1_in1k", "model.safetensors", packed(state_of(resnet18())))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 255
    blob.write_bytes(content)
    with pytest.raises(UsageError, match=f"{blob.name} is damaged.* delete it"):
        load_weights(resnet18(), "timm:resnet18.a1_in1k")


def test_without_a_network_timms_names_end_soon(hugging_face: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, constants = "timm:resnet18.a1_in1k", huggingface_hub.constants
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"cannot download timm/resnet18\.a1_in1k"):
        load_weights(tiny(), name)  # the server answers 404, as for a repository that is gone
    with socket.create_server(("127.0.0.1", 0)) as closed:
        template = f"http://127.0.0.1:{closed.getsockname()[1]}/{{repo_id}}/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UsageError) as caught:
        load_weights(tiny(), name)
    message = str(caught.value)
    address = template.format(repo_id="timm/resnet18.a1_in1k", revision="main", filename="model.safetensors")
    assert "Connection refused" in message
    assert f"fetch {address} by other means" in message
    assert "give the file's path" in message
    assert "\n" not in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot download"):
        load_weights(tiny(), name)
    assert time.monotonic() - began < 5  # the client alone tries for 25 seconds


def test_misspelt_timm_names_get_the_nearest(hugging_face: Path) -> None:
    refused(tiny(), "timm:resnext50_32x4d.a1_in1", "timm has no such weights", "resnext50_32x4d.a1_in1k")
    refused(tiny(), "timm:resnext50_32x4", "resnext50_32x4d")
    refused(tiny(), "timm:" + "x" * 5000, "timm has no such weights")
    with pytest.raises(UsageError, match="nearest"):
        load_weights(tiny(), "timm:")


def test_without_timm_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    refused(tiny(), "timm:resnet18.a1_in1k", "pip install 'resnext-backbones[timm]'")
