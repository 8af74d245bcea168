"""Code that both training scripts share.

In this order: errors, data sets, settings, the run's folder, loss and accuracy, tables of results, training many runs,
and the command line. Each training script calls main(), the last function.

A setting is one value of the command line, such as the learning rate; a Config holds all settings of an experiment. A
run is an experiment with its folder. Runs that differ only in their seeds form a group.
"""

import argparse
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


def print_line(line, stream=None):
    """Print a line on standard output or another stream. If the stream has been closed, drop the line and go on."""
    try:
        print(f"{line}\n", end="", file=stream, flush=True)  # in one piece: torchrun's processes share a stream
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


try:  # torch takes seconds to load
    import numpy as np
    import torch
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
    from PIL import Image
    from tqdm import tqdm
except KeyboardInterrupt:
    print_line("interrupted", sys.stderr)
    sys.exit(130)

# Errors and exit statuses --------------------------------------------------------------------------------------------

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """Invalid command line or input: exit status 2."""


class TrainingError(Exception):
    """Training failed: exit status 1."""


FAILURES = (InputError, TrainingError, OSError, MemoryError, RuntimeError)


def describe_error(error):
    """Return the exit status and the one-line message of an expected error; re-raise a RuntimeError that is a bug."""
    message = " ".join(str(error).splitlines())
    if isinstance(error, MemoryError) or "allocate memory" in message or "out of memory" in message:
        return 1, "error: not enough memory; close other programs, or use a smaller network or --batch-size"
    if isinstance(error, RuntimeError):
        raise error
    status = 1 if isinstance(error, TrainingError) else 2
    if isinstance(error, OSError):
        path = error.filename
        message = error.strerror or message
        if path and os.path.islink(path) and not os.path.exists(path):
            message = f"is a link to {os.readlink(path)}, which does not exist"
        message = f"{path}: {message}" if path else message
        if error.errno in DISK_FULL_ERRORS:
            status = 1
            message += "; free some space and run the same command again"
    return status, f"error: {message}"


@contextmanager
def exit_with_status():
    """Run a script's main, as its decorator, and end the process, with one line about Ctrl-C or an expected error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's stream, or one that the caller has closed
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    threading.excepthook = lambda failure: None  # TensorBoard's thread hands its errors to the main thread, too
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    status, message = 0, ""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except KeyboardInterrupt:
        status, message = 130, "interrupted; finished work is kept; the same command, without --fresh, continues"
    except FAILURES as error:
        status, message = describe_error(error)
    if message:
        print_line(f"{Path(sys.argv[0]).name}: {message}", sys.stderr)
    sys.exit(status)


# Data sets -----------------------------------------------------------------------------------------------------------

DOWNLOAD_TIMEOUT = 20  # seconds without an answer from the server
Split = namedtuple("Split", "images labels")  # gray images, uint8 (N, H, W), and their labels, int64 (N,)


class Dataset(NamedTuple):
    """The two splits of a data set and the names of its classes."""

    source: str  # 'real' or 'synthetic'
    classes: tuple[str, ...]
    train: Split
    test: Split

    def to(self, device):
        """Return the data set with its tensors on a device."""
        splits = [Split(images.to(device), labels.to(device)) for images, labels in (self.train, self.test)]
        return self._replace(train=splits[0], test=splits[1])


# label: its name in captions; folder and files: where torchvision expects them; md5: of the images and labels of both
# splits; size: height and width in pixels.
DatasetSpec = namedtuple("DatasetSpec", "label torchvision_class folder files md5 classes size")
DATASETS = {
    "cifar10": DatasetSpec(
        label="CIFAR-10",
        torchvision_class="CIFAR10",
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        md5="40ded36d89af4b46d87c8f47a04296e0",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        size=32,
    ),
    "mnist": DatasetSpec(
        label="MNIST",
        torchvision_class="MNIST",
        folder="MNIST/raw",
        files=tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
        md5="3a8942afaa4d4472e73e631e8d5025b7",
        classes=tuple("0123456789"),
        size=28,
    ),
}


@cache
def load_data(name, mode, data_dir, pixels="in-place"):
    """Return a Dataset by its name in DATASETS. Raises InputError if files are damaged, ConnectionError if missing.

    mode: 'real', 'synthetic', or 'auto', which is real if possible; pixels: 'permuted' permutes them (Le et al., 2015).
    """
    spec = DATASETS[name]
    splits = None
    if mode != "synthetic":
        try:
            splits = read_real_splits(spec, data_dir)
        except ConnectionError as error:
            if mode == "real":
                raise
            print_once(f"{error}.")
    source, classes = ("real", spec.classes) if splits else ("synthetic", SYNTHETIC_CLASSES)
    if source == "synthetic":
        print_once(SYNTHETIC_NOTICE)
        splits = synthetic_splits(spec.size)
    if pixels == "permuted":
        order = torch.randperm(spec.size**2, generator=torch.Generator().manual_seed(0))
        splits = [Split(images.flatten(1)[:, order].view_as(images), labels) for images, labels in splits]
    return Dataset(source, classes, *splits)


def missing_files(spec, data_dir):
    """Return the paths of a data set's files that are missing, where torchvision expects them."""
    paths = [data_dir / spec.folder / file for file in spec.files]
    return [path for path in paths if not path.exists()]


