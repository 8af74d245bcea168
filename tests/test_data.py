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
IMAGES = 20  # in each file of the sets on the shelf
to_gray = transforms.Grayscale()
to_tensor = transforms.ToTensor()


@pytest.fixture(autouse=True)
def _as_before():
    """Forget the data that a test read, and the limit for servers."""
    utils.load_data.cache_clear()
    limit = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(limit)
    utils.load_data.cache_clear()


def grayed(images):
    return torch.from_numpy(np.stack([np.asarray(to_gray(Image.fromarray(image))) for image in images]))


# The real sets


def test_gray_is_bit_equal_to_pil_on_every_kind_of_colour():
    images = np.random.default_rng(0).integers(256, size=(1100, 32, 32, 3), dtype=np.uint8)
    images[0], images[1] = 0, 255
    assert np.array_equal(utils.rgb_to_gray(images), grayed(images))


def test_real_cifar10_is_what_torchvision_makes_of_it(real_data):
    data, model = utils.load_data("cifar10", "real", real_data), cnn_cifar10.LeNet5(cnn_cifar10.Config())
    model.layers = nn.Sequential(OrderedDict(first=nn.Identity()))  # shows what the first layer gets to see
    assert (data.source, data.classes[3]) == ("real", "cat")
    for is_train, split in ((True, data.train), (False, data.test)):
        usual = datasets.CIFAR10(real_data, train=is_train)
        assert split.labels.tolist() == usual.targets
        inputs = model.outputs(split.images)["first"]
        assert len(inputs) == len(usual)
        assert all(torch.equal(inputs[i], to_tensor(to_gray(usual[i][0]))) for i in range(0, len(usual), 20))


def test_real_mnist_is_what_torchvision_makes_of_it(real_data):
    data, model = utils.load_data("mnist", "real", real_data), rnn_mnist.RowReader(rnn_mnist.Config())
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    assert (data.source, data.classes) == ("real", tuple("0123456789"))
    for is_train, split in ((True, data.train), (False, data.test)):
        usual = datasets.MNIST(real_data, train=is_train)
        assert same(split, utils.Split(usual.data, usual.targets))
        inputs = model.rows(split.images[::20])
        assert all(torch.equal(row, normalise(to_tensor(usual[20 * i][0]))[0]) for i, row in enumerate(inputs))


# Small sets in the files of the real ones, and a server


class Shelf:
    """Small sets: files, the bytes by path in a data folder, and the Splits that they hold; by the set's name."""

    def __init__(self, folder):
        self.folder, self.requests, rng = folder, [], np.random.default_rng(0)
        self.files, self.splits = {"cifar10": {}, "mnist": {}}, {"cifar10": [], "mnist": []}
        batches = []
        for file in utils.DATASETS["cifar10"].files:
            images = rng.integers(256, size=(IMAGES, 32, 32, 3), dtype=np.uint8)
            labels = rng.integers(10, size=IMAGES).tolist()
            batch = {"data": images.transpose(0, 3, 1, 2).reshape(IMAGES, -1), "labels": labels}
            self.files["cifar10"][f"cifar-10-batches-py/{file}"] = pickle.dumps(batch)
            batches.append(utils.Split(grayed(images), torch.tensor(labels)))
        self.splits["cifar10"] = [utils.Split(*map(torch.cat, zip(*batches[:5], strict=True))), batches[5]]
        for part in ("train", "t10k"):
            images = rng.integers(256, size=(IMAGES, 28, 28), dtype=np.uint8)
            labels = rng.integers(10, size=IMAGES, dtype=np.uint8)
            sizes = np.array([IMAGES, 28, 28], dtype=">u4").tobytes()
            for kind, content in (
                ("images-idx3", sizes + images.tobytes()),
                ("labels-idx1", sizes[:4] + labels.tobytes()),
            ):
                self.files["mnist"][f"MNIST/raw/{part}-{kind}-ubyte"] = bytes([0, 0, 8, int(kind[-1])]) + content
            self.splits["mnist"].append(utils.Split(*map(torch.from_numpy, (images, labels.astype(np.int64)))))

    def put(self, name, home, *but):
        """Write the files of a set to a data folder, all but those whose path ends so."""
        for path, content in self.files[name].items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            if not path.endswith(but):
                (home / path).write_bytes(content)

    def holds(self, data):
        return data.source == "real" and same([data.train, data.test], self.splits[data.name])


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def shelf(tmp_path_factory, monkeypatch):
    """A Shelf that a server on this machine offers in place of the official ones; torchvision knows its checksums."""
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    shelf.put("cifar10", shelf.folder)
    with tarfile.open(shelf.folder / ARCHIVES["cifar10"], "w:gz") as archive:
        archive.add(shelf.folder / "cifar-10-batches-py", "cifar-10-batches-py")
    for path, content in shelf.files["mnist"].items():
        (shelf.folder / f"{path.rpartition('/')[2]}.gz").write_bytes(gzip.compress(content))
    sums = {path.rpartition("/")[2]: md5(content) for files in shelf.files.values() for path, content in files.items()}
    for name, known in utils.DATASETS.items():
        monkeypatch.setitem(utils.DATASETS, name, known._replace(files={file: sums[file] for file in known.files}))
    packed = {path.name: md5(path.read_bytes()) for path in shelf.folder.glob("*.gz")}
    batches = [(file, sums[file]) for file in utils.DATASETS["cifar10"].files]
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", packed[ARCHIVES["cifar10"]])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches[5:])
    names = [f"{path.rpartition('/')[2]}.gz" for path in shelf.files["mnist"]]
    monkeypatch.setattr(datasets.MNIST, "resources", [(file, packed[file]) for file in names])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            shelf.requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=shelf.folder))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    point_to(server.server_port, monkeypatch)
    yield shelf
    server.shutdown()
    server.server_close()


