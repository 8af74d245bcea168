"""Code that both training scripts share.

In this order: errors, data sets, settings, the run's folder, loss and accuracy, tables of results, training many runs,
and the command line. Each training script calls main(), the last function.

A setting is one value of the command line, such as the learning rate; a Config holds all settings of an experiment. A
run is an experiment with its folder. Runs that differ only in their seeds form a group.
"""

import argparse
import csv
import difflib
import errno
import hashlib
import io
import itertools
import json
import logging
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
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import version
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


try:
    script = Path(sys.argv[0]).resolve()
    is_first = os.environ.get("RANK") in (None, "", "0")
    if is_first and script.is_file() and script.parent == Path(__file__).resolve().parent:
        print_line("loading torch ...")  # which takes seconds
    import numpy as np
    import torch
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
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
        if error.errno in DISK_FULL_ERRORS:
            status = 1
            message += "; free some space and run the same command again"
        message = f"{path}: {message}" if path else message
    return status, f"error: {message}"


def run_main(main, *arguments, on_interrupt="finished epochs are kept; the same command, without --fresh, continues"):
    """Call main and exit: with status 0, after Ctrl-C with 130, or with one line about an expected error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's stream, or one that the caller has closed
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    thread_hook = threading.excepthook
    log_level = logging.root.manager.disable

    def report_bug(failure):
        if not isinstance(failure.exc_value, OSError):  # TensorBoard's thread hands these to the main thread, too
            thread_hook(failure)

    threading.excepthook = report_bug
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            main(*arguments)
        status, message = 0, ""
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {on_interrupt}"
    except FAILURES as error:
        status, message = describe_error(error)
    finally:
        threading.excepthook = thread_hook
        logging.disable(log_level)
    if message:
        print_line(f"{Path(sys.argv[0]).name}: {message}", sys.stderr)
    sys.exit(status)


# Data sets -----------------------------------------------------------------------------------------------------------

DOWNLOAD_TIMEOUT = 20  # seconds without an answer from the server
Split = namedtuple("Split", "images labels")  # gray images, uint8 (N, H, W), and their labels, int64 (N,)


class Dataset(NamedTuple):
    """The two splits of a data set and the names of its classes; source is 'real' or 'synthetic'."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    def to(self, device):
        """Return the data set with its tensors on a device."""
        splits = [Split(images.to(device), labels.to(device)) for images, labels in (self.train, self.test)]
        return self._replace(train=splits[0], test=splits[1])


class DatasetSpec(NamedTuple):
    """A data set of torchvision."""

    label: str  # its name in captions
    torchvision_class: str
    folder: str  # where torchvision expects the files
    files: tuple[str, ...]
    md5: str  # of the images and labels of both splits
    classes: tuple[str, ...]
    size: int  # height and width in pixels
    mean: float = 0.0  # of the pixels in [0, 1]
    std: float = 1.0


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
        mean=0.1307,
        std=0.3081,
    ),
}


@cache
def load_data(name, mode, data_dir, pixels="in-place", may_download=True):
    """Return a Dataset by its name in DATASETS; raises InputError if its files are damaged or not available.

    mode: 'real', 'synthetic', or 'auto', which is real if possible; pixels: 'permuted' permutes them (Le et al., 2015).
    """
    spec = DATASETS[name]
    splits = None
    if mode != "synthetic":
        try:
            splits = read_real_splits(spec, data_dir, may_download)
        except ConnectionError as error:
            if mode == "real":
                raise InputError(f"{error}; copy it there, or use another --data-dir or --data synthetic") from None
            print_once(f"{error}.")
    source, classes = ("real", spec.classes) if splits else ("synthetic", SYNTHETIC_CLASSES)
    if source == "synthetic":
        print_once(synthetic_notice(name))
        splits = synthetic_splits(spec.size)
    if pixels == "permuted":
        order = torch.randperm(spec.size**2, generator=torch.Generator().manual_seed(0))
        splits = [Split(images.flatten(1)[:, order].view_as(images), labels) for images, labels in splits]
    return Dataset(name, source, classes, *splits)