def read_real_splits(spec, data_dir):
    """Return the training and the test Split of a data set, in gray, and download it first if files are missing.

    Raises InputError if files are damaged, ConnectionError if the download fails.
    """
    from torchvision import datasets

    torchvision_class = getattr(datasets, spec.torchvision_class)
    if missing_files(spec, data_dir):
        download(torchvision_class, spec, data_dir)
    try:
        splits = []
        for train in (True, False):
            dataset = torchvision_class(data_dir, train=train)
            images = np.asarray(dataset.data)
            if images.ndim == 4:  # in colour, (N, H, W, 3): as one tall picture
                tall = Image.fromarray(images.reshape(-1, *images.shape[2:])).convert("L")
                images = np.array(tall).reshape(images.shape[:3])
            splits.append(Split(torch.from_numpy(images), torch.as_tensor(dataset.targets)))
        content = b"".join(tensor.numpy() for tensor in itertools.chain(*splits))
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != spec.md5:
            raise ValueError("the MD5 sum of its images and labels is wrong")
        return splits
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torchvision raises whatever a damaged file leads to
        reason = f"{data_dir / Path(spec.folder).parts[0]} does not hold the official {spec.label} ({error})"
        raise InputError(f"{reason}; move it away to download the set again") from None


def download(torchvision_class, spec, data_dir):
    """Download a data set, in one process at a time. Raises ConnectionError if that fails."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"):
            if missing_files(spec, data_dir):  # otherwise another process has just downloaded them
                print_once(f"downloading {spec.label} to {data_dir} ...")
                torchvision_class(data_dir, download=True)
    except Exception as error:  # torchvision raises whatever a wrong archive leads to
        with suppress(OSError):  # of folders that are not empty
            os.removedirs(data_dir / spec.folder)
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in DISK_FULL_ERRORS or (number and error.filename):
            raise  # not an error of the network
        path = missing_files(spec, data_dir)[0]
        reason = f"cannot be downloaded ({' '.join(str(error).split())})"
        raise ConnectionError(f"{path} is missing and {reason}; copy it there, or use another --data-dir") from None


SYNTHETIC_SIZES = [4_000, 1_000]  # images of the training and of the test split
SYNTHETIC_CLASSES = tuple(f"pattern {number}" for number in range(10))
SYNTHETIC_NOTICE = "NOTE: this uses a small synthetic data set; do not compare its accuracies with published ones."


def synthetic_splits(size):
    """Return the training and the test Split of the synthetic set: ten smooth patterns, shifted, with noise."""
    rng = np.random.default_rng(0)
    count = sum(SYNTHETIC_SIZES)
    coarse = torch.from_numpy(rng.uniform(0, 255, (10, 1, 6, 6)))
    patterns = F.interpolate(coarse, (size, size), mode="bilinear")[:, 0].numpy()
    labels = rng.integers(10, size=count)
    down, right = rng.integers(-4, 5, (2, count, 1))
    rows, columns = (np.arange(size) + down) % size, (np.arange(size) + right) % size
    images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    train_images, test_images = torch.from_numpy(images).split(SYNTHETIC_SIZES)
    train_labels, test_labels = torch.from_numpy(labels).split(SYNTHETIC_SIZES)
    return [Split(train_images, train_labels), Split(test_images, test_labels)]


# Settings: the command line, names, captions and config.json all follow from one dataclass ---------------------------


def setting(default, **facts):
    """Return a dataclass field with a default value; facts are fields of SettingSpec."""
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class SettingSpec:
    """What is known about a setting: its values, its help text, and how names and captions show it."""

    name: str
    default: object
    help: str = ""
    choices: dict | tuple = ()  # a dict maps each choice to its label
    minimum: float = -math.inf
    maximum: float = math.inf
    always_shown: bool = False  # names and captions show it even at its default
    prefix: str | None = None  # what precedes the value in a run's name; None: '_' and the setting's name
    caption: str | None = None  # template, such as 'learning rate {}'; None: the name; '': captions leave it out
    none_label: str = ""  # how captions write None, the default of an optional number

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    @property
    def type(self):
        return float if self.default is None else type(self.default)

    def check(self, value):
        """Raise InputError if the setting cannot have this value."""
        if self.choices and value not in self.choices:
            raise InputError(f"{self.flag} must be one of {', '.join(self.choices)}, not {value}")
        if self.type in (int, float) and value is not None and not self.minimum <= value <= self.maximum:
            limits = f"{format_number(self.minimum)} and {format_number(self.maximum)}".replace("e+", "e")
            raise InputError(f"{self.flag} must be between {limits}, not {format_number(value)}")

    def name_part(self, value):
        """Return how a value appears in a run's name, such as '_lr1e-3'."""
        prefix = "_" + self.name.replace("_", "") if self.prefix is None else self.prefix
        return prefix + format_number(value)

    def label(self, value):
        """Return the caption of a value, such as 'learning rate 1e-3'."""
        template = self.name.replace("_", " ") + " {}" if self.caption is None else self.caption
        if value is None:
            return template.format(self.none_label)
        return template.format(self.choices[value] if isinstance(self.choices, dict) else format_number(value))


