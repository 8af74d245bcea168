"""The data sets: reading, the check of what was read, download, and the synthetic set."""

import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils

import numpy as np
import pytest
import torch
from conftest import read_files, same
from filelock import FileLock
from PIL import Image
from torchvision import datasets, transforms

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDERS = {name: spec.folder for name, spec in utils.DATASETS.items()}
FILES = {name: spec.files for name, spec in utils.DATASETS.items()}
BATCHES = FILES["cifar10"][:6]
ARCHIVES = {"cifar10": ["cifar-10-python.tar.gz"], "mnist": [f"MNIST/raw/{file}.gz" for file in FILES["mnist"]]}

SMALL_NETWORKS = {"cifar10": (cnn_cifar10, "--without", "conv1+conv2"), "mnist": (rnn_mnist, "--hidden-size", 2)}

each_set = pytest.mark.parametrize("name", ["cifar10", "mnist"])
load_data = utils.load_data.__wrapped__  # without the cache


# Small sets in place of the official ones


def md5(content):
    return hashlib.md5(content).hexdigest()


def gray_by_pil(images):
    """Turn RGB images, uint8 (N, H, W, 3), gray with torchvision: uint8 (N, H, W)."""
    to_gray = transforms.Grayscale()
    return torch.from_numpy(np.stack([np.asarray(to_gray(Image.fromarray(image))) for image in images]))


def write_cifar10(data_dir, seed=0):
    """Write 20 random images a file in the format of CIFAR-10; return the gray training and test Split."""
    rng = np.random.default_rng(seed)
    folder = data_dir / FOLDERS["cifar10"]
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(256, size=(120, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(10, size=120)
    for number, file in enumerate(BATCHES):
        part = slice(20 * number, 20 * number + 20)
        batch = {"data": images[part].transpose(0, 3, 1, 2).reshape(20, -1), "labels": labels[part].tolist()}
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10_CLASSES}))
    gray = gray_by_pil(images)
    train = utils.Split(gray[:100], torch.from_numpy(labels[:100]))
    return [train, utils.Split(gray[100:], torch.from_numpy(labels[100:]))]


