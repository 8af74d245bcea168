"""What the training scripts share.

Errors, data, settings, the run's folder, measuring, results, many experiments, command line; begin at main(), the end.
"""

import argparse
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if None in (sys.stdout, sys.stderr):  # else the next files that are opened would take their numbers
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
if Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}  # what a user set is meant for other pictures
    warnings.simplefilter("ignore")
    hook = sys.excepthook  # for Ctrl-C while torch is loaded
    sys.excepthook = lambda e, *more: (
        print("interrupted", file=sys.stderr) if e is KeyboardInterrupt else hook(e, *more)
    )
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print("loading torch ...", flush=True)  # which takes seconds

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

# Errors and exit statuses --------------------------------------------------------------------------------------------

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what a file system without locks answers


class InputError(Exception):
    """The command line or an input is unusable: exit status 2."""


class TrainingError(Exception):
    """Training failed: exit status 1."""


FAILURES = (InputError, TrainingError, OSError, MemoryError, RuntimeError)


def explain(error):
    """Return the exit status that one of FAILURES earns, and its line; raises what no user can cause."""
    if isinstance(error, OSError):
        path, words = error.filename, error.strerror or str(error)
        if path and os.path.islink(path) and not os.path.exists(path):
            words = f"is a link to {os.readlink(path)}, which is not there"
        words += "; free some space and run the same command again" * (error.errno in DISK_FULL)
        words = f"error: {path}: {words}" if path else f"error: {words}"
        return 1 if error.errno in (*DISK_FULL, errno.EIO) else 2, words
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return 1, "error: too little memory; end other programs, or take a smaller network or --batch-size"
    if isinstance(error, RuntimeError):
        raise error
    return 1 if isinstance(error, TrainingError) else 2, " ".join(["error:", *str(error).splitlines()])


def tell(line, stream=None):
    """Print a line on standard output or another stream; where nobody can read it any more, the work goes on."""
    try:
        print(f"{line}\n", end="", file=stream, flush=True)  # in one piece: processes of torchrun share a stream
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def run_script(main, kept="what this command finished is kept, and without --fresh it continues"):
    """Call main(); leave with the exit status it earned, an error told in one line; kept: what Ctrl-C is answered."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")  # of names that its encoding cannot show
    logging.disable(logging.WARNING)
    try:
        main()
        sys.exit(0)
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {kept}"
    except FAILURES as error:
        status, message = explain(error)
    tell(f"{Path(sys.argv[0]).name}: {message}", sys.stderr)
    sys.exit(status)


# Data ---------------------------------------------------------------------------------------------------------------

SERVER_TIMEOUT = 20  # seconds until a server that does not answer is given up


class Split(NamedTuple):
    """Grayscale images, uint8 (N, H, W), with their labels, int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