def format_number(value):
    """Return the shortest text that stands for this value and no other: 1e-3, 0.02, 128."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1)


@dataclass(frozen=True)
class Config:
    """The settings that define an experiment. Each script has a subclass that adds settings and changes defaults.

    The subclass also has the attributes script (its name), dataset (a key of DATASETS), network (its caption),
    precisions (the choices of --precision) and max_threads (None: no limit).
    """

    pixels: str = setting("in-place", choices=("in-place", "permuted"), prefix="_", help="order of the pixels")
    optimizer: str = setting(
        "adam", choices={"adam": "Adam", "sgd": "SGD"}, always_shown=True, prefix="_", caption="{}", help="optimizer"
    )
    lr: float = setting(
        1e-3, minimum=1e-12, maximum=1e12, always_shown=True, caption="learning rate {}", help="learning rate"
    )
    momentum: float = setting(0.0, minimum=0, maximum=1, help="momentum of SGD")
    batch_size: int = setting(64, minimum=1, maximum=60_000, prefix="_batch", caption="batch {}", help="batch size")
    seed: int = setting(
        0, maximum=2**31 - 1, minimum=0, always_shown=True, help="random seed (initial weights and order of the images)"
    )

    precisions = ("fp32",)
    max_threads = None

    def __post_init__(self):
        for spec, value in self.items():
            spec.check(value)
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"--momentum {format_number(self.momentum)} needs --optimizer sgd")

    @classmethod
    @cache
    def specs(cls):
        """Return the SettingSpec of every setting: the script's own first, then those that both scripts share."""
        shared = {entry.name: entry.metadata for entry in fields(Config)}
        specs = []
        for entry in sorted(fields(cls), key=lambda entry: entry.name in shared):
            specs.append(SettingSpec(entry.name, entry.default, **{**shared.get(entry.name, {}), **entry.metadata}))
        return specs

    def items(self):
        """Return (SettingSpec, value) of every setting."""
        return [(spec, getattr(self, spec.name)) for spec in self.specs()]

    def shown_items(self):
        """Return (SettingSpec, value) of the settings that names and captions show; most defaults are left out."""
        return [(spec, value) for spec, value in self.items() if spec.always_shown or value != spec.default]

    @property
    def name(self):
        """The name of the run's folder, which distinguishes this experiment from all others of its script."""
        return "".join(spec.name_part(value) for spec, value in self.shown_items()).strip("_")

    def captions(self):
        """Return the captions of the network and of the settings that are shown, by name, without empty ones."""
        captions = {"network": self.network} | {spec.name: spec.label(value) for spec, value in self.shown_items()}
        return {name: caption for name, caption in captions.items() if caption}

    @property
    def caption(self):
        """The experiment in words, without its seed."""
        return ", ".join(caption for name, caption in self.captions().items() if name != "seed")


