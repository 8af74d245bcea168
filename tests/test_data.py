"""The data sets: conversion, verification, download, permutation, and the embedded stand-in."""

import gzip
import hashlib
import http.server
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils

import numpy as np
import pytest
import torch
from conftest import same
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

BOTH = pytest.mark.parametrize("name", ["cifar10", "mnist"])
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "mnist": "MNIST/raw/train-images-idx3-ubyte.gz"}
to_gray, to_tensor = transforms.Grayscale(), transforms.ToTensor()
load_data = utils.load_data.__wrapped__  # which keeps nothing from one test to the next


def grayed(images):
    return torch.from_numpy(np.stack([np.asarray(to_gray(Image.fromarray(image))) for image in images]))


def test_gray_is_bit_equal_to_pil_on_every_kind_of_colour():
    images = np.random.default_rng(0).integers(256, size=(1100, 32, 32, 3), dtype=np.uint8)
    images[0], images[1] = 0, 255
    assert np.array_equal(utils.rgb_to_gray(images), grayed(images))


def test_real_cifar10_is_what_torchvision_makes_of_it(real_data):
    data, model = load_data("cifar10", "real", real_data), cnn_cifar10.LeNet5(cnn_cifar10.Config())
    model.layers = nn.Sequential(OrderedDict(first=nn.Identity()))  # shows what the first layer gets to see
    assert (data.source, data.classes[3]) == ("real", "cat")
    for is_train, split in ((True, data.train), (False, data.test)):
        usual = datasets.CIFAR10(real_data, train=is_train)
        assert split.labels.tolist() == usual.targets
        inputs = model.outputs(split.images[::20])["first"]
        assert all(torch.equal(maps, to_tensor(to_gray(usual[20 * i][0]))) for i, maps in enumerate(inputs))


def test_real_mnist_is_what_torchvision_makes_of_it(real_data):
    data, model = load_data("mnist", "real", real_data), rnn_mnist.RowReader(rnn_mnist.Config())
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    assert (data.source, data.classes) == ("real", tuple("0123456789"))
    for is_train, split in ((True, data.train), (False, data.test)):
        usual = datasets.MNIST(real_data, train=is_train)
        assert same(split, utils.Split(usual.data, usual.targets))
        inputs = model.rows(split.images[::20])
        assert all(torch.equal(rows, normalise(to_tensor(usual[20 * i][0]))[0]) for i, rows in enumerate(inputs))


def small_batches(rng):
    """Return small contents for CIFAR's files and their two Splits, of 100 and 20 images."""
    contents, splits = [], []
    for _ in range(6):
        images, labels = rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=20).tolist()
        contents.append(pickle.dumps({"data": images.transpose(0, 3, 1, 2).reshape(20, -1), "labels": labels}))
        splits.append(utils.Split(grayed(images), torch.tensor(labels)))
    return contents, [utils.Split(*map(torch.cat, zip(*splits[:5], strict=True))), splits[5]]


def small_idx(rng):
    """Return small contents for MNIST's files and their two Splits, of 20 images each."""
    contents, splits = [], []
    for _ in range(2):
        images, labels = (rng.integers(10, size=(20, *size), dtype=np.uint8) for size in ((28, 28), ()))
        contents += [bytes(16) + images.tobytes(), bytes(8) + labels.tobytes()]
        splits.append(utils.Split(torch.from_numpy(images), torch.from_numpy(labels).long()))
    return contents, splits


class Shelf:
    """What a server offers: its folder, the addresses that were asked for, and by the sets' names files and Splits."""

    def __init__(self, folder):
        self.folder, self.requests, self.files, self.splits = folder, [], {}, {}

    def put(self, name, home):
        """Write a set's files into a data folder."""
        for path, content in self.files[name].items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_bytes(content)

    def holds(self, data):
        return data.source == "real" and same([data.train, data.test], self.splits[data.name])


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def shelf(tmp_path_factory, monkeypatch):
    """A Shelf that a server on this machine offers in place of the official ones."""
    shelf, rng = Shelf(tmp_path_factory.mktemp("shelf")), np.random.default_rng(0)
    for name, make in (("cifar10", small_batches), ("mnist", small_idx)):
        known, (contents, shelf.splits[name]) = utils.DATASETS[name], make(rng)
        sums = dict(zip(known.files, map(md5, contents), strict=True))
        monkeypatch.setitem(utils.DATASETS, name, known._replace(files=sums))
        shelf.files[name] = {f"{known.folder}/{file}": content for file, content in zip(sums, contents, strict=True)}
    shelf.put("cifar10", shelf.folder)
    with tarfile.open(shelf.folder / ARCHIVES["cifar10"], "w:gz") as archive:
        archive.add(shelf.folder / "cifar-10-batches-py", "cifar-10-batches-py")
    for path, content in shelf.files["mnist"].items():
        (shelf.folder / f"{Path(path).name}.gz").write_bytes(gzip.compress(content))
    packed, batches = sorted(shelf.folder.glob("*ubyte.gz")), [*utils.DATASETS["cifar10"].files.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", [(path.name, md5(path.read_bytes())) for path in packed])
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5((shelf.folder / ARCHIVES["cifar10"]).read_bytes()))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches[5:])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            shelf.requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=shelf.folder))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    point_to(server.server_port, monkeypatch)
    limit = socket.getdefaulttimeout()
    yield shelf
    socket.setdefaulttimeout(limit)
    server.shutdown()
    server.server_close()