class Dataset(NamedTuple):
    """A set's two splits and the names of its classes; source is 'real' or 'synthetic'."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    def to(self, device):
        train, test = (Split(*(tensor.to(device) for tensor in split)) for split in (self.train, self.test))
        return self._replace(train=train, test=test)


@cache
def load_data(name, mode, data_dir, pixels="in-place", may_download=True):
    """Return the Dataset called name, a key of DATASETS, its pixels permuted all alike if asked (Le et al., 2015).

    mode 'real' reads data_dir and downloads what is missing; 'synthetic' makes the embedded set; 'auto' is the real set
    where it can be had, else the embedded one. Raises InputError for damaged files and, but for 'auto', missing ones.
    """
    known, splits = DATASETS[name], None
    if mode != "synthetic":
        try:
            splits = known.read(obtain_files(known, data_dir, may_download))
        except ConnectionError as error:
            if mode == "real":
                raise InputError(f"{error}; copy it there, or use another --data-dir, or --data synthetic") from None
            say(f"{error}.")
    source, classes = ("real", known.classes) if splits else ("synthetic", EMBEDDED_CLASSES)
    if source == "synthetic":
        say(synthetic_notice(name))
        splits = embedded_patterns(known.size)
    if pixels == "permuted":
        order = torch.randperm(known.size**2, generator=torch.Generator().manual_seed(0))
        splits = [Split(images.flatten(1)[:, order].view_as(images), labels) for images, labels in splits]
    return Dataset(name, source, classes, *splits)


def synthetic_notice(name):
    """The sentence that keeps results on embedded data from being taken for real ones."""
    stand_in = f"the embedded stand-in for {DATASETS[name].words}, NOT the real set"
    return f"NOTE: synthetic data: {stand_in}; its accuracies are comparable with no published ones."


def read_files(known, data_dir):
    """Return the contents of a set's files, whose checksums fit, list of bytes; raises FileNotFoundError.

    What is not in its place is taken from elsewhere in data_dir, by a name with other dots or packed by gzip.
    """
    contents, plain = [], lambda path: path.name.replace(".", "-").removesuffix("-gz")
    for file, md5 in known.files.items():
        place = data_dir / known.folder / file
        nearby = [] if place.is_file() else itertools.islice(data_dir.rglob("*"), 10_000)
        for path in (place, *(path for path in nearby if plain(path) == plain(place))):
            with suppress(FileNotFoundError, IsADirectoryError, gzip.BadGzipFile, EOFError, zlib.error):
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                    contents.append(content)
                    break
        else:
            if place.is_file():
                raise InputError(f"{place} is damaged (its MD5 sum is not {md5}); delete it to have it downloaded")
            folder = next(each for each in place.absolute().parents if each.is_dir())
            found = ", ".join(sorted(os.listdir(folder))[:6]) or "nothing"
            raise FileNotFoundError(f"{known.words}: {place} is missing, {folder} holds {found}")
    return contents


def obtain_files(known, data_dir, may_download):
    """Return what read_files does, after a download by torchvision where need be; raises ConnectionError."""
    from torchvision import datasets

    try:
        return read_files(known, data_dir)
    except FileNotFoundError as error:
        missing = error
    if not may_download:
        raise InputError(f"{missing}; a training script downloads it, and --data-dir says where else it lies")
    dataset_class = getattr(datasets, known.torchvision)
    loader = dataset_class.__new__(dataset_class)  # its __init__ would load what an older version left there
    loader.root = str(data_dir)
    socket.setdefaulttimeout(SERVER_TIMEOUT)
    try:
        with locked(data_dir, name=".download.lock"):
            with suppress(FileNotFoundError):
                return read_files(known, data_dir)  # another process was first
            say(f"downloading {known.words} to {data_dir} ...")
            loader.download()
            return read_files(known, data_dir)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        number = getattr(error, "errno", None)
        if number in DISK_FULL or (number and error.filename):  # the disk's trouble
            raise
        raise ConnectionError(f"{missing}; it cannot be downloaded ({' '.join(str(error).split())})") from None


def rgb_to_gray(images):
    """Turn uint8 RGB (N, H, W, 3) into uint8 gray (N, H, W), bit-equal to PIL's ITU-R 601-2 conversion."""
    weights = np.array([19595, 38470, 7471], dtype=np.float32)  # of 65,536; float32 holds these sums exactly
    return ((images.astype(np.float32) @ weights + 32768) / 65536).astype(np.uint8)


