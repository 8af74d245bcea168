"""What both training scripts share: data, the run's folder, the training loop and the command line.

From top to bottom: errors and exit statuses, data sets (real, then embedded), the run's folder with its checkpoint
and TensorBoard events, training and evaluation, one experiment and many, command line.
"""

import argparse
import csv
import errno
import fcntl
import http.client
import io
import itertools
import json
import logging
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Errors and exit statuses
# ---------------------------------------------------------------------------------------------------------------------


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TERMINAL_GONE = (errno.EPIPE, errno.EIO)


class InputError(Exception):
    """The command line or an input is unusable: exit status 2."""


class LockedError(InputError):
    """Another process trains this run."""


class TrainingError(Exception):
    """Training failed: exit status 1."""


class Terminated(BaseException):
    """SIGTERM arrived, or the terminal went away: exit status 143."""


def _terminate(signal_number, frame):
    raise Terminated


def run_script(main):
    """Call main() and leave with the exit status it earned, an error told in one line on standard error.

    Status 0: done; 1: training failed; 2: unusable command line or input; 130: Ctrl-C; 143: SIGTERM, or nobody reads.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threading.excepthook = lambda _: None  # what stops TensorBoard's writer is raised here again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, _terminate)
    status, message = 0, None
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, f"error: {error}"
    except TrainingError as error:
        status, message = 1, f"error: {error}"
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or error
        if error.errno in DISK_FULL:
            status, message = 1, f"error: {what}; free some space and run the same command again"
        elif error.errno in TERMINAL_GONE:
            status, message = 143, "nobody reads the output any more; the same command continues"
        else:
            status, message = 2, f"error: {what}; name a file or folder that can be used"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; every finished epoch is kept, and the same command continues"
    except Terminated:
        status, message = 143, "terminated; every finished epoch is kept, and the same command continues"
    if message:
        with suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if status == 143:  # Python would complain of what is left in the buffers
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Data: the real sets, from torchvision's files
# ---------------------------------------------------------------------------------------------------------------------

SERVER_TIMEOUT = 20  # seconds until a server that does not answer is given up
STARTED = time.time()
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
DATASET_TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
DIGITS = tuple("0123456789")

# torchvision verifies only MNIST's archives; these are the MD5 sums of what they contain.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Dataset(NamedTuple):
    """Grayscale images, uint8 (N, H, W), with labels, int64 (N,); source is 'real' or 'synthetic'."""

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device):
        return self._replace(**{field: getattr(self, field).to(device) for field in self._fields[3:]})


def load_data(name, mode, data_dir, may_download=True):
    """Return the Dataset called name ('cifar10' or 'mnist').

    mode 'real' reads data_dir and downloads what is missing; 'synthetic' makes the embedded set; 'auto' is the real
    set where it can be had and the embedded one otherwise. Raises InputError for damaged files and, in mode 'real',
    when the download fails; may_download=False: for missing files.
    """
    if mode != "synthetic":
        try:
            return _load_real(name, Path(data_dir), may_download)
        except ConnectionError as error:
            if mode == "real":
                raise InputError(
                    f"{DATASET_TITLES[name]} is not in {data_dir} and cannot be downloaded ({error}); connect to the "
                    "network, copy the files there, or use --data synthetic"
                ) from None
            print(f"{DATASET_TITLES[name]} is not in {data_dir} and cannot be downloaded ({error}).")
    return synthetic_pictures() if name == "cifar10" else synthetic_digits()


def synthetic_notice(dataset):
    """The sentence that keeps results on embedded data from being taken for real ones."""
    return (
        f"NOTE: synthetic data: the embedded stand-in for {DATASET_TITLES[dataset]}, NOT the real set; "
        "its accuracies are comparable with no published ones."
    )


def rgb_to_gray(images):
    """Turn uint8 RGB (N, H, W, 3) into uint8 gray (N, H, W), bit-equal to PIL's ITU-R 601-2 conversion."""
    gray = np.empty(images.shape[:3], dtype=np.uint8)
    weights = np.array([19595, 38470, 7471], dtype=np.float32)  # of 65,536; float32 holds these sums exactly
    for start in range(0, len(images), 1000):  # 1000 images at a time stand in memory as floats
        gray[start : start + 1000] = (images[start : start + 1000].astype(np.float32) @ weights + 32768) / 65536
    return gray