def restore_config(config_class, recorded):
    """Return the Config with the settings that a run recorded, a dict; those that it lacks have their defaults."""
    changed = {name: value for name, value in recorded.items() if value != getattr(config_class, name, None)}
    try:
        return config_class(**changed)
    except TypeError as error:  # a setting that this version of the project lacks
        raise InputError(str(error)) from None


# The run's folder: checkpoint, metrics, snapshots and TensorBoard ----------------------------------------------------

METRIC_COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
START_OVER = "start over with --fresh, or use another --runs-dir"


def write_atomically(path, content):
    """Write bytes to a file so that a reader, or a crash, finds either the old file or the complete new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 0.5):
            with suppress(PermissionError):  # a virus scanner may hold the file for a moment
                os.replace(part, path)
                return
            time.sleep(pause)
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # some of these errors lack the path
    finally:
        part.unlink(missing_ok=True)  # unless it has become the file itself


def save_tensors(path, tensors):
    """Write a dict of tensors and plain values with torch.save, atomically."""
    content = io.BytesIO()
    torch.save(tensors, content)
    write_atomically(path, content.getbuffer())


def load_tensors(path, keys=frozenset()):
    """Return the dict that save_tensors wrote, on the CPU; raises InputError if it is damaged or lacks one of keys."""
    content = io.BytesIO(path.read_bytes())  # what is checked is what is loaded
    try:
        with zipfile.ZipFile(content) as archive:  # torch.load checks neither checksums nor sizes
            for entry in archive.infolist():
                if entry.file_size != entry.compress_size or entry.external_attr != 0:
                    raise zipfile.BadZipFile
                archive.read(entry)  # raises if the checksum is wrong
        content.seek(0)
        loaded = torch.load(content, map_location="cpu", weights_only=True)  # runs no code that it may contain
        if loaded.keys() >= keys:
            return loaded
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error):
            raise
    raise unusable(path)


def unusable(path):
    """Return the InputError that says what to do with a checkpoint or a snapshot that cannot be used."""
    advice = START_OVER if path.name == "checkpoint.pt" else "delete it"
    return InputError(f"{path} is damaged or from other settings; {advice}")


def format_csv(columns, rows):
    """Return rows as CSV text below the names of their columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def recorded_epochs(folder):
    """Return the number of epochs in a run's metrics.csv, 0 where there is none."""
    path = folder / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def read_checkpoint(folder):
    """Return a run's checkpoint, a dict of record, history and state; None where there is none."""
    path = folder / "checkpoint.pt"
    return load_tensors(path, {"record", "history", "state"}) if path.exists() else None