def write_mnist(data_dir, seed=0):
    """Write 20 random images a split in the format of MNIST; return the training and the test Split."""
    rng = np.random.default_rng(seed)
    folder = data_dir / FOLDERS["mnist"]
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for number, file in enumerate(FILES["mnist"]):
        is_images = number % 2 == 0
        array = rng.integers(256 if is_images else 10, size=(20, 28, 28) if is_images else 20, dtype=np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
        (folder / file).write_bytes(header + array.tobytes())
        arrays.append(torch.from_numpy(array))
    return [utils.Split(arrays[0], arrays[1].long()), utils.Split(arrays[2], arrays[3].long())]


WRITE = {"cifar10": write_cifar10, "mnist": write_mnist}


def write_official_sets(data_dir, monkeypatch):
    """Write both small sets, and let them count as the official ones; return their Splits by name."""
    splits = {name: write(data_dir) for name, write in WRITE.items()}
    for name in WRITE:
        arrays = [tensor.numpy().tobytes() for split in splits[name] for tensor in split]
        monkeypatch.setitem(utils.DATASETS, name, utils.DATASETS[name]._replace(md5=md5(b"".join(arrays))))
    # None: torchvision itself takes any bytes.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[file, None] for file in BATCHES[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[file, None] for file in BATCHES[5:]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    return splits


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """The server from which torchvision downloads small sets: they lie in .data_dir and have .splits by name.

    .folder: its archives, as they would lie in a data folder; .requests: what was asked for.
    """
    data_dir = tmp_path_factory.mktemp("data")
    folder = tmp_path_factory.mktemp("server")
    splits = write_official_sets(data_dir, monkeypatch)
    server = SimpleNamespace(data_dir=data_dir, folder=folder, splits=splits, requests=[])
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(data_dir / FOLDERS["cifar10"], FOLDERS["cifar10"])
    (folder / FOLDERS["mnist"]).mkdir(parents=True)
    for path in ARCHIVES["mnist"]:
        (folder / path).write_bytes(gzip.compress((data_dir / path).with_suffix("").read_bytes()))
    sums = {path.name: md5(path.read_bytes()) for path in sorted(folder.rglob("*.gz"))}
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", sums.pop("cifar-10-python.tar.gz"))
    monkeypatch.setattr(datasets.MNIST, "resources", list(sums.items()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            server.requests.append(self.path)

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=http_server.serve_forever, args=[0.01], daemon=True).start()
    set_server_port(http_server.server_port, monkeypatch)
    yield server
    http_server.shutdown()
    http_server.server_close()


def set_server_port(port, monkeypatch):
    """Let torchvision download from a port of this machine."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/MNIST/raw/"])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")


def is_official(data, server):
    name = "mnist" if data.classes[0] == "0" else "cifar10"
    return data.source == "real" and same([data.train, data.test], server.splits[name])


# Reading


@each_set
def test_real_sets_are_those_of_torchvision(real_data, name):
    data = load_data(name, "real", real_data)
    for is_train, split in ((True, data.train), (False, data.test)):
        torchvision_class = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}[name]
        expected = torchvision_class(real_data, train=is_train, transform=transforms.Grayscale())
        assert split.labels.tolist() == list(expected.targets)
        for index in range(0, len(split.images), 20):
            assert np.array_equal(split.images[index], expected[index][0])


@each_set
@pytest.mark.parametrize("kind", ["flipped bit", "cut off", "other set"])
def test_other_data_are_refused_with_their_path_and_left_alone(server, tmp_path, kind, name):
    data_dir = tmp_path / "data"
    shutil.copytree(server.data_dir, data_dir)
    path = data_dir / FOLDERS[name] / FILES[name][2]
    content = path.read_bytes()
    if kind == "flipped bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 128]) + content[middle + 1 :])
    elif kind == "cut off":
        path.write_bytes(content[:-10])
    else:
        WRITE[name](data_dir, seed=1)
    before = read_files(data_dir)
    with pytest.raises(utils.InputError) as refused:
        load_data(name, "auto", data_dir)
    folder = data_dir / {"cifar10": "cifar-10-batches-py", "mnist": "MNIST"}[name]
    assert str(refused.value).startswith(f"{folder} does not hold the official ")
    assert str(refused.value).endswith("; move it away to download the set again")
    assert (read_files(data_dir), server.requests) == (before, [])


# Downloading


@each_set
@pytest.mark.parametrize("has_archives", [False, True])
def test_a_missing_set_is_downloaded_or_unpacked_once(server, tmp_path, name, has_archives):
    if has_archives:
        shutil.copytree(server.folder, tmp_path, dirs_exist_ok=True)
    assert is_official(load_data(name, "auto", tmp_path), server)
    assert len(set(server.requests)) == (0 if has_archives else len(ARCHIVES[name]))
    server.requests.clear()
    data = load_data(name, "real", tmp_path)
    assert is_official(data, server)
    assert data.classes == {"cifar10": tuple(CIFAR10_CLASSES), "mnist": tuple("0123456789")}[name]
    assert server.requests == []


@each_set
@pytest.mark.parametrize("trouble", ["silent server", "no server", "no such file", "wrong archive"])
def test_a_failed_download_names_the_path_or_falls_back(server, tmp_path, monkeypatch, call, name, trouble):
    data_dir = tmp_path / "data"
    start = time.monotonic()
    monkeypatch.setattr(utils, "DOWNLOAD_TIMEOUT", 0.3)
    for path in server.folder.rglob("*.gz"):
        path.write_bytes(b"<html>") if trouble == "wrong archive" else path.unlink()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections and never answers
        closing = threading.Timer(9, listener.close)
        closing.start()
        if trouble in ("silent server", "no server"):
            set_server_port(listener.getsockname()[1] if trouble == "silent server" else 9, monkeypatch)
        script, *flags = SMALL_NETWORKS[name]
        flags += ["--epochs", 1, "--runs-dir", tmp_path, "--data-dir", data_dir]
        refused, _, error = call(script, *flags, "--data", "real")
        status, output, _ = call(script, *flags)
        closing.cancel()
    reason = f"{data_dir / FOLDERS[name] / FILES[name][0]} is missing and cannot be downloaded ("
    assert reason in error.splitlines()[-1], "below torchvision's bar"
    assert error.endswith("); copy it there, or use another --data-dir\n")
    assert (refused, status) == (2, 0)
    assert reason in output
    assert utils.SYNTHETIC_NOTICE in output
    assert time.monotonic() - start < 8


@each_set
def test_a_full_disk_is_no_reason_to_train_on_synthetic_data(server, tmp_path, name):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # bytes of a file, less than the archives have
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            load_data(name, "auto", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert utils.describe_error(failed.value)[0] == 1


@each_set
def test_while_one_process_downloads_a_set_others_wait(server, tmp_path, capsys, name):
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / ".download.lock"):  # as the process that downloads holds it
            waiting = pool.submit(load_data, name, "auto", tmp_path)
            time.sleep(0.2)
            assert not waiting.done()
            shutil.copytree(server.data_dir, tmp_path, dirs_exist_ok=True)
        assert is_official(waiting.result(), server)
    assert server.requests == []
    assert "downloading" not in capsys.readouterr().out


# The synthetic set


@each_set
def test_the_synthetic_set_is_always_the_same(name):
    data = load_data(name, "synthetic", None)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert same(data, load_data(name, "synthetic", None))
    size = {"cifar10": 32, "mnist": 28}[name]
    assert (data.train.images.shape, data.test.images.shape) == ((4000, size, size), (1000, size, size))
    images = torch.cat([data.train.images, data.test.images])
    assert len(images.unique(dim=0)) == 5000, "no test image is a training image"
    assert torch.bincount(data.train.labels).tolist() == pytest.approx([400] * 10, rel=0.2)