def missing_files(spec, data_dir):
    """Return the paths of a data set's files that are missing, where torchvision expects them."""
    paths = [data_dir / spec.folder / file for file in spec.files]
    return [path for path in paths if not path.exists()]


def read_real_splits(spec, data_dir, may_download):
    """Return the training and the test Split of a data set, in gray; missing files are downloaded if may_download.

    Raises InputError if files are damaged or may not be downloaded, ConnectionError if a download fails.
    """
    from torchvision import datasets

    torchvision_class = getattr(datasets, spec.torchvision_class)
    if missing := missing_files(spec, data_dir):
        if not may_download:
            advice = "a training script downloads it, or name the directory with --data-dir"
            raise InputError(f"{missing[0]} is missing; {advice}")
        download(torchvision_class, spec, data_dir)
    try:
        splits = []
        for train in (True, False):
            dataset = torchvision_class(data_dir, train=train)
            images = np.asarray(dataset.data)
            if images.ndim == 4:  # in colour; in parts to save memory
                images = np.concatenate([rgb_to_gray(part) for part in np.array_split(images, 10)])
            splits.append(Split(torch.from_numpy(images), torch.as_tensor(dataset.targets)))
        content = b"".join(tensor.numpy() for tensor in itertools.chain(*splits))
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != spec.md5:
            raise ValueError("the MD5 sum of its images and labels is another")
        return splits
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torchvision raises whatever a damaged file leads to
        reason = f"{data_dir / Path(spec.folder).parts[0]} does not hold the official {spec.label} ({error})"
        raise InputError(f"{reason}; move it away to download the set again") from None


def download(torchvision_class, spec, data_dir):
    """Download a data set, in one process at a time. Raises ConnectionError if that fails."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"):
            if missing_files(spec, data_dir):  # otherwise another process has just downloaded them
                print_once(f"downloading {spec.label} to {data_dir} ...")
                try:
                    torchvision_class(data_dir, download=True)
                finally:
                    with suppress(OSError):  # of folders that are not empty
                        os.removedirs(data_dir / spec.folder)
    except Exception as error:  # torchvision raises whatever a wrong archive leads to
        number = getattr(error, "errno", None)
        if number in DISK_FULL_ERRORS or (number and error.filename):  # an error of the disk, not of the network
            raise
        path = missing_files(spec, data_dir)[0]
        reason = f"cannot be downloaded ({' '.join(str(error).split())})"
        raise ConnectionError(f"{spec.label}: {path} is missing and {reason}") from None
    finally:
        socket.setdefaulttimeout(timeout)


def rgb_to_gray(images):
    """Turn RGB images, uint8 (N, H, W, 3), into gray ones, uint8 (N, H, W), bit-equal to PIL's (ITU-R 601-2)."""
    weights = np.array([19595, 38470, 7471], dtype=np.float32)  # in units of 1/65536; float32 holds their sums exactly
    return ((images.astype(np.float32) @ weights + 32768) / 65536).astype(np.uint8)


SYNTHETIC_SIZES = [4_000, 1_000]  # images of the training and of the test split
SYNTHETIC_CLASSES = tuple(f"pattern {number}" for number in range(10))


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


def synthetic_notice(name):
    """Return the warning that is printed with results on synthetic data."""
    label = DATASETS[name].label
    return f"NOTE: this is a small synthetic data set, NOT {label}; do not compare its accuracies with published ones."


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
            choices = ", ".join(self.choices)
            raise InputError(f"{self.flag} must be one of {choices}, not {value}{did_you_mean(value, self.choices)}")
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


def did_you_mean(word, known):
    """Return a hint that names the known word that is closest to a mistyped one; '' if none is close."""
    close = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


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

    @property
    def without_seed(self):
        """The settings that runs with different seeds share: this Config with seed 0."""
        return replace(self, seed=0)

    def captions(self):
        """Return the captions of the network and of the settings that are shown, by name, without empty ones."""
        captions = {"network": self.network} | {spec.name: spec.label(value) for spec, value in self.shown_items()}
        return {name: caption for name, caption in captions.items() if caption}

    @property
    def caption(self):
        """The experiment in words, without its seed."""
        return ", ".join(caption for name, caption in self.captions().items() if name != "seed")

    def command(self, *arguments):
        """Return the command line that trains this experiment, followed by further arguments."""
        flags = [f"{spec.flag}={format_number(value)}" for spec, value in self.items() if value != spec.default]
        return shell_command("python", f"{self.script}.py", *flags, *arguments)