def point_to(port, monkeypatch):
    """Let torchvision download from a port of this machine."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/{ARCHIVES['cifar10']}")


@BOTH
@pytest.mark.parametrize("mode", ["auto", "real"])
def test_a_set_that_is_not_there_is_downloaded_once(shelf, tmp_path, name, mode):
    assert shelf.holds(utils.load_data(name, mode, tmp_path / "home"))
    assert len(set(shelf.requests)) == {"cifar10": 1, "mnist": 4}[name]
    shelf.requests.clear()
    utils.load_data.cache_clear()
    assert shelf.holds(utils.load_data(name, mode, tmp_path / "home", may_download=False))
    assert shelf.requests == []


@BOTH
@pytest.mark.parametrize("mode", ["auto", "real"])
def test_one_flipped_byte_in_a_data_file_is_found_and_named(shelf, tmp_path, name, mode):
    for path, content in shelf.files[name].items():
        shelf.put(name, tmp_path)
        damaged = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        (tmp_path / path).write_bytes(damaged)
        with pytest.raises(utils.InputError, match=f"{tmp_path / path} is damaged"):
            utils.load_data(name, mode, tmp_path)
        assert (tmp_path / path).read_bytes() == damaged
    assert shelf.requests == []


@pytest.mark.parametrize("missing", ["nothing", "train-labels-idx1-ubyte"])
def test_what_an_older_torchvision_left_is_not_read(shelf, tmp_path, missing):
    """Neither when the raw files are read nor when torchvision downloads one of them."""
    shelf.put("mnist", tmp_path, missing)
    (tmp_path / "MNIST" / "processed").mkdir()
    (tmp_path / "MNIST" / "processed" / "training.pt").write_bytes(b"junk")
    black = torch.zeros(IMAGES, 28, 28, dtype=torch.uint8), torch.zeros(IMAGES, dtype=torch.long)
    torch.save(black, tmp_path / "MNIST" / "processed" / "test.pt")
    assert shelf.holds(utils.load_data("mnist", "real", tmp_path))
    assert bool(shelf.requests) == (missing != "nothing")


# Servers and disks that fail


@pytest.fixture
def silent_server(monkeypatch):
    """A server that accepts connections and never answers; 20 seconds are 0.3 here."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(utils, "SERVER_TIMEOUT", 0.3)
    yield listener.getsockname()[1]
    listener.close()