def read_batches(contents):
    """Return the training and the test Split of CIFAR's files: pickled batches of RGB images, the last for testing."""
    splits = []
    for batch in (pickle.loads(content, encoding="latin1") for content in contents):
        images = rgb_to_gray(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        splits.append(Split(torch.from_numpy(images), torch.tensor(batch["labels"])))
    return Split(*map(torch.cat, zip(*splits[:-1], strict=True))), splits[-1]


def read_idx(contents):
    """Return the training and the test Split from MNIST's files: images behind 16 bytes, labels behind 8, of each."""
    numbers = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [Split(images[16:].view(-1, 28, 28), labels[8:].long()) for images, labels in pairs]


EMBEDDED_TRAIN, EMBEDDED_TEST = 4_000, 1_000  # images
EMBEDDED_CLASSES = tuple(f"pattern {number}" for number in range(10))


def embedded_patterns(size):
    """Return the training and the test Split of the embedded set: ten smooth patterns, moved, in noise."""
    rng, count = np.random.default_rng(0), EMBEDDED_TRAIN + EMBEDDED_TEST
    coarse = torch.from_numpy(rng.uniform(0, 255, (10, 1, 6, 6)))
    patterns = F.interpolate(coarse, (size, size), mode="bilinear")[:, 0].numpy()
    labels, (down, right) = rng.integers(10, size=count), rng.integers(-4, 5, (2, count, 1))
    rows, columns = ((np.arange(size) + shift) % size for shift in (down, right))
    images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    whole = Split(torch.from_numpy(images), torch.from_numpy(labels))
    return [Split(*(part[:EMBEDDED_TRAIN] for part in whole)), Split(*(part[EMBEDDED_TRAIN:] for part in whole))]


class KnownSet(NamedTuple):
    """A data set of torchvision's; files: their MD5; read: makes two Splits of them; mean, std: of values in [0, 1]."""

    words: str
    torchvision: str
    folder: str
    files: dict
    read: object
    classes: tuple
    size: int = 28
    mean: float = 0.0
    std: float = 1.0


DATASETS = {
    "cifar10": KnownSet(
        *("CIFAR-10", "CIFAR10", "cifar-10-batches-py"),
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        read_batches,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        size=32,
    ),
    "mnist": KnownSet(
        *("MNIST", "MNIST", "MNIST/raw"),
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        read_idx,
        tuple("0123456789"),
        mean=0.1307,
        std=0.3081,
    ),
}

# Settings: from one dataclass follow flags, help, checks, grid, names, words, HParams and config.json ----------------


def setting(default, **facts):
    """Return a dataclass field with a default and what else is known of it: the keywords are those of Setting."""
    return field(default=default, metadata=facts)


class Setting(NamedTuple):
    """What is known of a field of Config: what it may be, and how it is written in help, names and sentences."""

    name: str
    default: object
    help: str = ""
    choices: dict | tuple = ()  # a dict: the values and their words
    minimum: float = -math.inf
    maximum: float = math.inf
    always: bool = False  # in names and sentences at its default, too
    tag: str | None = None  # what stands before the value in a run's name; default: '_' and the setting's name
    words: str | None = None  # how a sentence says it, such as 'learning rate {}'; '': it does not
    unset: str = ""  # the words of None, the default of a number

    flag = property(lambda self: "--" + self.name.replace("_", "-"))
    type = property(lambda self: float if self.default is None else type(self.default))
    template = property(lambda self: self.name.replace("_", " ") + " {}" if self.words is None else self.words)

    def check(self, value):
        """Raises InputError for a value that the setting cannot have."""
        if self.choices and value not in self.choices:
            raise InputError(f"{self.flag} {value} is not one of {', '.join(self.choices)}")
        if self.type in (int, float) and value is not None and not self.minimum <= value <= self.maximum:
            raise InputError(f"{self.flag} {value} is not from {self.minimum} to {self.maximum}")

    def in_name(self, value):
        return ("_" + self.name.replace("_", "") if self.tag is None else self.tag) + number_text(value)

    def in_words(self, value):
        words = self.choices[value] if isinstance(self.choices, dict) else number_text(value)
        return self.template.format(self.unset if value is None else words)


def number_text(value):
    """Return the shortest text that stands for a value and no other: 1e-3, 0.02, 128."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1)


@dataclass(frozen=True)
class Config:
    """The settings that define an experiment; a script's own Config adds fields and defaults.

    It also says: script, its name; dataset, a key of DATASETS; network, in words; precisions; most_threads or None.
    """

    pixels: str = setting(
        "in-place",
        choices=("in-place", "permuted"),
        tag="_",
        words="pixels {}",
        help="permuted: in one random order, the same for all",
    )
    optimizer: str = setting(
        "adam", choices={"adam": "Adam", "sgd": "SGD"}, always=True, tag="_", words="{}", help="what takes the steps"
    )
    lr: float = setting(1e-3, minimum=1e-12, maximum=1e12, always=True, words="learning rate {}", help="learning rate")
    momentum: float = setting(0.0, minimum=0, maximum=1, help="momentum of SGD")
    batch_size: int = setting(64, minimum=1, maximum=60_000, tag="_batch", words="batch {}", help="images of a step")
    seed: int = setting(0, minimum=0, maximum=2**31 - 1, always=True, help="of initial weights and order of images")

    precisions, most_threads = ("fp32",), None

    def __post_init__(self):
        for one, value in self.settings():
            one.check(value)
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"--momentum {self.momentum} needs --optimizer sgd")

    @classmethod
    @cache
    def known_settings(cls):
        """Return the Setting of each field, the script's own before those that both scripts share."""
        shared = {one.name: one.metadata for one in fields(Config)}
        own_first = sorted(fields(cls), key=lambda one: one.name in shared)
        return [Setting(one.name, one.default, **{**shared.get(one.name, {}), **one.metadata}) for one in own_first]

    def settings(self):
        """Return the settings with their values: (Setting, value)."""
        return [(one, getattr(self, one.name)) for one in self.known_settings()]

    @property
    def name(self):
        """The name that tells this experiment from all others of its script; usual values are left out."""
        values = [(one, value) for one, value in self.settings() if one.always or value != one.default]
        return "".join(one.in_name(value) for one, value in values).strip("_")

    group = property(lambda self: replace(self, seed=0), doc="What the runs of several seeds have in common.")

    def words(self):
        """Return the experiment's words by setting, the network's first; usual values are left out."""
        said = {one.name: one.in_words(value) for one, value in self.settings() if one.always or value != one.default}
        return {name: words for name, words in {"network": self.network, **said}.items() if words}

    def sentence(self):
        """Return the experiment in words, but for its seed."""
        return ", ".join(words for name, words in self.words().items() if name != "seed")

    def command(self, *more):
        """Return the command line that trains the experiment; more: further words of it."""
        flags = [f"{one.flag}={number_text(value)}" for one, value in self.settings() if value != one.default]
        return typed("python", f"{self.script}.py", *flags, *more)


def read_config(folder, configs):
    """Return what a run's config.json says: its Config, and its conditions as a namespace; configs: by script."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
        return configs[values["script"]](**values["settings"]), SimpleNamespace(**values["conditions"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (InputError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not of this version of the project ({str(error)[:100]})") from None


# The run's folder: checkpoint, records, TensorBoard ------------------------------------------------------------------

METRICS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
TENSORBOARD_TAGS = {"/".join(reversed(name.split("_"))).title(): name for name in METRICS[1:5]}  # such as Loss/Train


def write_atomically(path, content):
    """Write bytes to path so that a reader, or a crash, sees either the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # which some leave out


def save_tensors(path, tensors):
    content = io.BytesIO()
    torch.save(tensors, content)
    write_atomically(path, content.getbuffer())


def load_tensors(path, keys=frozenset()):
    """Return the dict that save_tensors wrote, on the CPU, running no code in it; raises InputError for other files."""
    if not path.exists():
        raise InputError(f"{path} is missing; train the run again with --fresh")
    try:
        content = io.BytesIO(path.read_bytes())
        archive = zipfile.ZipFile(content)  # torch.load looks neither at its checksums nor whether its sizes agree
        sound = all((each.file_size, each.external_attr) == (each.compress_size, 0) for each in archive.infolist())
        if sound and archive.testzip() is None:
            content.seek(0)
            loaded = torch.load(content, map_location="cpu", weights_only=True)
            if loaded.keys() >= keys:
                return loaded
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, OSError | MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error):
            raise
    raise InputError(f"{path} is damaged or not of this project; train the run again with --fresh")