def _load_real(name, data_dir, may_download):
    """Raises ConnectionError when files are missing and cannot be downloaded, InputError when one is damaged."""
    from torchvision import datasets

    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.MNIST
    checksums = _published_checksums(name, dataset_class, data_dir)
    if not all(path.is_file() for path in checksums):
        if not may_download:
            raise InputError(f"{DATASET_TITLES[name]} is not in {data_dir}; a training script downloads it there")
        with _sole_downloader(data_dir):
            if not all(path.is_file() for path in checksums):
                _download(dataset_class, data_dir)
    _verify(checksums)
    train, test = (dataset_class(data_dir, train=is_train) for is_train in (True, False))
    images = [torch.from_numpy(rgb_to_gray(part.data)) if name == "cifar10" else part.data for part in (train, test)]
    labels = [torch.as_tensor(part.targets) for part in (train, test)]
    classes = tuple(train.classes) if name == "cifar10" else DIGITS
    return Dataset(name, "real", classes, images[0], labels[0], images[1], labels[1])


def _published_checksums(name, dataset_class, data_dir):
    if name == "mnist":
        return {data_dir / "MNIST" / "raw" / file: md5 for file, md5 in MNIST_MD5.items()}
    listed = [*dataset_class.train_list, *dataset_class.test_list]
    listed.append((dataset_class.meta["filename"], dataset_class.meta["md5"]))
    return {data_dir / dataset_class.base_folder / file: md5 for file, md5 in listed}


def _verify(checksums):
    from torchvision.datasets.utils import check_integrity

    for path, md5 in checksums.items():
        if not check_integrity(path, md5):
            raise InputError(
                f"{path} is damaged (its MD5 sum is not the published {md5}); delete it and run again to download it"
            )


@contextmanager
def _sole_downloader(data_dir):
    """Let one process at a time download; what fails for it has failed for all that waited, so that they agree."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(data_dir, os.W_OK):
        raise InputError(f"the data folder {data_dir} cannot be written; choose another one with --data-dir")
    with open(data_dir / ".download.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        failure = lock.read()
        if failure and os.fstat(lock.fileno()).st_mtime > STARTED:
            raise ConnectionError(failure)
        lock.truncate(0)
        try:
            yield
        except ConnectionError as error:
            lock.write(str(error))
            raise


def _download(dataset_class, data_dir):
    """Download into data_dir; raises ConnectionError with the reason when that fails."""
    print(f"downloading {dataset_class.__name__} to {data_dir} ...", flush=True)
    timeout, quiet = socket.getdefaulttimeout(), io.StringIO()
    socket.setdefaulttimeout(SERVER_TIMEOUT)
    try:
        with redirect_stdout(quiet), redirect_stderr(sys.stderr if sys.stderr.isatty() else quiet):
            dataset_class(data_dir, download=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        raise ConnectionError(" ".join(str(getattr(error, "reason", error)).split())) from None
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Data: the embedded sets, 10,000 training and 2,000 test images each, made from a fixed seed
# ---------------------------------------------------------------------------------------------------------------------

SYNTHETIC_TRAIN, SYNTHETIC_TEST = 10_000, 2_000
# A texture is a function of tilted coordinates u (to the right) and v (down), frequency f and phase p, about -1 to 1.
TEXTURES = {
    "horizontal": lambda u, v, f, p: np.sin(f * v + p),
    "rising": lambda u, v, f, p: np.sin(f * (u + v) / np.sqrt(2) + p),
    "vertical": lambda u, v, f, p: np.sin(f * u + p),
    "falling": lambda u, v, f, p: np.sin(f * (u - v) / np.sqrt(2) + p),
    "checkers": lambda u, v, f, p: np.sign(np.sin(f * u + p) * np.sin(f * v + p)),
    "dots": lambda u, v, f, p: np.sign(np.cos(f * u + p) + np.cos(f * v + p) - 0.9),
    "rings": lambda u, v, f, p: np.sin(f * np.hypot(u, v) + p),
    "rays": lambda u, v, f, p: np.sin(np.round(f / 2) * np.arctan2(v, u) + p),
    "waves": lambda u, v, f, p: np.sin(f * v + 2.5 * np.sin(4 * u + p)),
    "blots": lambda u, v, f, p: np.sin(f * u + 2 * np.sin(f * v / 2)) * np.sin(f * v + 2 * np.sin(f * u / 2 + p)),
}


def _synthetic_dataset(name, classes, images, labels):
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    split = SYNTHETIC_TRAIN
    return Dataset(name, "synthetic", classes, images[:split], labels[:split], images[split:], labels[split:])


def synthetic_pictures(seed=0):
    """Ten classes of oriented stripes and textures in place of CIFAR-10: 32 x 32 RGB, turned to gray like CIFAR-10."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=SYNTHETIC_TRAIN + SYNTHETIC_TEST)
    images = np.empty((len(labels), 32, 32), dtype=np.uint8)
    for label, texture in enumerate(TEXTURES.values()):
        images[labels == label] = rgb_to_gray(_draw_pictures(texture, (labels == label).sum(), rng))
    return _synthetic_dataset("cifar10", tuple(TEXTURES), images, labels)