def restore_config(config_class, recorded):
    """Return the Config with the settings that a run recorded, a dict; those that it lacks have their defaults."""
    changed = {name: value for name, value in recorded.items() if value != getattr(config_class, name, None)}
    try:
        return config_class(**changed)
    except TypeError as error:  # a setting that this version of the project lacks
        raise InputError(str(error)) from None


def read_config(folder, configs):
    """Return a run's Config and conditions, a namespace, from config.json; configs: the Config classes by script."""
    path = folder / "config.json"
    try:
        record = json.loads(path.read_bytes())
        config = restore_config(configs[record["script"]], record["settings"])
        return config, SimpleNamespace(**record["conditions"])
    except (InputError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} does not fit this version of the project ({str(error)[:100]})") from None


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


def load_tensors(path, keys=frozenset(), with_tensors=True):
    """Return the dict that save_tensors wrote, on the CPU; raises InputError if it is damaged or lacks one of the keys.

    It may come from others: no code in it is run. Without with_tensors, tensors are neither read nor checked: fast.
    """
    if not path.exists():
        raise InputError(f"{path} is missing")
    try:
        source = io.BytesIO(path.read_bytes()) if with_tensors else path  # what is checked is what is loaded
        with zipfile.ZipFile(source) as archive:  # torch.load checks neither checksums nor sizes
            for entry in archive.infolist():
                if entry.file_size != entry.compress_size or entry.external_attr != 0:
                    raise zipfile.BadZipFile
                if with_tensors or entry.filename.endswith("data.pkl"):
                    archive.read(entry)  # raises if the checksum is wrong
        if with_tensors:
            source.seek(0)
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=not with_tensors)
        if loaded.keys() >= keys:
            return loaded
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, OSError | MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error):
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


def read_csv(path):
    """Return the rows of a CSV file, list of dict of str; none where there is no such file."""
    with suppress(FileNotFoundError, csv.Error), open(path, newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))
    return []


def read_checkpoint(folder, with_tensors=True):
    """Return a run's checkpoint, a dict of record, history and state; None where there is none."""
    path = folder / "checkpoint.pt"
    return load_tensors(path, {"record", "history", "state"}, with_tensors) if path.exists() else None


