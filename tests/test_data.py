"""The data sets: conversion, verification, download, and the embedded stand-ins."""

import gzip
import hashlib
import http.server
import shutil
import socket
import tarfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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

TO_CNN_INPUT = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
TO_RNN_INPUT = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


def test_gray_is_bit_equal_to_pil_on_every_kind_of_colour():
    images = np.random.default_rng(0).integers(256, size=(1100, 32, 32, 3), dtype=np.uint8)
    images[0], images[1] = 0, 255
    expected = np.stack([np.asarray(transforms.Grayscale()(Image.fromarray(image))) for image in images])
    assert np.array_equal(utils.rgb_to_gray(images), expected)


def inputs_of_lenet5(images):
    """Return what the first layer of LeNet-5 gets to see."""
    model = cnn_cifar10.LeNet5(cnn_cifar10.Config())
    model.layers = nn.Sequential(OrderedDict(first=nn.Identity()))
    return model.outputs(images)["first"]


def test_real_cifar10_equals_torchvisions_transforms_pixel_by_pixel(real_data):
    data = utils.load_data("cifar10", "real", real_data)
    assert data.source == "real"
    assert data.classes[3] == "cat"
    for is_train, split in ((True, data.train), (False, data.test)):
        usual = datasets.CIFAR10(real_data, train=is_train)
        assert len(split.images) == len(usual)
        assert split.labels.tolist() == usual.targets
        inputs = inputs_of_lenet5(split.images)
        assert all(torch.equal(inputs[i], TO_CNN_INPUT(usual[i][0])) for i in range(0, len(usual), 7))


def test_real_mnist_equals_torchvisions_transforms_pixel_by_pixel(real_data):
    data, model = utils.load_data("mnist", "real", real_data), rnn_mnist.RowReader(rnn_mnist.Config())
    usual = datasets.MNIST(real_data, train=False)
    assert torch.equal(data.test.labels, usual.targets)
    assert data.train.images.shape == (60_000, 28, 28)
    inputs = model.rows(data.test.images)
    assert all(torch.equal(inputs[i], TO_RNN_INPUT(usual[i][0])[0]) for i in range(len(usual)))


@pytest.mark.parametrize(
    ("name", "file"),
    [("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"), ("cifar10", "cifar-10-batches-py/test_batch")],
)
def test_one_flipped_byte_in_a_data_file_is_found_and_named(real_data, tmp_path, name, file):
    folder = (tmp_path / file).parent
    folder.mkdir(parents=True)
    for path in (real_data / file).parent.iterdir():
        (folder / path.name).symlink_to(path)
    damaged = bytearray((real_data / file).read_bytes())
    damaged[-5] ^= 1
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(damaged)
    for mode in ("auto", "real"):
        with pytest.raises(utils.InputError, match=f"{file.rpartition('/')[2]} is damaged"):
            utils.load_data(name, mode, tmp_path)
    assert (tmp_path / file).read_bytes() == damaged


def serve(folder):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_what_is_missing_is_downloaded(real_data, tmp_path, monkeypatch):
    """The official servers' stand-in on this machine serves archives of the real files."""
    shop, home = tmp_path / "shop", tmp_path / "home"
    shop.mkdir()
    resources = []
    for path in (real_data / "MNIST" / "raw").glob("*-ubyte"):
        with path.open("rb") as source, gzip.open(shop / f"{path.name}.gz", "wb", compresslevel=0) as archive:
            shutil.copyfileobj(source, archive)
        resources.append((f"{path.name}.gz", md5(shop / f"{path.name}.gz")))
    with tarfile.open(shop / "cifar-10-python.tar.gz", "w:gz", compresslevel=0) as archive:
        archive.add(real_data / "cifar-10-batches-py", "cifar-10-batches-py")
    server, address = serve(shop)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.CIFAR10, "url", address + "cifar-10-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(shop / "cifar-10-python.tar.gz"))
    for name in ("mnist", "cifar10"):
        downloaded, kept = utils.load_data(name, "real", home), utils.load_data(name, "real", real_data)
        assert same(downloaded, kept)
    server.shutdown()