def table_text(columns, rows):
    """Return rows as CSV below the names of their columns."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    return table.getvalue()


def read_table(path):
    """Return the rows of a CSV file as a list of dict of texts, empty where there is none."""
    with suppress(FileNotFoundError, csv.Error), open(path, newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))
    return []


def read_checkpoint(folder):
    """Return a run's checkpoint, a dict of record, history, random and state; None where there is none."""
    path = folder / "checkpoint.pt"
    return load_tensors(path, {"record", "history", "random", "state"}) if path.exists() else None


def read_history(folder):
    """Return what each finished epoch measured, list of dict: by the checkpoint or, where none is kept, metrics.csv."""
    if checkpoint := read_checkpoint(folder):
        return checkpoint["history"]
    try:
        return [{name: float(row[name]) for name in METRICS} for row in read_table(folder / "metrics.csv")]
    except (LookupError, ValueError, TypeError):
        raise InputError(f"{folder / 'metrics.csv'} is damaged") from None


class Run:
    """The folder of a run while it is trained: its checkpoint, which alone counts, and what follows from it.

    conditions: what its numbers depend on beside its Config, a namespace; history: the rows of metrics.csv, list of
    dict; writer: TensorBoard's SummaryWriter, from resume() on. Raises InputError when it cannot go on as args ask.
    """

    def __init__(self, folder, config, args, data_source):
        self.folder, self.config, self.history, self.writer = folder, config, [], None
        self._say = tell if PROCESSES == 1 else lambda line: None  # of several only what each run reached is told
        self._checkpoint = None if args.fresh else read_checkpoint(folder)
        way_out = "start over with --fresh, or use another --runs-dir"
        if self._checkpoint:
            self.history = self._checkpoint["history"]
            self.conditions = SimpleNamespace(**self._checkpoint["record"]["conditions"])
            for name in ("device", "precision"):
                asked, begun = getattr(args, name), getattr(self.conditions, name)
                if asked not in ("auto", begun):
                    raise InputError(
                        f"{folder} was begun with --{name} {begun}, not {asked}; leave it out, or {way_out}"
                    )
            self.conditions.epochs = max(args.epochs, self.epoch)
        elif not args.fresh and (folder / "metrics.csv").exists():
            raise InputError(f"{folder} holds metrics.csv but no checkpoint.pt to continue from; {way_out}")
        else:
            self.conditions, way_out = new_conditions(config, args, data_source), "use --device cpu"
        self.device, self.precision = self.conditions.device, self.conditions.precision
        if self.device != "cpu" and not getattr(torch, self.device).is_available():
            raise InputError(f"{folder}: the device {self.device} is not there; {way_out}")

    epoch = property(lambda self: len(self.history), doc="The last epoch that was finished, 0 at the start.")

    def resume(self, **parts):
        """Restore parts, whatever has a state_dict, from the checkpoint if there is one; open TensorBoard's file."""
        from torch.utils.tensorboard import SummaryWriter

        self._parts, begun = parts, ""
        if self._checkpoint:
            restore(self.folder / "checkpoint.pt", self._checkpoint["state"], parts)
            for device, state in self._checkpoint["random"].items():
                random_of(device).set_rng_state(state)
            self._checkpoint, begun = None, f", continuing after epoch {self.epoch}"
        else:
            for path in (self.folder / "checkpoint.pt", self.folder / "metrics.csv", *self.folder.glob("events.*")):
                path.unlink(missing_ok=True)  # first what makes the run count as trained
            for name in ("snapshots", "figures"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.conditions.parameters = count_trained(parts["model"])
        write_atomically(self.folder / "config.json", json.dumps(self._record(), indent=2).encode() + b"\n")
        # TensorBoard's readers hide what a killed session wrote after the checkpoint.
        self.writer = SummaryWriter(str(self.folder), purge_step=self.epoch and self.epoch + 1)
        self.writer.file_writer.add_summary(hyperparameters(self.config, self.conditions))
        self._say(f"{self.folder}: {self.conditions.parameters:,} parameters, {self.device}, {self.precision}{begun}")

    def epochs(self):
        """Yield the numbers of the epochs that are left to train."""
        self._say("epoch  train loss  train accuracy  test accuracy  seconds")
        yield from range(self.epoch + 1, self.conditions.epochs + 1)

    def batches(self, split, epoch):
        """Yield an epoch's batches of a Split, images and labels, in the order that follows from seed and epoch."""
        start, size = time.perf_counter(), self.config.batch_size
        generator = torch.Generator().manual_seed(1000 * self.config.seed + epoch)
        order = torch.randperm(len(split.images), generator=generator).to(self.device)
        for batch in tqdm(
            order.split(size), f"epoch {epoch}", unit="batch", leave=False, disable=PROCESSES > 1 or None
        ):
            yield split.images[batch], split.labels[batch]
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()
        self._seconds = time.perf_counter() - start

    def save_snapshot(self, epoch, tensors):
        """Write snapshots/epoch_NN.pt, a dict of tensors by parameter name."""
        (self.folder / "snapshots").mkdir(exist_ok=True)
        save_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt", tensors)

    def finish(self, epoch, train, test):
        """Keep a finished epoch, whose Scores were train and test: TensorBoard's points first, then the checkpoint."""
        values = (epoch, train.loss, train.accuracy, test.loss, test.accuracy, self._seconds)
        self.history.append(dict(zip(METRICS, values, strict=True)))
        for tag, name in TENSORBOARD_TAGS.items():
            self.writer.add_scalar(tag, self.history[-1][name], epoch)
        self.writer.flush()
        random = {device: random_of(device).get_rng_state() for device in ("cpu", self.device)}
        state = {name: part.state_dict() for name, part in self._parts.items()}
        checkpoint = {"record": self._record(), "history": self.history, "random": random, "state": state}
        save_tensors(self.folder / "checkpoint.pt", checkpoint)
        self.write_metrics()
        last, measured = str(self.conditions.epochs), f"{train.loss:10.4f}  {train.accuracy:12.2f} %"
        measured += f"  {test.accuracy:11.2f} %  {self._seconds:7.1f}"
        self._say(f"{epoch:>{len(last)}}/{last}".rjust(5) + f"  {measured}")

    def write_metrics(self):
        """Let metrics.csv say what the checkpoint says."""
        table = table_text(METRICS, [row.values() for row in self.history])
        write_atomically(self.folder / "metrics.csv", table.encode())

    def close(self):
        """End TensorBoard's file, and keep no network in memory: a list keeps its runs for the table at its end."""
        if self.writer:
            self.writer.close()
        self._checkpoint = self._parts = self.writer = None

    def _record(self):
        return {"script": self.config.script, "settings": asdict(self.config), "conditions": vars(self.conditions)}


def count_trained(model):
    """Return the number of weights that training changes: all but those that the model keeps at zero."""
    return sum(parameter.numel() for parameter in model.parameters()) - getattr(model, "frozen_weights", 0)


def random_of(device):
    return torch if device == "cpu" else getattr(torch, device)


def restore(path, states, parts):
    """Load states into the parts, both by name; raises InputError when those of the file at path do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (RuntimeError, LookupError, ValueError):
        raise InputError(f"{path}: the weights do not fit its settings; train the run again with --fresh") from None


def hyperparameters(config, conditions, **others):
    """Return TensorBoard's HParams record for a run itself; others: values beside its own, or None for none."""
    from torch.utils.tensorboard.summary import hparams

    lasting = ("data_source", "device", "precision", "threads")
    values = asdict(config) | {name: getattr(conditions, name) for name in lasting} | others
    return hparams({name: value for name, value in values.items() if value is not None}, {})[1]


def locked(folder, wait=True, name=".lock"):
    """Return a context that holds a folder by a lock, which dies with this process; raises Timeout, or waits."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / name).acquire(timeout=-1 if wait else 0)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        say_once("this file system has no locks: let no other process train there")
        return nullcontext()


# Measuring -----------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """loss: the mean cross-entropy per image in nats; accuracy: in percent."""

    loss: float
    accuracy: float


class Metrics:
    """Collects what a network says of training images, each before the step that learns from it; no step waits."""

    def __init__(self):
        self._losses, self._hits, self._images = [], [], 0

    def add(self, loss, logits, labels):
        """Take in a batch: loss, the mean over its images; logits (N, classes); labels (N,)."""
        self._losses.append(loss.detach() * len(labels))
        self._hits.append((logits.argmax(1) == labels).sum())
        self._images += len(labels)

    def score(self):
        """Return the Score of all images; raises TrainingError when the loss is no longer finite."""
        loss, hits = (torch.stack(values).cpu().double().sum().item() for values in (self._losses, self._hits))
        return finite(Score(loss / self._images, 100 * hits / self._images))


@torch.inference_mode()
def predict(model, images, batch_size=1000):
    """Return the logits, float32 (N, classes), of uint8 images (N, H, W)."""
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def evaluate(model, split):
    """Return the Score of a model on a Split; raises TrainingError when the loss is no longer finite."""
    logits = predict(model, split.images)
    losses = F.cross_entropy(logits, split.labels, reduction="none")
    hits = (logits.argmax(1) == split.labels).sum().item()
    return finite(Score(losses.cpu().double().mean().item(), 100 * hits / len(split.labels)))


def finite(score):
    if not math.isfinite(score.loss):
        raise TrainingError(f"the loss became {score.loss}")
    return score


def make_optimizer(model, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    fused = next(model.parameters()).device.type != "mps"
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=fused)


# Results: runs summed up over seeds, beside the reference report -----------------------------------------------------

REPORT_EPOCHS = 10  # the reference report's accuracies are those after its last epoch
RESULTS = ("experiment", "reported", "mean", "range", "std", "seeds", "seconds_per_epoch", "parameters", "remark")


class Reported(NamedTuple):
    """A row of the reference report: settings, test accuracy in percent, and why it is missing or not comparable."""

    config: Config
    accuracy: float | None
    remark: str = ""


def find_reported(run, epoch, report):
    """Return the Reported of a run's settings, an empty one where its accuracy after an epoch is not comparable."""
    is_comparable = run.conditions.data_source == "real" and epoch == REPORT_EPOCHS
    rows = [row for row in report if row.config == run.config.group and is_comparable]
    return rows[0] if rows else Reported(run.config.group, None)


def grouped(runs):
    """Return the runs that differ in nothing but their seeds, in the given order: a list of lists."""
    groups = {}
    for run in runs:
        groups.setdefault((run.config.group, run.conditions.data_source), []).append(run)
    return list(groups.values())


def result(group, epoch, report):
    """Return the texts below RESULTS for runs that differ only in their seeds, all of which have the epoch."""
    run, known = group[0], find_reported(group[0], epoch, report)
    accuracies = [run.history[epoch - 1]["test_accuracy"] for run in group]
    seconds = [np.median([row["seconds"] for row in run.history]) for run in group]
    several = len(group) > 1
    return (
        run.config.sentence() + ", synthetic data" * (run.conditions.data_source == "synthetic"),
        "" if known.accuracy is None else f"{known.accuracy:.2f}",
        f"{np.mean(accuracies):.2f}",
        f"{min(accuracies):.2f} to {max(accuracies):.2f}" * several,
        f"{np.std(accuracies, ddof=1):.2f}" if several else "",
        str(len(group)),
        f"{np.mean(seconds):.1f}",
        str(run.conditions.parameters),
        known.remark,
    )


def markdown(columns, rows):
    """Return a table of texts, aligned, without columns that are empty."""
    filled = [column for column in zip(columns, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in filled]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*filled, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["-" * width for width in widths], *lines[1:]])