def read_history(folder):
    """Return the metrics of each finished epoch, list of dict: from the checkpoint or, without one, metrics.csv."""
    if checkpoint := read_checkpoint(folder, with_tensors=False):
        return checkpoint["history"]
    try:
        history = []
        for row in read_csv(folder / "metrics.csv"):
            history.append({name: float(row[name]) for name in METRIC_COLUMNS})
        return history
    except (LookupError, ValueError, TypeError):
        raise InputError(f"{folder / 'metrics.csv'} is damaged") from None


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
        checkpoint = None if args.fresh else read_checkpoint(folder, with_tensors=False)
        if checkpoint:
            self.history = checkpoint["history"]
            self.conditions = SimpleNamespace(**checkpoint["record"]["conditions"])
            self._check_record(checkpoint["record"], args)
            self.conditions.epochs = max(args.epochs, self.epoch)
        elif args.fresh or not read_csv(folder / "metrics.csv"):
            self.conditions = new_conditions(config, args, data_source)
        else:
            raise InputError(f"{folder} holds metrics.csv but no checkpoint.pt to continue from; {START_OVER}")
        self.device = self.conditions.device
        self.precision = self.conditions.precision
        is_complete = self.epoch >= self.conditions.epochs
        if self.device != "cpu" and not is_complete and not getattr(torch, self.device).is_available():
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
        weights = sum(weights.numel() for weights in parts["model"].parameters())
        self.conditions.parameters = weights - getattr(parts["model"], "frozen_weights", 0)  # which stay zero
        self.write_records()
        # TensorBoard's readers hide what a killed process wrote after the checkpoint.
        self.writer = SummaryWriter(str(self.folder), purge_step=self.epoch + 1 if self.epoch else None)
        shown = {name: vars(self.conditions)[name] for name in ("data_source", "device", "precision", "threads")}
        for spec, value in self.config.items():
            shown[spec.name] = spec.none_label if value is None else value
        self.writer.file_writer.add_summary(hparams(shown, {})[1])
        continuing = f", continuing after epoch {self.epoch}" if self.epoch else ""
        parameters = f"{self.conditions.parameters:,} parameters"
        print_once(f"{self.folder}: {parameters}, {self.device}, {self.precision}{continuing}")

    def epochs(self):
        """Yield the numbers of the epochs that are left to train."""
        print_once("  epoch  train loss  train accuracy  test accuracy  seconds")
        yield from range(self.epoch + 1, self.conditions.epochs + 1)

    def batches(self, split, epoch):
        """Yield the batches of a Split, (images, labels). All random numbers follow from the seed and the epoch."""
        start = time.perf_counter()
        torch.manual_seed(1000 * self.config.seed + epoch)
        batches = torch.randperm(len(split.images)).to(self.device).split(self.config.batch_size)
        has_bar = world().size == 1 and sys.stderr is not None and sys.stderr.isatty()
        for batch in tqdm(batches, f"epoch {epoch}", unit="batch", leave=False, disable=not has_bar):
            yield split.images[batch], split.labels[batch]
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()
        self._seconds = time.perf_counter() - start

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
        checkpoint = {"record": self._record(), "history": self.history, "state": state}
        save_tensors(self.folder / "checkpoint.pt", checkpoint)
        self.write_records()
        progress = f"{epoch}/{self.conditions.epochs}"
        scores = f"{train.loss:10.4f}  {train.accuracy:12.2f} %  {test.accuracy:11.2f} %"
        print_once(f"{progress:>7}  {scores}  {self._seconds:7.1f}")

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
    is_fused = next(model.parameters()).device.type != "mps"
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=is_fused)


# Tables of results, with the accuracies of the reference report ------------------------------------------------------

REPORT_EPOCHS = 10  # the reference report gives accuracies after its last epoch
RESULT_COLUMNS = ("experiment", "reported", "mean", "range", "std", "seeds", "parameters", "remark")
# accuracy: test accuracy in percent, or None; remark: why it is missing or not comparable.
ReportedResult = namedtuple("ReportedResult", "config accuracy remark", defaults=("",))


def find_reported(run, epoch, report):
    """Return the ReportedResult of a run's settings; its accuracy is None if there is none to compare with."""
    config = run.config.without_seed
    if run.conditions.data_source == "real" and epoch == REPORT_EPOCHS:
        for reported in report:
            if reported.config == config:
                return reported
    return ReportedResult(config, None)


def group_by_setting(runs):
    """Return lists of the runs that differ only in their seeds, in the given order."""
    groups = {}
    for run in runs:
        groups.setdefault((run.config.without_seed, run.conditions.data_source), []).append(run)
    return list(groups.values())


def result_row(runs, epoch, report):
    """Return the cells of RESULT_COLUMNS, texts, for runs that differ only in their seeds."""
    config = runs[0].config
    conditions = runs[0].conditions
    reported = find_reported(runs[0], epoch, report)
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
    conditions = SimpleNamespace(data_source=data_source, device=device, precision=precision, epochs=args.epochs)
    conditions.threads = min(args.threads, config.max_threads or args.threads)
    conditions.versions = {name: version(name) for name in ("torch", "torchvision")}
    conditions.versions["python"] = sys.version.split()[0]
    return conditions