@pytest.fixture
def silent_server(monkeypatch):
    """A server that accepts connections and never answers, in place of the official ones."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.CIFAR10, "url", address + "cifar-10-python.tar.gz")
    monkeypatch.setattr(utils, "SERVER_TIMEOUT", 0.3)
    yield
    listener.close()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.usefixtures("silent_server")
def test_a_server_that_does_not_answer_is_given_up(name, tmp_path, capsys):
    with pytest.raises(utils.InputError, match="cannot be downloaded.*--data synthetic"):
        utils.load_data(name, "real", tmp_path)
    assert utils.load_data(name, "auto", tmp_path).source == "synthetic"
    assert "cannot be downloaded" in capsys.readouterr().out


def test_one_process_downloads_and_all_that_wait_agree(tiny_digits, tmp_path, monkeypatch):
    """Threads stand in for processes: the lock is of the file, not of the process."""
    attempts = []

    def fail_slowly(dataset_class, data_dir):
        attempts.append(dataset_class)
        time.sleep(0.5)
        raise ConnectionError("the server is down")

    monkeypatch.setattr(utils, "_download", fail_slowly)
    monkeypatch.setattr(utils, "synthetic_digits", lambda: tiny_digits)
    folder = tmp_path / "data"
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda _: utils.load_data("mnist", "auto", folder), range(3)))
    assert [data.source for data in sets] == ["synthetic"] * 3
    assert len(attempts) == 1
    utils.load_data("mnist", "auto", folder)
    assert len(attempts) == 2, "a later command tries again"


@pytest.fixture
def _no_network(monkeypatch):
    def fail(dataset_class, data_dir):
        if dataset_class is datasets.MNIST:  # torchvision makes this folder first
            (data_dir / "MNIST" / "raw").mkdir(parents=True)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(utils, "_download", fail)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.parametrize("folder", ["data", "a/b/data"])
@pytest.mark.usefixtures("_no_network")
def test_an_attempt_without_network_leaves_nothing_behind(name, folder, tmp_path):
    with pytest.raises(utils.InputError, match=r"cannot be downloaded \(no route to host\)"):
        utils.load_data(name, "real", tmp_path / folder)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("_no_network")
def test_an_attempt_without_network_deletes_nothing_that_was_there(tmp_path):
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(utils.InputError, match="cannot be downloaded"):
        utils.load_data("mnist", "real", tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"mine", "empty", "file"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "make", "size"), [("pictures", utils.synthetic_pictures, 32), ("digits", utils.synthetic_digits, 28)]
)
def test_embedded_sets_are_complete_balanced_and_the_same_every_time(name, make, size, request):
    data, again = request.getfixturevalue(name), make()
    assert data.train.images.shape == (10_000, size, size)
    assert data.test.images.shape == (2_000, size, size)
    assert data.train.images.dtype == torch.uint8
    assert same(data, again)
    assert torch.bincount(data.train.labels, minlength=10).min() > 850
    assert len(data.classes) == 10
    assert not torch.equal(data.train.images[:2000], data.test.images)


def test_embedded_pictures_cannot_be_told_apart_by_brightness(pictures):
    images, labels = pictures.train
    brightness = images.float().mean((1, 2))
    means = torch.stack([brightness[labels == label].mean() for label in range(10)])
    assert means.max() - means.min() < brightness.std()


def test_embedded_digits_are_upright_ink_on_dark_ground(digits):
    images, labels = digits.train
    average = torch.stack([images[labels == digit].float().mean(0) for digit in range(10)])
    one, zero, seven = average[1], average[0], average[7]
    assert one[14, 12:16].max() > 2 * one[14, :8].max(), "a one is a vertical stroke in the middle"
    assert zero[12:16, 13:15].mean() < 0.5 * zero[12:16, 8:11].mean(), "a zero is hollow"
    assert seven[5:9].sum() > 1.3 * seven[19:23].sum(), "a seven is heavy at the top"