class Run:
    """A run during training, and its folder. The checkpoint is authoritative; the other records follow from it.

    conditions: data source, device, precision, epochs, threads and versions, a namespace; history: the rows of
    metrics.csv, list of dict; writer: TensorBoard's SummaryWriter. Raises InputError if args do not fit the folder.
    """

    def __init__(self, folder, config, args, data_source):
        self.folder = folder
        self.config = config
        self.history = []
        self.writer = None
        checkpoint = None if args.fresh else read_checkpoint(folder)
        if checkpoint:
            self.history = checkpoint["history"]
            self.conditions = SimpleNamespace(**checkpoint["record"]["conditions"])
            self._check_record(checkpoint["record"], args)
            self.conditions.epochs = max(args.epochs, self.epoch)
        elif args.fresh or recorded_epochs(folder) == 0:
            self.conditions = new_conditions(config, args, data_source)
        else:
            raise InputError(f"{folder} holds metrics.csv but no checkpoint.pt to continue from; {START_OVER}")
        self.device = self.conditions.device
        self.precision = self.conditions.precision
        needs_device = self.device != "cpu" and self.epoch < self.conditions.epochs
        if needs_device and not getattr(torch, self.device).is_available():
            advice = START_OVER if self.epoch else "use --device cpu"
            raise InputError(f"{folder}: the device {self.device} is not available; {advice}")

    def _check_record(self, record, args):
        """Raise InputError if the checkpoint is from other settings, or another device or precision is asked for."""
        recorded = vars(restore_config(type(self.config), record["settings"])) | record["conditions"]
        requested = vars(self.config) | {"device": args.device, "precision": args.precision}
        for name, value in requested.items():
            is_automatic = name in record["conditions"] and value == "auto"
            if recorded[name] != value and not is_automatic:
                flag = "--" + name.replace("_", "-")
                difference = f"{flag} {format_number(recorded[name])}, not {format_number(value)}"
                advice = f"leave it out, or {START_OVER}" if name in record["conditions"] else START_OVER
                raise InputError(f"{self.folder} was trained with {difference}; {advice}")

    @property
    def epoch(self):
        """The last finished epoch, 0 at the start."""
        return len(self.history)

    def resume(self, **parts):
        """Restore parts, anything with a state_dict, from the checkpoint if there is one; open TensorBoard's file."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._parts = parts
        if self.epoch:
            load_state(self.folder / "checkpoint.pt", read_checkpoint(self.folder)["state"], parts)
        else:  # first the checkpoint goes, from which the others follow
            for pattern in ("checkpoint.pt", "metrics.csv", "snapshots/epoch_*.pt", "events.out.tfevents.*"):
                for path in self.folder.glob(pattern):
                    path.unlink()
        parameters = sum(weights.numel() for weights in parts["model"].parameters())
        parameters -= getattr(parts["model"], "frozen_weights", 0)  # which stay zero
        self.conditions.parameters = parameters
        self.write_records()
        # TensorBoard's readers hide what a killed process wrote after the checkpoint.
        self.writer = SummaryWriter(str(self.folder), purge_step=self.epoch + 1 if self.epoch else None)
        shown = {name: vars(self.conditions)[name] for name in ("data_source", "device", "precision", "threads")}
        for spec, value in self.config.items():
            shown[spec.name] = spec.none_label if value is None else value
        self.writer.file_writer.add_summary(hparams(shown, {})[1])
        continuing = f", continuing after epoch {self.epoch}" if self.epoch else ""
        print_once(f"{self.folder}: {parameters:,} parameters, {self.device}, {self.precision}{continuing}")

    def epochs(self):
        """Yield the numbers of the epochs that are left to train."""
        print_once("  epoch  train loss  train accuracy  test accuracy  seconds  time left")
        yield from range(self.epoch + 1, self.conditions.epochs + 1)

    def batches(self, split, epoch):
        """Yield the batches of a Split, (images, labels). All random numbers follow from the seed and the epoch."""
        self._start = time.perf_counter()
        torch.manual_seed(1000 * self.config.seed + epoch)
        batches = torch.randperm(len(split.images)).to(self.device).split(self.config.batch_size)
        has_bar = world().size == 1 and sys.stderr is not None and sys.stderr.isatty()
        for batch in tqdm(batches, f"epoch {epoch}", unit="batch", leave=False, disable=not has_bar):
            yield split.images[batch], split.labels[batch]
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()
        self._seconds = time.perf_counter() - self._start

    def save_snapshot(self, epoch, tensors):
        """Write snapshots/epoch_NN.pt, a dict of tensors by parameter name."""
        (self.folder / "snapshots").mkdir(exist_ok=True)
        save_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt", tensors)

    def finish(self, epoch, train, test):
        """Record a finished epoch, whose Scores are train and test: TensorBoard's points first, then the checkpoint."""
        values = (epoch, train.loss, train.accuracy, test.loss, test.accuracy, self._seconds)
        self.history.append(dict(zip(METRIC_COLUMNS, values, strict=True)))
        for split, score in (("Train", train), ("Test", test)):
            self.writer.add_scalar(f"Loss/{split}", score.loss, epoch)
            self.writer.add_scalar(f"Accuracy/{split}", score.accuracy, epoch)
        self.writer.flush()
        state = {name: part.state_dict() for name, part in self._parts.items()}
        save_tensors(self.folder / "checkpoint.pt", {"record": self._record(), "history": self.history, "state": state})
        self.write_records()
        progress = f"{epoch}/{self.conditions.epochs}"
        scores = f"{train.loss:10.4f}  {train.accuracy:12.2f} %  {test.accuracy:11.2f} %"
        time_left = tqdm.format_interval((time.perf_counter() - self._start) * (self.conditions.epochs - epoch))
        print_once(f"{progress:>7}  {scores}  {self._seconds:7.1f}  {time_left:>9}")

    def write_records(self):
        """Write config.json and metrics.csv, which follow from the checkpoint."""
        record = json.dumps(self._record(), indent=2) + "\n"
        metrics = format_csv(METRIC_COLUMNS, [row.values() for row in self.history])
        write_atomically(self.folder / "config.json", record.encode())
        write_atomically(self.folder / "metrics.csv", metrics.encode())

    def close(self):
        """Close TensorBoard's file and drop the network, because train_runs keeps every Run."""
        if self.writer:
            self.writer.close()
        self._parts = self.writer = None

    def _record(self):
        return {"script": self.config.script, "settings": asdict(self.config), "conditions": vars(self.conditions)}