def train_run(config, train, args, wait=True):
    """Train an experiment up to --epochs; return its Run. Without wait, raises Timeout if another process trains it."""
    data = load_data(config.dataset, args.data, args.data_dir, config.pixels)
    prefix = "synthetic_" if data.source == "synthetic" else ""
    folder = args.runs_dir / config.script / f"{prefix}{config.name}"
    lock = nullcontext()
    if args.fresh or len(read_csv(folder / "metrics.csv")) < args.epochs:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    with lock:
        run = Run(folder, config, args, data.source)
        if run.epoch >= run.conditions.epochs:
            is_recorded = (folder / "config.json").exists() and len(read_csv(folder / "metrics.csv")) == run.epoch
            if not is_recorded:  # it was killed before it could write them, or they were deleted
                run.write_records()
            print_once(f"{folder}: complete after epoch {run.epoch}; a larger --epochs extends it, --fresh starts over")
            return run
        torch.set_num_threads(run.conditions.threads)
        torch.manual_seed(config.seed)
        try:
            train(config, run, data.to(run.device))
        except TrainingError as error:
            place = f"in epoch {run.epoch + 1} at learning rate {format_number(config.lr)}"
            raise TrainingError(f"{folder}: {error} {place}; finished epochs are kept; try a smaller --lr") from None
        finally:
            run.close()
    if world().size > 1:
        print_line(f"{folder}: {run.history[-1]['test_accuracy']:.2f} % after epoch {run.epoch}")
    return run


def train_runs(configs, train, args):
    """Train experiments, last those that other processes train; return the Runs and the exit statuses of failures."""
    runs = {}
    failures = {}
    start = time.monotonic()
    is_only_run = len(configs) == 1 and world().rank == 0
    for wait in (False, True):
        for config in [config for config in configs if config not in runs and config not in failures]:
            try:
                runs[config] = train_run(config, train, args, wait)
            except Timeout:
                continue
            except FAILURES as error:
                failures[config], message = describe_error(error)
                if is_only_run or getattr(error, "errno", None) in DISK_FULL_ERRORS:
                    raise
                print_once(message, sys.stderr)  # each process meets each failure, because none is recorded
            if len(configs) > 1:
                minutes = (time.monotonic() - start) / 60
                print_once(f"{len(runs) + len(failures)} of {len(configs)} runs, {minutes:.0f} min")
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

    def parse_args(self):
        args, unknown = self.parse_known_args()
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {flag}{did_you_mean(flag, self._option_string_actions)}")
        return args


def experiment_parser(config_class, description):
    """Return the parser of a training script: one flag per setting, and the flags that are no settings."""
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
    return parser


def parse_experiments(config_class, report, parser):
    """Return the parsed command line of a training script, and the requested Configs without duplicates."""
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


def run_experiments(config_class, train, report, description):
    """Train what the command line asks for, then print the results and the commands to type next; see main."""
    args, configs = parse_experiments(config_class, report, experiment_parser(config_class, description))
    args.threads = available_threads()
    runs, failures = train_runs(configs, train, args)
    if world().rank > 0:
        return  # if this process failed, torchrun would end all of them
    if runs:
        epoch = min(args.epochs, REPORT_EPOCHS) if args.report else args.epochs
        print_line(f"\nTest accuracy in % after epoch {epoch}")
        rows = [result_row(group, epoch, report) for group in group_by_setting(runs)]
        print_line(markdown_table(RESULT_COLUMNS, rows))
        for name in {run.config.dataset for run in runs if run.conditions.data_source == "synthetic"}:
            print_line(synthetic_notice(name))
        folder = runs[0].folder
        siblings = {path.parent for path in folder.parent.glob("*/events.out.tfevents.*")}
        logdir = folder.parent if len(siblings) <= 40 else folder  # TensorBoard selects none of more than 40 runs
        print_line(f"\nNext:\n  {shell_command('tensorboard', '--logdir', logdir)}")
        print_line(f"  {shell_command('python', 'visualize.py', args.runs_dir if len(configs) > 1 else folder)}")
    if failures:
        message = f"{len(failures)} of {len(configs)} runs could not be trained, for the reasons given above"
        raise TrainingError(message) if 1 in failures else InputError(message)


def main(config_class, train, report, description):
    """Run a training script: its Config, its train(config, run, data), its ReportedResults and its text for --help."""
    run_main(run_experiments, config_class, train, report, description)