def point_to(port, monkeypatch):
    """Let torchvision download from a port of this machine."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/{ARCHIVES['cifar10']}")


@BOTH
@pytest.mark.parametrize("mode", ["auto", "real"])
def test_a_set_that_is_not_there_is_downloaded_once(shelf, tmp_path, name, mode):
    assert shelf.holds(load_data(name, mode, tmp_path / "home"))
    assert len(set(shelf.requests)) == {"cifar10": 1, "mnist": 4}[name]
    shelf.requests.clear()
    assert shelf.holds(load_data(name, mode, tmp_path / "home", may_download=False))
    assert shelf.requests == []


@BOTH
@pytest.mark.parametrize("mode", ["auto", "real"])
def test_one_flipped_byte_in_a_data_file_is_found_and_named(shelf, tmp_path, name, mode):
    for path, content in shelf.files[name].items():
        shelf.put(name, tmp_path)
        damaged = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        (tmp_path / path).write_bytes(damaged)
        with pytest.raises(utils.InputError, match=f"{tmp_path / path} is damaged"):
            load_data(name, mode, tmp_path)
        assert (tmp_path / path).read_bytes() == damaged
    assert shelf.requests == []


@BOTH
@pytest.mark.parametrize("trouble", ["silent", "not there", "nothing to offer", "wrong archive"])
def test_a_server_that_fails_is_given_up_and_what_was_looked_for_is_told(
    shelf, tmp_path, monkeypatch, capsys, name, trouble
):
    for path in shelf.folder.glob("*.gz"):
        path.write_bytes(b"<html>") if trouble == "wrong archive" else path.unlink()
    home, ((first, content), (second, _), *_) = tmp_path / "home", shelf.files[name].items()
    home.mkdir()
    (home / f"{Path(first).name}.gz").write_bytes(gzip.compress(content))  # so that the next one is the first missing
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections and never answers
        if trouble in ("silent", "not there"):
            point_to(listener.getsockname()[1] if trouble == "silent" else 9, monkeypatch)
            monkeypatch.setattr(utils, "SERVER_TIMEOUT", 0.3)
        with pytest.raises(utils.InputError) as refused:
            load_data(name, "real", home)
        assert load_data(name, "auto", home).source == "synthetic"
    missing = f"{home / second} is missing, {home} holds {Path(first).name}.gz"
    assert f"{missing}; it cannot be downloaded (" in str(refused.value)
    assert "--data synthetic" in str(refused.value)
    output = capsys.readouterr().out
    assert f"{home / second} is missing" in output
    assert "NOTE: synthetic data" in output


@BOTH
def test_a_disk_that_is_full_is_no_reason_to_train_on_embedded_data(shelf, tmp_path, name):
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))  # bytes of a file; no archive is as small
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            load_data(name, "auto", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert utils.explain(failed.value)[0] == 1


HOLDING = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); time.sleep(9999)"


@BOTH
def test_where_a_downloader_dies_one_that_waits_downloads_by_itself(shelf, tmp_path, name):
    """The other process, which holds the lock, leaves half an archive behind."""
    archive = tmp_path / ARCHIVES[name]
    archive.parent.mkdir(parents=True, exist_ok=True)
    whole = (shelf.folder / archive.name).read_bytes()
    command = [sys.executable, "-c", HOLDING, str(tmp_path / ".download.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other, ThreadPoolExecutor() as pool:
        assert other.stdout.readline() == "\n", "the lock is taken"
        archive.write_bytes(whole[: len(whole) // 2])
        waiting = pool.submit(load_data, name, "auto", tmp_path)
        time.sleep(0.5)
        asked_while_waiting = list(shelf.requests)
        other.kill()
        assert shelf.holds(waiting.result())
    assert asked_while_waiting == []


@BOTH
def test_permuted_pixels_are_in_one_order_for_all_images_and_every_call(shelf, tmp_path, name):
    shelf.put(name, tmp_path)
    usual, orders = load_data(name, "synthetic", None), []
    place = {pixel.tobytes(): index for index, pixel in enumerate(usual.train.images.flatten(1).numpy().T)}
    for seed in (1, 2):
        torch.manual_seed(seed)
        permuted = load_data(name, "synthetic", None, "permuted")
        orders.append([place[pixel.tobytes()] for pixel in permuted.train.images.flatten(1).numpy().T])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(len(place))), "every pixel is somewhere"
    assert sum(index == pixel for index, pixel in enumerate(orders[0])) < 10
    back = torch.tensor(orders[0]).argsort()
    real = [load_data(name, "real", tmp_path, pixels) for pixels in ("in-place", "permuted")]
    for one, other in ((usual, permuted), real):
        for split, moved in ((one.train, other.train), (one.test, other.test)):
            assert same(moved._replace(images=moved.images.flatten(1)[:, back].view_as(split.images)), split)


@BOTH
def test_the_embedded_set_is_the_same_every_time(name):
    sets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        sets.append(load_data(name, "synthetic", None))
    assert same(*sets)
    images, labels = (torch.cat(parts) for parts in zip(sets[0].train, sets[0].test, strict=True))
    size = {"cifar10": 32, "mnist": 28}[name]
    assert (images.shape, images.dtype, len(sets[0].test.labels)) == ((5000, size, size), torch.uint8, 1000)
    assert len(images.unique(dim=0)) == 5000, "no test image is trained on"
    assert torch.bincount(labels).tolist() == pytest.approx([500] * 10, rel=0.2)