# Many experiments ----------------------------------------------------------------------------------------------------

PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)  # which work through the same list, as torchrun tells them
IS_FIRST = int(os.environ.get("RANK") or 0) == 0


def say(line):
    """Print a line that concerns all processes, in the first one only."""
    if IS_FIRST:
        tell(line)


say_once = cache(say)


def share_of_cores():
    """Return the number of threads for this process, one of several on this machine if torchrun says so."""
    sharing, threads = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.get_num_threads()
    if sharing > 1 and threads == 1:  # torchrun sets OMP_NUM_THREADS to 1 where nobody typed it
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    elif "OMP_NUM_THREADS" in os.environ:
        return threads
    with suppress(OSError, ValueError):
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # a container's
        threads = min(threads, math.ceil(quota / period))
    return max(1, threads // sharing)


def multiplies_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot tell
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def new_conditions(config, args, data_source):
    """Return the conditions under which a run starts, a namespace: what its numbers depend on beside its Config."""
    best = next((device for device in ("cuda", "mps") if getattr(torch, device).is_available()), "cpu")
    device, precision = best if args.device == "auto" else args.device, args.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in config.precisions and multiplies_bf16(device) else "fp32"
    conditions = SimpleNamespace(data_source=data_source, device=device, precision=precision, epochs=args.epochs)
    conditions.threads = min(args.threads, config.most_threads or args.threads)
    conditions.versions = {name: version(name) for name in ("torch", "torchvision")}
    conditions.versions["python"] = sys.version.split()[0]
    return conditions


def train_one(config, train, args, wait=True):
    """Train an experiment up to --epochs, from where its folder stands; return its Run; wait: see locked."""
    data = load_data(config.dataset, args.data, args.data_dir, config.pixels)
    folder = args.runs_dir / config.script / ("synthetic_" * (data.source == "synthetic") + config.name)
    is_complete = not args.fresh and len(read_table(folder / "metrics.csv")) >= args.epochs
    with nullcontext() if is_complete else locked(folder, wait):
        run = Run(folder, config, args, data.source)
        try:
            if run.epoch < run.conditions.epochs:
                torch.set_num_threads(run.conditions.threads)
                torch.manual_seed(config.seed)
                train(config, run, data.to(run.device))
                if PROCESSES > 1:
                    tell(f"{folder}: {run.history[-1]['test_accuracy']:.2f} % after epoch {run.epoch}")
            else:
                say(f"{folder}: complete after epoch {run.epoch}; a larger --epochs extends it, --fresh starts over")
                if not is_complete:  # a kill came between the checkpoint and metrics.csv
                    run.write_metrics()
        except TrainingError as error:
            where = f"in epoch {run.epoch + 1} at learning rate {number_text(config.lr)}; what it finished is kept"
            raise TrainingError(f"{folder}: {error} {where}; try a smaller --lr") from None
        finally:
            run.close()
    return run


def train_list(configs, train, args):
    """Train experiments, first what no other process trains; return their Runs, and the statuses of failed ones."""
    done, failed, start = {}, {}, time.monotonic()
    for wait in (False, True):
        left = [config for config in configs if config not in done and config not in failed]
        if wait and left:
            say(f"waiting for what other processes train: {len(left)} of {len(configs)} runs")
        for config in left:
            try:
                done[config] = train_one(config, train, args, wait)
            except Timeout:  # another process trains it
                continue
            except FAILURES as error:
                failed[config], message = explain(error)
                if len(configs) == 1 or getattr(error, "errno", None) in DISK_FULL:
                    raise
                tell(message, sys.stderr)
            if len(configs) > 1:
                say(f"{len(done) + len(failed)} of {len(configs)} runs, {(time.monotonic() - start) / 60:.0f} min")
    return [done[config] for config in configs if config in done], list(failed.values())


def run_experiments(configs, train, args, report):
    """Train experiments in their run folders; say how they ended and what to type next."""
    runs, failed = train_list(configs, train, args)
    if runs and IS_FIRST:
        epoch = min(args.epochs, REPORT_EPOCHS) if args.report else args.epochs
        tell(f"\nTest accuracy in % after epoch {epoch}")
        tell(markdown(RESULTS, [result(group, epoch, report) for group in grouped(runs)]))
        for name in {run.config.dataset for run in runs if run.conditions.data_source == "synthetic"}:
            tell(synthetic_notice(name))
        folder = runs[0].folder
        beside = {path.parent for path in folder.parent.glob("*/events.out.tfevents.*")}
        curves = folder.parent if len(beside) <= 40 else folder  # of more runs TensorBoard shows no curve at first
        tell(f"\nNext:\n  {typed('tensorboard', '--logdir', curves)}")
        tell(f"  {typed('python', 'visualize.py', args.runs_dir if len(configs) > 1 else folder)}")
    if failed and IS_FIRST:  # another process that failed would end them all
        message = f"{len(failed)} of {len(configs)} runs could not be trained, for the reasons given above"
        raise TrainingError(message) if 1 in failed else InputError(message)


# Command line --------------------------------------------------------------------------------------------------------


def typed(*words):
    """Return words as a shell needs them, scripts of this project by the path by which the present one was called."""
    words = [str(Path(sys.argv[0]).with_name(word) if str(word).endswith(".py") else word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def folder_name(text):
    """Return the Path of a folder that was typed, which may begin with ~."""
    return Path(os.path.expanduser(text))


def make_parser(description):
    """Return an argument parser without abbreviations, whose errors are one line."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=description, formatter_class=formatter, allow_abbrev=False
    )


def experiment_parser(config_class, description):
    """Return a training script's parser: a flag for each setting of its Config, and those that both scripts share."""
    parser = make_parser(description)
    flag = parser.add_argument
    for one in config_class.known_settings():
        metavar = f"{{{','.join(one.choices)}}}" if one.choices else one.type.__name__.upper()
        usual = one.unset if one.default is None else number_text(one.default)
        flag(one.flag, nargs="+", type=one.type, metavar=metavar, help=f"{one.help}; default: {usual}")
    flag("--epochs", type=int, default=10, metavar="INT", help="in all; default: 10")
    real_first = "auto: the real set if it is there or can be downloaded, else the embedded one; default: auto"
    flag("--data", choices=("auto", "real", "synthetic"), default="auto", help=real_first)
    flag("--data-dir", type=folder_name, default="data", help="where the real sets lie or shall lie; default: data")
    flag("--runs-dir", type=folder_name, default="runs", help="where the run's folder is made; default: runs")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.set_defaults(precision="auto")
    if len(config_class.precisions) > 1:
        native = f"auto: {config_class.precisions[0]} where the hardware multiplies it natively; default: auto"
        flag("--precision", choices=("auto", *config_class.precisions), default="auto", help=native)
    flag("--report", action="store_true", help="run the reference report's experiments, for each --seed")
    flag("--fresh", action="store_true", help="start over instead of continuing the run's folder")
    return parser


def parse_experiments(config_class, report, parser):
    """Return a training script's command line, parsed, and the Configs that it asks for, no two alike."""
    args = parser.parse_args()
    grid = {one.name: getattr(args, one.name) or [one.default] for one in config_class.known_settings()}
    own = [one.flag for one in config_class.known_settings() if getattr(args, one.name) and one.name != "seed"]
    if args.report and own:
        parser.error(f"argument --report: brings its own settings; leave out {own[0]}")
    if args.fresh and PROCESSES > 1:
        parser.error("argument --fresh: several processes cannot start over together; delete the run folders instead")
    Setting("epochs", 10, minimum=1, maximum=999).check(args.epochs)
    if args.report:
        configs = [replace(row.config, seed=seed) for seed in grid["seed"] for row in report]
    else:
        configs = [config_class(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    return args, list(dict.fromkeys(configs))


def main(config_class, train, report, description):
    """Be a training script: config_class is its Config, train(config, run, data) trains one, report lists Reported."""

    def work():
        args, configs = parse_experiments(config_class, report, experiment_parser(config_class, description))
        args.threads = share_of_cores()
        run_experiments(configs, train, args, report)

    run_script(work)