def _draw_pictures(texture, count, rng):
    """Draw the texture between a dark and a light colour, tilted and moved, under noise: uint8 (count, 32, 32, 3)."""

    def each(low, high):  # one random number an image
        return rng.uniform(low, high, (count, 1, 1))

    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    x, y, tilt = x - each(-0.5, 0.5), y - each(-0.5, 0.5), np.radians(each(-18, 18))
    u, v = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    pattern = texture(u, v, each(7, 16), each(0, 2 * np.pi)) * rng.choice([-1, 1], (count, 1, 1))
    share = (0.5 + each(0.1, 0.5) * pattern)[..., None]
    dark, light = (rng.uniform(low, low + 120, (count, 1, 1, 3)) for low in (0, 135))
    grain = rng.normal(0, 25, (count, 32, 32, 3))
    return np.clip(light * share + dark * (1 - share) + grain, 0, 255).astype(np.uint8)


def synthetic_digits(seed=0):
    """Ten digits in place of MNIST: 28 x 28, matplotlib's fonts, randomly turned, moved, scaled and made noisy."""
    glyphs = torch.from_numpy(_glyph_sheet())  # (styles, 10, 56, 56)
    generator = torch.Generator().manual_seed(seed)
    count = SYNTHETIC_TRAIN + SYNTHETIC_TEST

    def each(low, high):  # one random number an image
        return torch.empty(count).uniform_(low, high, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    styles = torch.randint(len(glyphs), (count,), generator=generator)
    angle, zoom = torch.deg2rad(each(-10, 10)), 1 / each(0.85, 1.15)
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    affine = torch.stack([cos, -sin, each(-0.1, 0.1), sin, cos, each(-0.1, 0.1)], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, (count, 1, 28, 28), align_corners=False)
    digits = F.grid_sample(glyphs[styles, labels].unsqueeze(1), grid, align_corners=False).squeeze(1)
    noise = 0.1 * torch.randn(digits.shape, generator=generator)
    images = ((digits + noise).clamp(0, 1) * 255).to(torch.uint8)
    return _synthetic_dataset("mnist", DIGITS, images, labels)


def _glyph_sheet(size=56):
    """Draw every digit in each bundled font at three stroke widths: float32 (styles, 10, size, size) in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    names = "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif STIXGeneral cmss10"
    glyphs = []
    for name, stroke_width, digit in itertools.product(names.split(), (0, 1, 2), DIGITS):
        file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        font, glyph = ImageFont.truetype(file, 0.7 * size), Image.new("L", (size, size))
        brush = ImageDraw.Draw(glyph)
        left, top, right, bottom = brush.textbbox((0, 0), digit, font, stroke_width=stroke_width)
        corner = ((size - left - right) / 2, (size - top - bottom) / 2)
        brush.text(corner, digit, 255, font, stroke_width=stroke_width)
        glyphs.append(np.asarray(glyph, dtype=np.float32) / 255)
    return np.stack(glyphs).reshape(-1, len(DIGITS), size, size)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: configuration, metrics, checkpoint, snapshots, TensorBoard events
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
TENSORBOARD_TAGS = {
    "Loss/Train": "train_loss",
    "Accuracy/Train": "train_accuracy",
    "Loss/Test": "test_loss",
    "Accuracy/Test": "test_accuracy",
}


class Run:
    """A run's folder while it is trained, locked against every other process.

    config: dict, what stands in config.json; of a run that continues, the one it started with.
    history: list of dict, the rows of metrics.csv; epoch: the last one finished, 0 at the start.
    writer: TensorBoard's SummaryWriter, from start() on.
    Raises InputError when another process trains this run or its checkpoint is unusable.
    """

    def __init__(self, folder, config, fresh=False):
        self.folder, self.config, self.history, self.writer = Path(folder), config, [], None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        self._checkpoint = None
        if (self.folder / "checkpoint.pt").exists() and not fresh:
            self._checkpoint = load_checkpoint(self.folder)
            self.history = self._checkpoint["history"]
            self.config = {**self._checkpoint["config"], "epochs": max(config["epochs"], self.epoch)}
            if any(self.config[name] != config[name] for name in ("script", *SETTINGS[config["script"]])):
                raise InputError(
                    f"{self.folder} holds another experiment; --fresh starts over, or use another --runs-dir"
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.writer:
            self.writer.close()
        self._checkpoint = None
        self._lock.close()

    @property
    def epoch(self):
        return len(self.history)

    def start(self, model, optimizer):
        """Take up the checkpoint if there is one, sweep away what an unfinished start left, open TensorBoard's file."""
        from torch.utils.tensorboard import SummaryWriter

        for leftover in (*self.folder.glob("*.part"), *self.folder.glob("snapshots/*.part")):
            leftover.unlink()
        if self._checkpoint:
            restore(self._checkpoint, model, optimizer)
            self._cut_events(self._checkpoint["events"])
            self._checkpoint = None
        else:
            self._sweep()
        self._save_config()
        self.writer = SummaryWriter(str(self.folder))
        _, session_start, self._session_end = self._hyperparameters()
        self.writer.file_writer.add_summary(session_start)

    def record(self, metrics, model, optimizer):
        """Keep a finished epoch: TensorBoard's points, then metrics.csv, then the checkpoint that makes it count."""
        self.history.append(metrics)
        for tag, name in TENSORBOARD_TAGS.items():
            self.writer.add_scalar(tag, metrics[name], self.epoch)
        if self.epoch == self.config["epochs"]:
            self.writer.file_writer.add_summary(self._session_end)
        self.writer.flush()
        table = io.StringIO()
        rows = csv.DictWriter(table, METRICS, lineterminator="\n")
        rows.writeheader()
        rows.writerows(self.history)
        write_atomically(self.folder / "metrics.csv", table.getvalue().encode())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        events = {path.name: path.stat().st_size for path in self._event_files()}
        about = {"config": self.config, "history": self.history, "events": events}
        save_tensors(self.folder / "checkpoint.pt", {**about, **state})

    def record_divergence(self, epoch):
        self._save_config(diverged=epoch)

    @property
    def diverged(self):
        """The epoch in which the last attempt to train this run diverged, None when it did not."""
        try:
            return json.loads((self.folder / "config.json").read_text()).get("diverged")
        except (OSError, ValueError):
            return None

    def _save_config(self, **more):
        write_atomically(self.folder / "config.json", json.dumps({**self.config, **more}, indent=2).encode() + b"\n")

    def save_snapshot(self, epoch, tensors):
        """Write snapshots/epoch_NN.pt, a dict of tensors by parameter name."""
        (self.folder / "snapshots").mkdir(exist_ok=True)
        save_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt", tensors)

    def _hyperparameters(self):
        """TensorBoard's HParams records, written into the run itself; the metrics are the scalars that it has anyway.

        The record that lists an experiment's columns (the first) is left out: TensorBoard then collects them over all
        runs, so that different kinds of network share one table.
        """
        from torch.utils.tensorboard.summary import hparams

        surroundings = ("epochs", "data_source", "device", "precision", "threads", "parameters")
        settings = {name: self.config[name] for name in (*SETTINGS[self.config["script"]], *surroundings)}
        return hparams(settings, dict.fromkeys(TENSORBOARD_TAGS, 0.0))

    def _event_files(self):
        return list(self.folder.glob("events.out.tfevents.*"))

    def _cut_events(self, sizes):
        """Take off what was written after the checkpoint; sizes: bytes by file name."""
        for path in self._event_files():
            if path.name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[path.name]:
                os.truncate(path, sizes[path.name])

    def _sweep(self):
        for path in (*self._event_files(), self.folder / "metrics.csv", self.folder / "checkpoint.pt"):
            path.unlink(missing_ok=True)
        for name in ("snapshots", "figures"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _lock(folder):
    lock = open(folder / ".lock", "w")  # noqa: SIM115, it is held until the run ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise LockedError(
            f"{folder} is being trained by another process; wait for it or choose other settings"
        ) from None
    return lock


def write_atomically(path, content):
    """Write bytes to path so that a reader, or a crash, sees either the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, is on the disk
        os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path, tensors):
    content = io.BytesIO()
    torch.save(tensors, content)
    write_atomically(path, content.getbuffer())


def load_tensors(path, keys=()):
    """Return the dict that save_tensors wrote, its tensors on the CPU; no code in the file is run.

    Raises InputError when the file is truncated, is not one of this project's, or lacks one of the keys.
    """
    content = io.BytesIO(Path(path).read_bytes())
    with suppress(Exception):  # a damaged file may raise anything
        tensors = torch.load(content, map_location="cpu", weights_only=True)
        if tensors.keys() >= set(keys):
            return tensors
    raise InputError(f"{path} is damaged or not of this project; run its training again with --fresh")


def load_checkpoint(folder):
    """Return a run's checkpoint, tensors on the CPU: config, history, events, model, optimizer, random.

    Raises InputError as load_tensors does, and for settings that no run can have.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"{folder} holds no checkpoint.pt; train the run first, or name a run folder below runs/")
    checkpoint = load_tensors(path, keys=("config", "history", "events", "model", "optimizer", "random"))
    check_config(checkpoint["config"], path)
    with suppress(KeyError, TypeError, AttributeError):
        sizes = checkpoint["events"].values()
        if is_history(checkpoint["history"]) and all(isinstance(size, int) and size >= 0 for size in sizes):
            return checkpoint
    raise InputError(f"{path} is damaged or not of this project; run its training again with --fresh")