def load_state(path, states, parts):
    """Load states into parts, both by name; raises InputError, which names path, if they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (RuntimeError, LookupError, ValueError):
        raise unusable(path) from None


# Loss and accuracy ---------------------------------------------------------------------------------------------------

Score = namedtuple("Score", "loss accuracy")  # the mean cross-entropy per image, in nats; in percent


class Metrics:
    """Running loss and accuracy of an epoch, without synchronising the device."""

    def __init__(self):
        self._losses = []
        self._correct = []
        self._images = 0

    def update(self, loss, logits, labels):
        """Add a batch: its mean loss, its logits (N, classes) and its labels (N,)."""
        self._losses.append(loss.detach() * len(labels))
        self._correct.append((logits.argmax(1) == labels).sum())
        self._images += len(labels)

    def compute(self):
        """Return the Score of all images; raises TrainingError if the loss is not finite."""
        return make_score(torch.stack(self._losses), torch.stack(self._correct), self._images)


@torch.inference_mode()
def predict(model, images, batch_size=1000):
    """Return the logits, float32 (N, classes), of images, uint8 (N, H, W)."""
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def evaluate(model, split):
    """Return the Score of a model on a Split; raises TrainingError if the loss is not finite."""
    logits = predict(model, split.images)
    losses = F.cross_entropy(logits, split.labels, reduction="none")
    return make_score(losses, logits.argmax(1) == split.labels, len(split.labels))


def make_score(losses, correct, images):
    """Return a Score from tensors of losses and correct answers; raises TrainingError if the loss is not finite."""
    loss = losses.cpu().double().sum().item() / images
    if not math.isfinite(loss):
        raise TrainingError(f"the loss became {loss}")
    return Score(loss, 100 * correct.cpu().double().sum().item() / images)


def make_optimizer(model, config):
    """Return the optimizer that an experiment's settings name, for a model's parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=next(model.parameters()).device.type != "mps")


# Tables of results, with the accuracies of the reference report ------------------------------------------------------

REPORT_EPOCHS = 10  # the reference report gives accuracies after its last epoch
RESULT_COLUMNS = ("experiment", "reported", "mean", "range", "std", "seeds", "parameters", "remark")
# accuracy: test accuracy in percent, or None; remark: why it is missing or not comparable.
ReportedResult = namedtuple("ReportedResult", "config accuracy remark", defaults=("",))


def group_by_setting(runs):
    """Return lists of the runs that differ only in their seeds, in the given order."""
    groups = {}
    for run in runs:
        groups.setdefault((replace(run.config, seed=0), run.conditions.data_source), []).append(run)
    return list(groups.values())


def result_row(runs, epoch, report):
    """Return a row of the table of results, a tuple of str, for runs that differ only in their seeds."""
    config = runs[0].config
    conditions = runs[0].conditions
    reported = ReportedResult(config, None)
    if conditions.data_source == "real" and epoch == REPORT_EPOCHS:
        reported = {result.config: result for result in report}.get(replace(config, seed=0), reported)
    accuracies = [run.history[epoch - 1]["test_accuracy"] for run in runs]
    spread = ["", ""]
    if len(runs) > 1:
        spread = [f"{min(accuracies):.2f} to {max(accuracies):.2f}", f"{np.std(accuracies, ddof=1):.2f}"]
    return (
        config.caption + (", synthetic data" if conditions.data_source == "synthetic" else ""),
        "" if reported.accuracy is None else f"{reported.accuracy:.2f}",
        f"{np.mean(accuracies):.2f}",
        *spread,
        str(len(runs)),
        str(conditions.parameters),
        reported.remark,
    )