@BOTH
@pytest.mark.parametrize("trouble", ["silent", "not there", "nothing to offer", "wrong archive"])
def test_a_server_that_fails_is_given_up_and_what_was_looked_for_is_told(
    shelf, silent_server, tmp_path, monkeypatch, capsys, name, trouble
):
    for path in shelf.folder.glob("*.gz"):
        path.write_bytes(b"<html>") if trouble == "wrong archive" else path.unlink()
    if trouble in ("silent", "not there"):
        point_to({"silent": silent_server, "not there": 9}[trouble], monkeypatch)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("")
    first = tmp_path / "home" / next(iter(shelf.files[name]))
    with pytest.raises(utils.InputError) as refused:
        utils.load_data(name, "real", tmp_path / "home")
    assert f"{first} is missing, {tmp_path / 'home'} holds mine; it cannot be downloaded (" in str(refused.value)
    assert "--data synthetic" in str(refused.value)
    data = utils.load_data(name, "auto", tmp_path / "home")
    assert (data.source, data.classes) == ("synthetic", utils.EMBEDDED_CLASSES)
    output = capsys.readouterr().out
    assert f"{first} is missing" in output
    assert "NOTE: synthetic data" in output


@BOTH
def test_a_disk_that_is_full_is_no_reason_to_train_on_embedded_data(shelf, tmp_path, name):
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))  # bytes of a file; no archive is as small
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            utils.load_data(name, "auto", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert utils.explain(failed.value)[0] == 1


@pytest.mark.parametrize("damage", ["cut short", "no archive", "one byte changed"])
@BOTH
def test_an_archive_that_an_interrupted_download_left_is_downloaded_again(shelf, tmp_path, name, damage):
    whole = (shelf.folder / ARCHIVES[name].rpartition("/")[2]).read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    archive = tmp_path / "home" / ARCHIVES[name]
    archive.parent.mkdir(parents=True)
    archive.write_bytes({"cut short": whole[:middle], "no archive": b"<html>", "one byte changed": changed}[damage])
    assert shelf.holds(utils.load_data(name, "auto", tmp_path / "home"))


HOLDING = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); time.sleep(9999)"


@BOTH
def test_where_a_downloader_dies_one_that_waits_downloads_by_itself(shelf, tmp_path, name):
    """The other process, which holds the lock, leaves half an archive behind."""
    archive = tmp_path / ARCHIVES[name]
    archive.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLDING, str(tmp_path / ".download.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other, ThreadPoolExecutor() as pool:
        other.stdout.readline()  # the lock is taken
        waiting = pool.submit(utils.load_data, name, "auto", tmp_path)
        time.sleep(0.5)
        asked_while_waiting = list(shelf.requests)
        whole = (shelf.folder / archive.name).read_bytes()
        archive.write_bytes(whole[: len(whole) // 2])
        other.kill()
        assert shelf.holds(waiting.result())
    assert asked_while_waiting == []


# Permuted pixels


def columns(split):
    """Return each pixel's gray values over all images, bytes, in the order of the pixels."""
    return [column.tobytes() for column in split.images.flatten(1).numpy().T]


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_permuted_pixels_are_in_one_order_for_all_images_and_every_call(shelf, tmp_path, name):
    usual, orders = utils.load_data(name, "synthetic", None), []
    place = {column: index for index, column in enumerate(columns(usual.train))}
    for seed in (1, 2):
        torch.manual_seed(seed)
        utils.load_data.cache_clear()
        permuted = utils.load_data(name, "synthetic", None, "permuted")
        orders.append([place[column] for column in columns(permuted.train)])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(len(place))), "every pixel is somewhere"
    assert sum(index == pixel for index, pixel in enumerate(orders[0])) < 10
    back = torch.tensor(orders[0]).argsort()
    shelf.put(name, tmp_path)
    real, real_permuted = (utils.load_data(name, "real", tmp_path, pixels) for pixels in ("in-place", "permuted"))
    for one, other in ((usual, permuted), (real, real_permuted)):
        for split, moved in ((one.train, other.train), (one.test, other.test)):
            assert moved.images.shape == split.images.shape
            assert torch.equal(moved.images.flatten(1)[:, back].view_as(split.images), split.images)
            assert torch.equal(moved.labels, split.labels)


# The embedded set


@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("mnist", 28)])
def test_the_embedded_set_is_the_same_every_time(name, size):
    sets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        utils.load_data.cache_clear()
        sets.append(utils.load_data(name, "synthetic", None))
    assert same(*sets)
    (images, labels), test = sets[0].train, sets[0].test
    assert (images.shape, images.dtype, test.images.shape) == ((4000, size, size), torch.uint8, (1000, size, size))
    assert len(torch.cat([images, test.images]).unique(dim=0)) == 5000, "no test image is trained on"
    assert min(torch.bincount(labels, minlength=10).min(), 4 * torch.bincount(test.labels, minlength=10).min()) > 250