def is_history(rows):
    """Whether rows, a list of dict, are metrics of epochs from 1 on, all finite; may raise KeyError and TypeError."""
    in_order = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    return in_order and all(math.isfinite(row[name]) for row in rows for name in METRICS)


def restore(checkpoint, model, optimizer=None):
    """Load a checkpoint's state; raises InputError when it does not fit the model or the optimizer."""
    try:
        model.load_state_dict(checkpoint["model"])
        if optimizer:
            groups = optimizer.state_dict()["param_groups"]  # rates are the configuration's
            optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
            for parameter, state in optimizer.state.items():
                if any(value.shape not in ((), parameter.shape) for value in state.values()):
                    raise ValueError
            torch.set_rng_state(checkpoint["random"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        message = "the checkpoint's weights do not fit its settings; run its training again with --fresh"
        raise InputError(message) from None


def read_metrics(folder):
    """Return metrics.csv as a list of dict of float; raises InputError when it is missing or unreadable."""
    path = Path(folder) / "metrics.csv"
    try:
        with open(path, newline="") as file:
            rows = [{name: float(row[name]) for name in METRICS} for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError):
        rows = []
    if not rows or not is_history(rows):
        raise InputError(f"{path} is missing, empty or damaged; train the run first")
    return rows


def read_config(folder):
    """Return config.json as a dict; raises InputError when it is missing, unreadable or holds what no run can have."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; name a run folder below runs/") from None
    check_config(config, path)
    return config


def check_config(config, path):
    """Raises InputError when a setting in a run's config, read from path, is missing or is none that a run can have."""
    name = "script"
    try:
        for name in (*COMMON_SETTINGS, *SETTINGS[config["script"]]):
            if RULES[name](str(config[name])) != config[name]:
                raise ValueError
        name = "dataset"
        if config["script"] == "rnn_mnist" and config["dataset"] != "mnist":
            raise ValueError
    except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError):
        value = config.get(name, "missing") if isinstance(config, dict) else "missing"
        raise InputError(f"{path} is not of this project: {name} is {str(value)[:80]}; train the run again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A network that turns prepare(images) into logits (N, classes)."""

    def prepare(self, images):
        """Turn uint8 images (N, H, W) into the network's float32 input."""
        raise NotImplementedError

    def probabilities(self, inputs):
        """Return the class probabilities (N, classes): the softmax of the logits, which the loss takes by itself."""
        return self(inputs).softmax(dim=1)


def autocast(device, precision):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def predict(model, images, precision, batch_size=1000):
    """Return the logits, float32 (N, classes), of uint8 images (N, H, W)."""
    with autocast(images.device, precision):
        return torch.cat([model(model.prepare(batch)).float() for batch in images.split(batch_size)])


def evaluate(model, images, labels, precision):
    """Return the mean cross-entropy per image and the accuracy in percent."""
    logits = predict(model, images, precision)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.cpu().double().mean().item(), 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def train_epoch(model, optimizer, images, labels, order, batch_size, precision):
    """Train on images[order], one batch after the other.

    Returns the mean cross-entropy per image and the accuracy in percent, each image judged in the step that trains on
    it, before the step changes the weights.
    """
    losses, hits = [], []
    hidden = True if processes() > 1 else None  # None: shown on a terminal
    for batch in tqdm(order.split(batch_size), unit="batch", leave=False, disable=hidden):
        inputs, targets = model.prepare(images[batch]), labels[batch]
        with autocast(images.device, precision):
            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(batch))
        hits.append((logits.argmax(1) == targets).sum())
    total_loss, total_hits = (torch.stack(values).cpu().double().sum().item() for values in (losses, hits))
    return total_loss / len(order), 100 * total_hits / len(order)


def make_optimizer(model, config):
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"])
    return torch.optim.Adam(model.parameters(), lr=config["lr"], fused=config["device"] != "mps")


def shuffled(count, seed, epoch):
    """Return the order of an epoch's training images, int64 (count,), which depends on nothing but seed and epoch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(count, generator=generator)


def train(run, model, data, after_epoch):
    """Train run's model up to the configured epoch, each epoch kept as soon as it is finished.

    after_epoch(run, model, data, epoch) is called at the start (epoch 0) and before each epoch is recorded.
    Raises TrainingError when a loss is no longer finite; the last good checkpoint stays.
    """
    config = run.config
    optimizer = make_optimizer(model, config)
    run.start(model, optimizer)
    if run.epoch == 0:
        run.writer.add_graph(model, model.prepare(data.test_images[:1]))
        after_epoch(run, model, data, 0)
    print("epoch  train loss  train accuracy  test accuracy  seconds", flush=True)
    for epoch in range(run.epoch + 1, config["epochs"] + 1):
        start = time.perf_counter()
        order = shuffled(len(data.train_images), config["seed"], epoch).to(config["device"])
        train_loss, train_accuracy = train_epoch(
            model, optimizer, data.train_images, data.train_labels, order, config["batch_size"], config["precision"]
        )
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = evaluate(model, data.test_images, data.test_labels, config["precision"])
        lost = [loss for loss in (train_loss, test_loss) if not math.isfinite(loss)]
        if lost:
            run.record_divergence(epoch)
            kept = f"the checkpoint of epoch {run.epoch} is kept" if run.epoch else "no epoch was finished"
            raise TrainingError(
                f"the loss became {lost[0]} in epoch {epoch} at learning rate {config['lr']:g}; {kept}; "
                "try a smaller --lr"
            )
        after_epoch(run, model, data, epoch)
        values = (epoch, train_loss, train_accuracy, test_loss, test_accuracy, seconds)
        run.record(dict(zip(METRICS, values, strict=True)), model, optimizer)
        counted = f"{epoch:>{len(str(config['epochs']))}}/{config['epochs']}"
        accuracies = f"{train_accuracy:12.2f} %  {test_accuracy:11.2f} %"
        print(f"{counted:>5}  {train_loss:10.4f}  {accuracies}  {seconds:7.1f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# One experiment and many
# ---------------------------------------------------------------------------------------------------------------------

REPORT_EPOCHS = 10  # the reference report's accuracies are those after its last epoch


class Experiment(NamedTuple):
    """A row of the reference report: its settings and its test accuracy in percent, None where it gives no figure.

    remark: why the figure is missing or not comparable; such a row is not compared.
    """

    settings: dict
    reported: float | None
    remark: str = ""


def reported_row(config, experiments):
    """Return the reference report's Experiment with a run's settings, None where it has none or on other data."""
    if config["data_source"] != "real" or config["epochs"] != REPORT_EPOCHS:
        return None
    matches = (row for row in experiments if all(config[key] == value for key, value in row.settings.items()))
    return next(matches, None)


def reported_accuracy(config, experiments):
    """Return the test accuracy in percent that a run compares with, None where the report has no such figure."""
    row = reported_row(config, experiments)
    return row.reported if row and not row.remark else None


def processes():
    """Return how many processes work through the same list, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def requested_settings(script, args, experiments):
    """Return what a script's flags ask for, a list of settings (dict by name), no two alike.

    With --report that is the report's list, else the product of the flags' values; momentum is SGD's alone.
    """
    names = SETTINGS[script]
    if args.report:
        grid = [{**experiment.settings, "seed": seed} for seed in args.seed for experiment in experiments]
    else:
        values = itertools.product(*(getattr(args, name) for name in names))
        grid = [dict(zip(names, combination, strict=True)) for combination in values]
    for settings in grid:
        settings["momentum"] *= settings["optimizer"] == "sgd"
    ordered = [{name: settings[name] for name in names} for settings in grid]
    return [settings for number, settings in enumerate(ordered) if settings not in ordered[:number]]


def run_experiments(script, args, build_model, experiments, after_epoch=lambda run, model, data, epoch: None):
    """Train what the flags ask for, each experiment in its run folder; say how it ended and what to type next.

    build_model(config) returns the untrained network; after_epoch: see train.
    """
    args.threads = share_of_cores()
    sets, grid = {}, requested_settings(script, args, experiments)

    def train_one(settings):
        name = settings["dataset"]
        if name not in sets:
            sets[name] = load_data(name, args.data, args.data_dir)
            if sets[name].source == "synthetic":
                print(synthetic_notice(name))
        config = resolve_config(script, args, settings, sets[name].source)
        with redirect_stdout(io.StringIO()) if processes() > 1 else nullcontext():
            run = train_experiment(config, args, sets[name], build_model, after_epoch, alone=len(grid) == 1)
        if processes() > 1 and run.writer and run.history:
            print(f"{run.folder}: {run.history[-1]['test_accuracy']:.2f} % after epoch {run.epoch}", flush=True)
        return run

    if len(grid) == 1:
        run = train_one(grid[0])
        accuracy, reported = run.history[-1]["test_accuracy"], reported_accuracy(run.config, experiments)
        compared = f" (the reference report: {reported} %)" if reported else ""
        print(f"test accuracy {accuracy:.2f} % after epoch {run.epoch}{compared}")
        to_visualize = run.folder
    else:
        runs = work_through(grid, train_one)
        if runs is None:
            return
        epoch = min(args.epochs, REPORT_EPOCHS) if args.report else args.epochs
        print_results(runs, epoch, experiments)
        to_visualize = args.runs_dir
    for name, data in sets.items():
        if data.source == "synthetic":
            print(synthetic_notice(name))
    print(f"\nNext:\n  tensorboard --logdir {args.runs_dir}\n  python visualize.py {to_visualize}")


def share_of_cores():
    """Return the number of threads for this process, one of several on this machine if torchrun says so."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.get_num_threads() if local == 1 else max(1, os.cpu_count() // local)


def train_experiment(config, args, data, build_model, after_epoch, alone):
    """Train an experiment up to --epochs, from where its folder stands; return its Run.

    alone: it is the only one asked for; else one that diverged before is left as it is.
    """
    with Run(run_folder(args.runs_dir, config), config, args.fresh) as run:
        check_device(run.config["device"])
        torch.set_num_threads(run.config["threads"])
        torch.manual_seed(run.config["seed"])
        model = build_model(run.config).to(run.config["device"])
        run.config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if run.epoch >= args.epochs:
            print(f"{run.folder}: complete with {run.epoch} epochs; a larger --epochs extends it, --fresh starts over")
        elif run.diverged and not (alone or args.fresh):
            print(f"{run.folder}: diverged in epoch {run.diverged}; --fresh starts over")
        else:
            print("{folder}: {parameters:,} parameters, {device}, {precision}".format(folder=run.folder, **run.config))
            try:
                train(run, model, data.to(run.config["device"]), after_epoch)
            except TrainingError as error:
                if alone:
                    raise
                print(f"{run.folder}: {error}", file=sys.stderr)
    return run


def work_through(grid, train_one):
    """Train all settings of grid but those that other processes are training; return their Runs in grid's order.

    The first process waits for the others' runs, and takes them over should they die; the others return None when
    there is nothing left to take.
    """
    runs = [None] * len(grid)
    first, announced = int(os.environ.get("RANK", 0)) == 0, False
    while None in runs:
        missing = runs.count(None)
        for number, settings in enumerate(grid):
            if runs[number] is None:
                with suppress(LockedError):
                    runs[number] = train_one(settings)
        if runs.count(None) == missing:  # other processes train all that is left
            if not first:
                return None
            if not announced:
                print(f"waiting for what other processes train, {missing} of {len(grid)} runs", flush=True)
            announced = True
            time.sleep(1)
    return runs if first else None


def print_results(runs, epoch, experiments):
    """Print an aligned table of test accuracies in percent after an epoch, a row for each setting.

    measured: the mean over seeds; std: their standard deviation; within: whether the reported figure lies within what
    several seeds span. A column that has nothing to say is left out.
    """
    settings = {}
    for run in runs:
        settings.setdefault(experiment_name(run.config, with_seed=False), []).append(run)
    rows = [("setting", "reported", "measured", "difference", "std", "seeds", "within")]
    for name, group in settings.items():
        measured = [run.history[epoch - 1]["test_accuracy"] for run in group if run.epoch >= epoch]
        reported = reported_accuracy({**group[0].config, "epochs": epoch}, experiments)
        mean = f"{statistics.fmean(measured):.2f}" if measured else "diverged"
        difference = f"{statistics.fmean(measured) - reported:+.2f}" if measured and reported else ""
        row = [name, f"{reported:.2f}" if reported else "", mean, difference]
        if len(measured) > 1:
            within = "yes" if reported and min(measured) <= reported <= max(measured) else "no"
            row += [f"{statistics.stdev(measured):.2f}", str(len(measured)), within if reported else ""]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    print(f"\ntest accuracy in % after epoch {epoch}")
    for name, *figures in zip(*columns, strict=True):
        aligned = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with default values in the help, no abbreviations, and errors of one line."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags and their values\n")


def _checked(convert, accept, wanted):
    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def one_of(*names):
    return _checked(str, names.__contains__, f"one of {', '.join(names)}")


def whole_number(low, high):
    return _checked(int, lambda value: low <= value <= high, f"a whole number from {low} to {high}")


folder_name = _checked(str, bool, "the name of a folder")

# What a setting may be, on the command line and in the files of a run: functions from its text to its value.
RULES = {
    "script": one_of("cnn_cifar10", "rnn_mnist"),
    "dataset": one_of(*DATASET_TITLES),
    "cell": one_of("rnn", "gru", "lstm"),
    "hidden_size": whole_number(1, 4096),
    "optimizer": one_of("adam", "sgd"),
    "lr": _checked(float, lambda value: 0 < value < math.inf, "a number above 0"),
    "momentum": _checked(float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "batch_size": whole_number(1, 60_000),
    "seed": whole_number(0, 2**31 - 1),
    "epochs": whole_number(1, 999),
    "data_source": one_of("real", "synthetic"),
    "data_dir": folder_name,
    "device": one_of("cpu", "cuda", "mps"),
    "precision": one_of("fp32", "bf16"),
    "threads": whole_number(1, 1024),
    "parameters": whole_number(1, 10**9),
}
COMMON_SETTINGS = [name for name in RULES if name not in ("cell", "hidden_size")]  # of every run
# The settings that define a script's experiment, in the order in which they name its folder.
SETTINGS = {
    "cnn_cifar10": ("dataset", "optimizer", "lr", "momentum", "batch_size", "seed"),
    "rnn_mnist": ("dataset", "cell", "hidden_size", "optimizer", "lr", "momentum", "batch_size", "seed"),
}


def experiment_parser(description, lr, batch_size):
    """Return the parser of the flags that both training scripts share; lr and batch_size are the defaults."""
    parser = ArgumentParser(description)
    flag = parser.add_argument
    flag("--optimizer", nargs="+", choices=("adam", "sgd"), default=["adam"], help="default: adam")
    flag("--lr", nargs="+", type=RULES["lr"], default=[lr], help=f"learning rate; default: {lr:g}")
    flag("--momentum", nargs="+", type=RULES["momentum"], default=[0.0], help="momentum of SGD; default: 0")
    flag("--epochs", type=RULES["epochs"], default=10, help="default: 10")
    flag("--batch-size", nargs="+", type=RULES["batch_size"], default=[batch_size], help=f"default: {batch_size}")
    flag("--seed", nargs="+", type=RULES["seed"], default=[0], help="default: 0")
    real_first = "auto: the real set if it is there or can be downloaded, else the embedded one; default: auto"
    flag("--data", choices=("auto", "real", "synthetic"), default="auto", help=real_first)
    flag("--data-dir", type=folder_name, default="data", help="where the real sets lie or shall lie; default: data")
    flag("--runs-dir", type=folder_name, default="runs", help="where the run's folder is made; default: runs")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    native_bf16 = "auto: bf16 where it pays and the hardware multiplies it natively, else fp32; default: auto"
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=native_bf16)
    flag("--report", action="store_true", help="run the reference report's experiments, for each --seed")
    flag("--fresh", action="store_true", help="start over instead of continuing the run's folder")
    return parser


def parse_experiments(script, parser):
    """Return a script's parsed command line."""
    args = parser.parse_args()
    if any(args.momentum) and "sgd" not in args.optimizer:
        parser.error(f"argument --momentum: {max(args.momentum):g} needs --optimizer sgd")
    changed = [name for name in SETTINGS[script] if name != "seed" and getattr(args, name) != parser.get_default(name)]
    if args.report and changed:
        parser.error(f"argument --report: brings its own settings; leave out --{changed[0].replace('_', '-')}")
    if args.fresh and processes() > 1:
        parser.error("argument --fresh: several processes cannot start over together; delete the run folders instead")
    return args


def check_device(device):
    """Raises InputError when the device ('cpu', 'cuda' or 'mps') is not there."""
    if device != "cpu" and not getattr(torch, device).is_available():
        raise InputError(f"the device {device} is not there; use --device cpu, or --device auto for the best there is")


def best_device():
    return next((device for device in ("cuda", "mps") if getattr(torch, device).is_available()), "cpu")


def multiplies_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# Up to here threads that wait for each other at every step gain little, and crawl when another process is at work.
SMALL_HIDDEN_SIZE = 64


def resolve_config(script, args, settings, data_source):
    """Return what config.json holds: the settings, and everything else a run's numbers may depend on."""
    device = best_device() if args.device == "auto" else args.device
    check_device(device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if script == "cnn_cifar10" and multiplies_bf16(device) else "fp32"
    return {
        "script": script,
        **settings,
        "epochs": args.epochs,
        "data_source": data_source,
        "data_dir": args.data_dir,
        "device": device,
        "precision": precision,
        "threads": 1 if settings.get("hidden_size", math.inf) <= SMALL_HIDDEN_SIZE else args.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": version("torchvision"),
        },
        "commit": git_commit(),
    }


def git_commit():
    """Return the commit that this code stands at, with '-dirty' behind it if changed; None outside a repository."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def experiment_name(config, with_seed=True):
    """Return the name made from the settings that define an experiment, the data source first when it is not real."""
    units = {"lr": "lr", "momentum": "momentum", "hidden_size": "hidden", "batch_size": "batch", "seed": "seed"}
    skipped = {"momentum" if config["optimizer"] == "adam" else None, None if with_seed else "seed"}
    parts = [f"{units.get(key, '')}{config[key]}" for key in SETTINGS[config["script"]] if key not in skipped]
    return "_".join(["synthetic"] * (config["data_source"] == "synthetic") + parts)


def run_folder(runs_dir, config):
    return Path(runs_dir, config["script"], experiment_name(config))