def markdown_table(columns, rows):
    """Return an aligned Markdown table of texts, without empty columns."""
    padded = []
    for column in zip(columns, *rows, strict=True):
        if any(column[1:]):
            width = max(map(len, column))
            padded.append([column[0].ljust(width), "-" * width, *(cell.ljust(width) for cell in column[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*padded, strict=True))


# Training many runs --------------------------------------------------------------------------------------------------

World = namedtuple("World", "rank size")  # the number of this process, from 0, and the number of processes


def world():
    """Return the World of the processes that torchrun started, which share a list of runs; without it World(0, 1)."""
    rank = os.environ.get("RANK") or "0"
    size = os.environ.get("WORLD_SIZE") or "1"
    if not rank.isdecimal() or not size.isdecimal():
        raise InputError(f"RANK={rank} and WORLD_SIZE={size} must be numbers; unset these environment variables")
    return World(int(rank), int(size)) if int(size) > 1 else World(0, 1)


def print_once(line, stream=None):
    """Print a line in the first process only."""
    if world().rank == 0:
        print_line(line, stream)


def available_threads():
    """Return the number of threads for this process: OMP_NUM_THREADS, or the cores that it may use."""
    threads = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS"):  # which torchrun sets to 1 unless the user has set it
        with suppress(OSError, ValueError):
            quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # the limit of a container
            threads = min(threads, math.ceil(quota / period))
    return threads


def has_native_bf16(device):
    """Return whether the hardware multiplies bfloat16 matrices natively."""
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases lack this function
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def new_conditions(config, args, data_source):
    """Return the conditions of a new run, a namespace; see Run."""
    device = args.device
    if device == "auto":
        device = next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in config.precisions and has_native_bf16(device) else "fp32"
    threads = min(args.threads, config.max_threads or args.threads)
    conditions = {"data_source": data_source, "device": device, "precision": precision, "epochs": args.epochs}
    return SimpleNamespace(**conditions, threads=threads, versions={"torch": str(torch.__version__)})


def train_run(config, train, args, wait=True):
    """Train an experiment up to --epochs; return its Run. Without wait, raises Timeout if another process trains it."""
    data = load_data(config.dataset, args.data, args.data_dir, config.pixels)
    prefix = "synthetic_" if data.source == "synthetic" else ""
    folder = args.runs_dir / config.script / f"{prefix}{config.name}"
    lock = nullcontext()  # a complete run needs none
    if args.fresh or recorded_epochs(folder) < args.epochs:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    with lock:
        run = Run(folder, config, args, data.source)
        if run.epoch >= run.conditions.epochs:
            if not (folder / "config.json").exists() or recorded_epochs(folder) != run.epoch:
                run.write_records()
            print_once(f"{folder}: complete after epoch {run.epoch}; a larger --epochs extends it, --fresh starts over")
            return run
        if isinstance(lock, nullcontext):
            raise InputError(f"{folder / 'metrics.csv'} has more epochs than checkpoint.pt; delete it to continue")
        torch.set_num_threads(run.conditions.threads)
        torch.manual_seed(config.seed)
        try:
            train(config, run, data.to(run.device))
        except TrainingError as error:
            place = f"in epoch {run.epoch + 1} at learning rate {format_number(config.lr)}"
            raise TrainingError(f"{folder}: {error} {place}; finished epochs are kept; try a smaller --lr") from None
        finally:
            run.close()
    return run


def train_runs(configs, train, args):
    """Train experiments; those that other processes train are waited for last. Return the Runs and failed statuses."""
    runs = {}
    failures = {}
    for wait in (False, True):
        for config in [config for config in configs if config not in runs and config not in failures]:
            try:
                runs[config] = train_run(config, train, args, wait)
            except Timeout:
                print_once(f"{config.name}: another process trains it, so it is left for last")
                continue
            except FAILURES as error:
                failures[config], message = describe_error(error)
                if (len(configs) == 1 and world().rank == 0) or getattr(error, "errno", None) in DISK_FULL_ERRORS:
                    raise
                print_once(message, sys.stderr)  # each process meets each failure, because none is recorded
            if len(configs) > 1:
                print_once(f"{len(runs) + len(failures)} of {len(configs)} runs done")
    return [runs[config] for config in configs if config in runs], list(failures.values())


# Command line --------------------------------------------------------------------------------------------------------


def shell_command(*words):
    """Return words as a quoted command line; this project's scripts get the folder of the running one."""
    folder = Path(sys.argv[0]).parent
    if not (folder / "utils.py").exists():  # called as a module, or from another program
        folder = Path(__file__).parent
    words = [str(folder / word if str(word).endswith(".py") else word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def parse_folder(text):
    """Return the Path of a folder on the command line, which may begin with ~; an empty text is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are InputErrors."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False, usage=argparse.SUPPRESS)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_experiments(config_class, report, description):
    """Return the parsed command line of a training script, and the requested Configs without duplicates."""
    parser = Parser(description)
    flag = parser.add_argument
    for spec in config_class.specs():
        metavar = f"{{{','.join(spec.choices)}}}" if spec.choices else spec.type.__name__.upper()
        default = spec.none_label if spec.default is None else format_number(spec.default)
        flag(spec.flag, nargs="+", type=spec.type, metavar=metavar, help=f"{spec.help} (default: {default})")
    flag("--epochs", type=int, default=10, metavar="INT", help="total number of epochs (default: 10)")
    data_help = "real, synthetic (a small built-in set), or auto: real if possible (default: auto)"
    flag("--data", choices=("auto", "real", "synthetic"), default="auto", help=data_help)
    data_dir_help = "directory of the data sets; missing ones are downloaded there (default: data)"
    flag("--data-dir", type=parse_folder, default="data", help=data_dir_help)
    flag("--runs-dir", type=parse_folder, default="runs", help="directory of the runs' folders (default: runs)")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device (default: auto)")
    parser.set_defaults(precision="auto")
    if len(config_class.precisions) > 1:
        precision_help = f"auto: {config_class.precisions[0]} if the hardware supports it (default: auto)"
        flag("--precision", choices=("auto", *config_class.precisions), default="auto", help=precision_help)
    flag("--report", action="store_true", help="run the experiments of the reference report, for each --seed")
    flag("--fresh", action="store_true", help="start over instead of continuing")
    args = parser.parse_args()
    values = {}
    for spec in config_class.specs():
        values[spec.name] = getattr(args, spec.name) or [spec.default]
        if args.report and getattr(args, spec.name) and spec.name != "seed":
            parser.error(f"--report cannot be combined with {spec.flag}")
    if world().size > 1 and args.fresh:
        parser.error("--fresh cannot be combined with several processes; delete the run folders instead")
    SettingSpec("epochs", 10, minimum=1, maximum=999).check(args.epochs)
    if args.report:
        configs = [replace(reported.config, seed=seed) for seed in values["seed"] for reported in report]
    else:
        grid = itertools.product(*values.values())
        configs = [config_class(**dict(zip(values, combination, strict=True))) for combination in grid]
    return args, list(dict.fromkeys(configs))


@exit_with_status()
def main(config_class, train, report, description):
    """Train what the command line asks for, then print the results and the commands to type next.

    train(config, run, data): trains one experiment; report: the ReportedResults; description: the text of --help.
    """
    args, configs = parse_experiments(config_class, report, description)
    args.threads = available_threads()
    runs, failures = train_runs(configs, train, args)
    if world().rank > 0:
        return  # if this process failed, torchrun would end all of them
    if runs:
        epoch = min(args.epochs, REPORT_EPOCHS) if args.report else args.epochs
        print_line(f"\nTest accuracy in % after epoch {epoch}")
        rows = [result_row(group, epoch, report) for group in group_by_setting(runs)]
        print_line(markdown_table(RESULT_COLUMNS, rows))
        if any(run.conditions.data_source == "synthetic" for run in runs):
            print_line(SYNTHETIC_NOTICE)
        folder = runs[0].folder
        siblings = {path.parent for path in folder.parent.glob("*/events.out.tfevents.*")}
        logdir = folder.parent if len(siblings) <= 40 else folder  # TensorBoard selects none of more than 40 runs
        print_line(f"\nNext:\n  {shell_command('tensorboard', '--logdir', logdir)}")
        print_line(f"  {shell_command('python', 'visualize.py', args.runs_dir if len(configs) > 1 else folder)}")
    if failures:
        message = f"{len(failures)} of {len(configs)} runs could not be trained, for the reasons given above"
        raise TrainingError(message) if 1 in failures else InputError(message)
