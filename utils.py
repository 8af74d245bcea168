"""What both training scripts share.

From top to bottom: errors and exit statuses, data sets (real, then embedded), settings, files, the run's folder with
its checkpoint and TensorBoard events, measuring, the reference report and runs summed up, one experiment and many,
command line. Begin at main(), at the end.
"""

import argparse
import csv
import difflib
import errno
import http.client
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import types
import typing
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if (
    Path(sys.argv[0]).suffix == ".py"
    and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    and os.environ.get("RANK", "0") == "0"
):
    with suppress(OSError):
        print("loading torch ...", flush=True)  # which takes seconds

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Errors and exit statuses
# ---------------------------------------------------------------------------------------------------------------------


DISK_FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)]
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


def is_lack_of_memory(error):
    kinds = MemoryError, torch.cuda.OutOfMemoryError
    return isinstance(error, kinds) or "allocate memory" in str(error)  # what torch says on a processor


def run_script(main, kept="every finished epoch is kept, and the same command continues"):
    """Call main() and leave with the exit status it earned, an error told in one line on standard error.

    Status 0: done; 1: training failed; 2: unusable command line or input; 130: Ctrl-C; 143: SIGTERM, or nobody reads.
    kept: what a user who interrupts the script is told.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, _terminate)
    status, message = 0, None
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, f"error: {error}"
    except TrainingError as error:
        status, message = 1, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        status, message = 1, "error: too little memory; end other programs, or take a smaller network or --batch-size"
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or error
        if error.errno in DISK_FULL:
            status, message = 1, f"error: {what}; free some space and run the same command again"
        elif error.errno in TERMINAL_GONE:
            status, message = 143, f"nobody reads the output any more; {kept}"
        else:
            status, message = 2, f"error: {what}; name a file or folder that can be used"
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {kept}"
    except Terminated:
        status, message = 143, f"terminated; {kept}"
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
DATASETS = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
DIGITS = tuple("0123456789")

# torchvision verifies only MNIST's archives; these are the MD5 sums of what they contain.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


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
                    f"{DATASETS[name]} is not in {data_dir} and cannot be downloaded ({error}); connect to the "
                    "network, copy the files there, or use --data synthetic"
                ) from None
            say_once(f"{DATASETS[name]} is not in {data_dir} and cannot be downloaded ({error}).")
    return synthetic_pictures() if name == "cifar10" else synthetic_digits()


def synthetic_notice(dataset):
    """The sentence that keeps results on embedded data from being taken for real ones."""
    return (
        f"NOTE: synthetic data: the embedded stand-in for {DATASETS[dataset]}, NOT the real set; "
        "its accuracies are comparable with no published ones."
    )


def permuted(data):
    """Return a Dataset whose images all have their pixels in the same random order (Le et al., 2015)."""

    def shuffle(split):
        order = torch.randperm(split.images[0].numel(), generator=torch.Generator().manual_seed(0))
        return split._replace(images=split.images.flatten(1)[:, order].view_as(split.images))

    return data._replace(train=shuffle(data.train), test=shuffle(data.test))


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
    checksums = _known_checksums(name, dataset_class, data_dir)
    if not all(path.is_file() for path in checksums):
        if not may_download:
            raise InputError(f"{DATASETS[name]} is not in {data_dir}; a training script downloads it there")
        with _sole_downloader(data_dir, next(iter(checksums)).parent) as had_to_wait:
            if not all(path.is_file() for path in checksums):
                if had_to_wait:
                    raise ConnectionError("another process has just tried")
                _download(dataset_class, data_dir)
    _verify(checksums)
    splits = []
    for part in (dataset_class(data_dir, train=is_train) for is_train in (True, False)):
        images = torch.from_numpy(rgb_to_gray(part.data)) if name == "cifar10" else part.data
        splits.append(Split(images, torch.as_tensor(part.targets)))
    return Dataset(name, "real", tuple(part.classes) if name == "cifar10" else DIGITS, *splits)


def _known_checksums(name, dataset_class, data_dir):
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
                f"{path} is damaged (its MD5 sum is not the known {md5}); delete it and run again to download it"
            )


@contextmanager
def _sole_downloader(data_dir, folder):
    """Let one process at a time download into folder, in data_dir; yields whether this one had to wait.

    Leaves no empty folder behind that was not there before.
    """
    new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(data_dir, os.W_OK):
        raise InputError(f"the data folder {data_dir} cannot be written; choose another one with --data-dir")
    lock, had_to_wait = FileLock(data_dir / ".download.lock"), False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        had_to_wait = True
        with suppress(FileNotFoundError):  # who held it failed, and has swept up the folder
            lock.acquire()
    try:
        yield had_to_wait
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        for each in new_folders:
            with suppress(OSError):  # it holds something
                each.rmdir()


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
    train, test = (Split(images[part], labels[part]) for part in (slice(SYNTHETIC_TRAIN), slice(SYNTHETIC_TRAIN, None)))
    return Dataset(name, "synthetic", classes, train, test)


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
# Settings: one dataclass from which flags, help, checks, grid, names, words, HParams and config.json follow
# ---------------------------------------------------------------------------------------------------------------------


def setting(default, **facts):
    """Return a dataclass field with a default and what else is known of it: the keywords are those of Setting."""
    return field(default=default, metadata=facts)


class Setting(NamedTuple):
    """What is known of a field of Config: what it may be, and how it is written in help, names and sentences."""

    name: str
    kind: type
    default: object
    help: str = ""
    choices: dict | tuple = ()  # a dict: the values and their words
    above: float | None = None
    minimum: float | None = None
    below: float | None = None
    maximum: float | None = None
    only: tuple | None = None  # (setting, value) without which this one stays at its default
    always: bool = False  # shown in names and sentences at its default, too
    tag: str | None = None  # what stands before the value in a run's name; default: '_' and the setting's name
    words: str | None = None  # how a sentence says it, such as 'learning rate {}'; '': it does not

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    def wanted(self):
        """Return in words what the setting may be."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind not in (int, float):
            return "the name of a folder" if self.kind is str else f"a {self.kind.__name__}"
        text = "a whole number" if self.kind is int else "a number"
        for word, bound in (("above", self.above), ("from", self.minimum), ("to", self.maximum)):
            text += "" if bound is None else f" {word} {bound:g}" if isinstance(bound, float) else f" {word} {bound}"
        return text if self.below in (None, math.inf) else f"{text} to below {self.below}"

    def check(self, value):
        """Raises ValueError for a value that the setting cannot have."""
        if value is None and self.default is None:
            return
        compared = (operator.gt, self.above), (operator.ge, self.minimum), (operator.lt, self.below)
        accepted = type(value) is self.kind and (not self.choices or value in self.choices) and value != ""
        if not accepted or not all(
            bound is None or compare(value, bound) for compare, bound in (*compared, (operator.le, self.maximum))
        ):
            raise ValueError(f"{value!r} is not {self.wanted()}")

    def parse(self, text):
        """Return the value that a command line's text stands for."""
        try:
            value = self.kind(text)
            self.check(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.wanted()}") from None
        return value

    def shown(self, value):
        return self.always or value != self.default

    def named(self, value):
        tag = "_" + self.name.replace("_", "") if self.tag is None else self.tag
        return tag + number_text(value)

    def said(self, value):
        text = self.choices[value] if isinstance(self.choices, dict) else number_text(value)
        return (self.name.replace("_", " ") + " {}" if self.words is None else self.words).format(text)


def number_text(value):
    """Return the shortest text that stands for a value and no other: 1e-3, 0.02, 128."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1)


@cache
def settings_of(cls):
    """Return the Setting of each field of a dataclass, those of a Config's own before the ones that all share."""
    found = []
    for one in sorted(fields(cls), key=lambda one: one.name in Config.__dataclass_fields__):
        kinds = [kind for kind in typing.get_args(one.type) or (one.type,) if kind is not types.NoneType]
        declared = [vars(base).get("__dataclass_fields__", {}).get(one.name) for base in reversed(cls.__mro__)]
        facts = {name: fact for each in declared if each for name, fact in each.metadata.items()}
        found.append(Setting(one.name, kinds[0], one.default, **facts))
    return found


class Checked:
    """A dataclass whose fields are settings. Raises ValueError for a value that a setting cannot have."""

    def __post_init__(self):
        for one in settings_of(type(self)):
            value = getattr(self, one.name)
            try:
                one.check(value)
            except ValueError as error:
                raise ValueError(f"{one.name} is {error}") from None
            if one.only and value != one.default and getattr(self, one.only[0]) != one.only[1]:
                raise ValueError(f"{one.name} is {value!r} without {one.only[0]} {one.only[1]}")


@dataclass(frozen=True)
class Config(Checked):
    """The settings that define an experiment; a script's own Config adds its fields, defaults and words.

    It also has dataset (a key of DATASETS, a field or fixed), network (its name in words), and what its network can
    use: precisions, and most_threads (None: all).
    """

    pixels: str = setting(
        "in-place",
        choices=("in-place", "permuted"),
        tag="_",
        words="pixels {}",
        help="permuted: those of every image in one fixed random order",
    )
    optimizer: str = setting(
        "adam", choices={"adam": "Adam", "sgd": "SGD"}, always=True, tag="_", words="{}", help="what takes the steps"
    )
    lr: float = setting(1e-3, above=0, below=math.inf, always=True, words="learning rate {}", help="learning rate")
    momentum: float = setting(0.0, minimum=0, below=1, only=("optimizer", "sgd"), help="momentum of SGD")
    batch_size: int = setting(
        64, minimum=1, maximum=60_000, tag="_batch", words="batch {}", help="images that a step learns from"
    )
    seed: int = setting(
        0, minimum=0, maximum=2**31 - 1, always=True, help="of the initial weights and of the order of the images"
    )

    precisions = ("fp32",)
    most_threads = None

    @property
    def name(self):
        """The name that tells this experiment from all others of its script; usual settings are left out."""
        named = ((one, getattr(self, one.name)) for one in settings_of(type(self)))
        return "".join(one.named(value) for one, value in named if one.shown(value)).strip("_")

    def said(self, without=("seed",)):
        """Return the experiment's words by setting, the network's first; without: the settings that are not said."""
        values = ((one, getattr(self, one.name)) for one in settings_of(type(self)) if one.name not in without)
        words = {one.name: one.said(value) for one, value in values if one.shown(value)}
        return {name: text for name, text in {"network": self.network, **words}.items() if text}

    def words(self, without=("seed",)):
        """Return the experiment in words; without: the settings that are not said."""
        return ", ".join(self.said(without).values())

    def command(self):
        """Return the command line that trains the experiment."""
        values = ((one.flag, getattr(self, one.name), one.default) for one in settings_of(type(self)))
        texts = [(flag, number_text(value)) for flag, value, default in values if value != default]
        flags = [f"{flag}={text}" if text.startswith("-") else f"{flag} {text}" for flag, text in texts]  # for argparse
        return " ".join([f"python {self.script()}.py", *flags])

    @classmethod
    def script(cls):
        """Return the name of the script that this is the Config of."""
        return Path(sys.modules[cls.__module__].__file__).stem

    def setting(self):
        """Return what runs of several seeds have in common: this Config with seed 0."""
        return replace(self, seed=0)


@dataclass(frozen=True)
class Conditions(Checked):
    """What a run's numbers depend on beside its Config; resolved when it starts, and used again when it continues."""

    data_source: str = setting("real", choices=("real", "synthetic"))
    data_dir: str = setting("data")
    device: str = setting("cpu", choices=("cpu", "cuda", "mps"))
    precision: str = setting("fp32", choices=("fp32", "bf16"))
    threads: int = setting(1, minimum=1, maximum=1024)
    epochs: int = setting(10, minimum=1, maximum=999)
    parameters: int = setting(0, minimum=0, maximum=10**9)
    versions: dict = setting(None)
    commit: str = setting(None)


class Record(NamedTuple):
    """What config.json holds. diverged: the epoch in which the last attempt to train the run diverged, if it did."""

    config: Config
    conditions: Conditions
    diverged: int | None = None

    def as_dict(self):
        parts = {"script": self.config.script(), "settings": asdict(self.config), "conditions": asdict(self.conditions)}
        return parts | ({"diverged": self.diverged} if self.diverged else {})

    @classmethod
    def from_dict(cls, values, configs, path):
        """Return the Record read from path; configs: the Config class by script.

        A setting that it lacks has its default. Raises InputError for what no run can have.
        """
        try:
            config_class = configs[values["script"]]
            config, conditions = config_class(**values["settings"]), Conditions(**values["conditions"])
            if not isinstance(values.get("diverged", 1), int):
                raise ValueError(f"diverged is {values['diverged']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not of this project ({str(error)[:100]}); train the run again") from None
        return cls(config, conditions, values.get("diverged"))


def run_folder(runs_dir, config, data_source):
    """Return where a run lies; the data source comes first in its name when it is not the real one."""
    return Path(runs_dir, config.script(), "synthetic_" * (data_source == "synthetic") + config.name)


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, read without running code and without overlooking a changed byte
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path, content):
    """Write bytes to path so that a reader, or a crash, sees either the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the new name, too, is on the disk; elsewhere folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path, tensors):
    content = io.BytesIO()
    torch.save(tensors, content)
    write_atomically(path, content.getbuffer())


def load_tensors(path):
    """Return what save_tensors wrote, its tensors on the CPU; no code in the file is run.

    Raises InputError when a byte of it has changed or it is not one of this project's.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:  # the file is a zip with a checksum for each record, which torch.load does not look at
        if zipfile.ZipFile(content).testzip() is None:
            content.seek(0)
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        if is_lack_of_memory(error):
            raise
    raise InputError(f"{path} is damaged or not of this project; run its training again with --fresh")


def table_text(columns, rows):
    """Return rows as CSV below the names of their columns."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    return table.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: checkpoint, records, TensorBoard
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
TENSORBOARD_TAGS = {
    "Loss/Train": "train_loss",
    "Accuracy/Train": "train_accuracy",
    "Loss/Test": "test_loss",
    "Accuracy/Test": "test_accuracy",
}
EVENTS = "events.out.tfevents.run"
GUESSING = math.log(10)  # nats: the loss of guessing among ten classes


class Run:
    """The folder of a run while it is trained: its checkpoint, which alone counts, and the records that follow from it.

    record: what config.json holds; history: the rows of metrics.csv, list of dict; checkpoint: what read_checkpoint
    returned for the folder, None for a new run; writer: TensorBoard's SummaryWriter, from take_up() on. What is written
    to it reaches TensorBoard's file when the epoch is finished.
    """

    def __init__(self, folder, record, checkpoint=None):
        self.folder, self.record, self.history = Path(folder), record, []
        self._checkpoint, self._written = checkpoint, 0
        if checkpoint:
            self.history = checkpoint["history"]
            self._publish(checkpoint["events"])  # a kill may have come before it
        self._begun = self.epoch

    config = property(lambda self: self.record.config)
    device = property(lambda self: self.record.conditions.device)
    precision = property(lambda self: self.record.conditions.precision)
    diverged = property(lambda self: self.record.diverged)
    epoch = property(lambda self: len(self.history), doc="The last epoch that was finished, 0 at the start.")
    has_grown = property(
        lambda self: self.epoch > self._begun, doc="Whether an epoch was finished since it was opened."
    )

    def take_up(self, **parts):
        """Restore the parts of an experiment from the checkpoint, if there is one, and open TensorBoard's file.

        parts: whatever has a state_dict and is to continue where it was, the model among them.
        """
        self._parts = parts
        if self._checkpoint:
            restore(self._checkpoint, parts, with_random=True)
            self._checkpoint = None
        else:
            remove_records(self.folder)
        parameters = sum(parameter.numel() for parameter in parts["model"].parameters())
        conditions = replace(self.record.conditions, parameters=parameters)
        self._save_record(self.record._replace(conditions=conditions, diverged=None))
        self.writer = memory_writer(self.folder, is_new=not self._written)
        _, session_start, self._session_end = hyperparameters(self.record)
        self.writer.file_writer.add_summary(session_start)
        print(f"{self.folder}: {parameters:,} parameters, {self.device}, {self.precision}")

    def epochs(self):
        """Yield the numbers of the epochs that are left to train."""
        print("epoch  train loss  train accuracy  test accuracy  seconds", flush=True)
        yield from range(self.epoch + 1, self.record.conditions.epochs + 1)

    def batches(self, split, epoch):
        """Yield an epoch's batches of a Split, images and labels, in the order that follows from seed and epoch."""
        start, size = time.perf_counter(), self.config.batch_size
        order = shuffled(len(split.images), self.config.seed, epoch).to(self.device)
        hidden = True if processes() > 1 else None  # None: shown on a terminal
        for batch in tqdm(order.split(size), unit="batch", leave=False, disable=hidden):
            yield split.images[batch], split.labels[batch]
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()
        self._seconds = time.perf_counter() - start

    def save_snapshot(self, epoch, tensors):
        """Write snapshots/epoch_NN.pt, a dict of tensors by parameter name."""
        (self.folder / "snapshots").mkdir(exist_ok=True)
        save_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt", tensors)

    def finish(self, epoch, train, test):
        """Keep a finished epoch, whose Scores were train and test: the checkpoint, and what follows from it."""
        values = (epoch, train.loss, train.accuracy, test.loss, test.accuracy, self._seconds)
        self.history.append(dict(zip(METRICS, values, strict=True)))
        for tag, name in TENSORBOARD_TAGS.items():
            self.writer.add_scalar(tag, self.history[-1][name], epoch)
        if epoch == self.record.conditions.epochs:
            self.writer.file_writer.add_summary(self._session_end)
        written = torch.frombuffer(bytearray(self.writer.take()), dtype=torch.uint8)
        checkpoint = {"record": self.record.as_dict(), "history": self.history, "random": random_state(self.device)}
        checkpoint |= {"events": {"before": self._written, "written": written}}
        checkpoint |= {"state": {name: part.state_dict() for name, part in self._parts.items()}}
        save_tensors(self.folder / "checkpoint.pt", checkpoint)
        self._publish(checkpoint["events"])
        last = str(self.record.conditions.epochs)
        measured = f"{train.loss:10.4f}  {train.accuracy:12.2f} %  {test.accuracy:11.2f} %  {self._seconds:7.1f}"
        remark = "  loss far above guessing" if max(train.loss, test.loss) > 10 * GUESSING else ""
        print(f"{epoch:>{len(last)}}/{last}".rjust(5) + f"  {measured}{remark}", flush=True)

    def let_go(self):
        """Keep no network in memory: a sweep keeps its runs for the table at its end."""
        self._checkpoint = self._parts = self.writer = None

    def record_divergence(self):
        """Keep in config.json that the epoch after the last finished one diverged."""
        self._save_record(self.record._replace(diverged=self.epoch + 1))

    def _save_record(self, record):
        self.record = record
        write_atomically(self.folder / "config.json", json.dumps(record.as_dict(), indent=2).encode() + b"\n")

    def _publish(self, events):
        """Let TensorBoard's file and metrics.csv say what the checkpoint says.

        events: bytes 'before' the last epoch in TensorBoard's file, and what the epoch has 'written', uint8.
        """
        written = events["written"].numpy().tobytes()
        with open(self.folder / EVENTS, "ab") as file:
            before = min(events["before"], file.tell())
            if file.tell() != before + len(written):
                file.truncate(before)
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
        self._written = before + len(written)
        metrics = table_text(METRICS, [row.values() for row in self.history]).encode()
        path = self.folder / "metrics.csv"
        if not path.exists() or path.read_bytes() != metrics:
            write_atomically(path, metrics)


def memory_writer(folder, is_new):
    """Return a SummaryWriter that keeps its events until take() returns them as bytes, those of a new file or not."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    class MemoryFile(FileWriter):
        def __init__(self):
            self.event_writer, self.content = self, io.BytesIO()

        def add_event(self, event, step=None, walltime=None):
            event.wall_time, event.step = walltime or time.time(), int(step or 0)
            RecordWriter(self.content).write(event.SerializeToString())

    class MemoryWriter(SummaryWriter):
        def _get_file_writer(self):
            self.file_writer = self.file_writer or MemoryFile()
            return self.file_writer

        def take(self):
            content, self.file_writer.content = self.file_writer.content, io.BytesIO()
            return content.getvalue()

    writer = MemoryWriter(str(folder))
    if is_new:
        writer.file_writer.add_event(Event(file_version="brain.Event:2"))
    return writer


def hyperparameters(record, **others):
    """Return TensorBoard's HParams records of a run, for the run itself; the metrics are the scalars it has anyway.

    others: values to show beside or instead of the record's; what is None is not shown.
    The first, which lists an experiment's columns, is left out by Run: TensorBoard then collects them over all runs, so
    that different kinds of network share one table.
    """
    from torch.utils.tensorboard.summary import hparams

    conditions = ("data_source", "device", "precision", "threads", "epochs", "parameters")
    shown = asdict(record.config) | {name: getattr(record.conditions, name) for name in conditions}
    known = {name: value for name, value in (shown | others).items() if value is not None}
    return hparams(known, dict.fromkeys(TENSORBOARD_TAGS, 0.0))


def random_state(device):
    """Return the state of torch's random numbers on the processor and, where it has its own, on the device."""
    states = {"cpu": torch.get_rng_state()}
    return states if device == "cpu" else {**states, device: getattr(torch, device).get_rng_state()}


def restore(checkpoint, parts, with_random=False):
    """Load a checkpoint's state into the parts (by name); raises InputError when it does not fit them."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["state"][name])
            for parameter, state in getattr(part, "state", {}).items():  # an optimizer's, which checks no shapes itself
                if any(getattr(value, "shape", ()) not in ((), parameter.shape) for value in state.values()):
                    raise ValueError
        for device, state in checkpoint["random"].items() if with_random else ():
            (torch if device == "cpu" else getattr(torch, device)).set_rng_state(state)
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError):
        message = "the checkpoint's weights do not fit its settings; run its training again with --fresh"
        raise InputError(message) from None


def remove_records(folder):
    """Delete what a run's folder holds, first what makes the run count as trained."""
    for name in ("checkpoint.pt", "metrics.csv", "config.json"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    for name in ("snapshots", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def locked(folder):
    """Hold a run's folder, by a lock that dies with this process; raises LockedError when another one holds it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"{folder} is being trained by another process; wait for it or choose other settings"
        raise LockedError(message) from None
    try:
        yield
    finally:
        lock.release()


def read_checkpoint(folder, configs):
    """Return a run's checkpoint, a dict: record, history, events, random, and state, each part's by name.

    configs: the Config class by script. None where there is none; raises InputError where it cannot be used.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        return None
    checkpoint = load_tensors(path)
    with suppress(LookupError, TypeError, AttributeError, OverflowError):
        events, states = checkpoint["events"], (checkpoint["state"]["model"], checkpoint["random"]["cpu"])
        is_place = isinstance(events["before"], int) and events["before"] >= 0
        if is_history(checkpoint["history"]) and is_place and events["written"].dtype == torch.uint8:
            return {**checkpoint, "record": Record.from_dict(checkpoint["record"], configs, path)} if states else None
    raise InputError(f"{path} is damaged or not of this project; run its training again with --fresh")


def is_history(rows):
    """Whether rows, a list of dict, are metrics of epochs from 1 on, all finite; may raise KeyError and TypeError."""
    in_order = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    return bool(rows) and in_order and all(math.isfinite(row[name]) for row in rows for name in METRICS)


def read_metrics(folder):
    """Return metrics.csv as a list of dict of float, empty where it is missing; raises InputError when damaged."""
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        return []
    try:
        with open(path, newline="") as file:
            rows = [{name: float(row[name]) for name in METRICS} for row in csv.DictReader(file)]
        if is_history(rows):
            return rows
    except (LookupError, ValueError, TypeError, csv.Error):
        pass
    raise InputError(f"{path} is empty or damaged; the same training command writes it anew from the checkpoint")


def read_record(folder, configs):
    """Return the Record in config.json; configs: the Config class by script. Raises InputError when it is unusable."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; name a run folder below runs/") from None
    return Record.from_dict(values, configs, path)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """loss: the mean cross-entropy per image in nats; accuracy: in percent."""

    loss: float
    accuracy: float


class Metrics:
    """Collects what a network says of an epoch's training images, each judged before the step that learns from it.

    The values stay on the device: no step waits for them.
    """

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


def shuffled(count, seed, epoch):
    """Return the order of an epoch's training images, int64 (count,), which depends on nothing but seed and epoch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(count, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# The reference report, and runs summed up over seeds
# ---------------------------------------------------------------------------------------------------------------------

REPORT_EPOCHS = 10  # the reference report's accuracies are those after its last epoch


class Reported(NamedTuple):
    """A row of the reference report: settings, and test accuracy in percent, None where it gives no figure.

    remark: why the figure is missing or not comparable; such a row is not compared.
    """

    config: Config
    accuracy: float | None
    remark: str = ""

    @property
    def comparable(self):
        """The figure that runs are compared with, None where there is none."""
        return None if self.remark else self.accuracy


class Summary(NamedTuple):
    """Runs of one setting: test accuracies in percent after an epoch, one a seed; diverged: the seeds without one."""

    setting: str
    accuracies: list
    diverged: list
    seconds: float
    parameters: int
    reported: Reported

    COLUMNS = (
        *("setting", "reported", "mean", "difference", "std", "seeds", "within", "diverged"),
        *("seconds_per_epoch", "parameters", "remark"),
    )

    def row(self):
        """Return the texts below COLUMNS; difference: mean - reported; within: whether the seeds span the reported."""
        reported = self.reported.accuracy
        comparable = self.reported.comparable is not None and bool(self.accuracies)
        mean = statistics.fmean(self.accuracies) if self.accuracies else math.nan
        several, seeds = len(self.accuracies) > 1, len(self.accuracies) + len(self.diverged)
        within = comparable and min(self.accuracies) <= reported <= max(self.accuracies)
        return (
            self.setting,
            f"{reported:.2f}" if reported is not None else "",
            f"{mean:.2f}" if self.accuracies else "",
            f"{mean - reported:+.2f}" if comparable else "",
            f"{statistics.stdev(self.accuracies):.2f}" if several else "",
            str(seeds),
            ("yes" if within else "no") if several and comparable else "",
            f"{len(self.diverged)} of {seeds}: seed {' '.join(map(str, self.diverged))}" if self.diverged else "",
            f"{self.seconds:.1f}" if self.accuracies else "",
            str(self.parameters),
            self.reported.remark,
        )


def epoch_seconds(run):
    """Return the median of the training seconds of a run's epochs."""
    return statistics.median(row["seconds"] for row in run.history)


def summarise(runs, epoch, report):
    """Return the Summary of runs of one setting after an epoch; report: the list of Reported."""
    config, is_real = runs[0].config.setting(), runs[0].record.conditions.data_source == "real"
    rows = [row for row in report if row.config == config and is_real and epoch == REPORT_EPOCHS]
    trained = [run for run in runs if len(run.history) >= epoch]
    seconds = [epoch_seconds(run) for run in trained]
    return Summary(
        config.words() + ("" if is_real else ", synthetic data"),
        [run.history[epoch - 1]["test_accuracy"] for run in trained],
        [run.config.seed for run in runs if run not in trained],
        statistics.fmean(seconds) if seconds else math.nan,
        runs[0].record.conditions.parameters,
        rows[0] if rows else Reported(config, None),
    )


def group_by_setting(runs):
    """Return the runs of each setting in the given order: a list of lists."""
    groups = {}
    for run in runs:
        groups.setdefault((run.config.script(), run.config.setting(), run.record.conditions.data_source), []).append(
            run
        )
    return list(groups.values())


def filled_columns(columns, rows):
    """Return columns and rows without the columns in which every row is empty."""
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    return [[row[number] for number in kept] for row in (columns, *rows)]


def results_head(epoch):
    return f"Test accuracy in % after epoch {epoch}: mean and standard deviation over seeds"


def print_results(runs, epoch, report):
    """Print the test accuracy of a single run, or an aligned table of the Summary of each setting.

    Runs on embedded data have a table of their own.
    """
    if len(runs) == 1 and runs[0].history:
        accuracy, epoch = runs[0].history[-1]["test_accuracy"], runs[0].epoch
        reported = summarise(runs, epoch, report).reported.comparable
        compared = f" (the reference report: {reported} %)" if reported else ""
        print(f"test accuracy {accuracy:.2f} % after epoch {epoch}{compared}")
        return
    for source in dict.fromkeys(run.record.conditions.data_source for run in runs):
        groups = group_by_setting(run for run in runs if run.record.conditions.data_source == source)
        rows = filled_columns(Summary.COLUMNS, [summarise(group, epoch, report).row() for group in groups])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"\n{results_head(epoch)}")
        for name, *figures in rows:
            aligned = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
            print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# One experiment and many
# ---------------------------------------------------------------------------------------------------------------------


def processes():
    """Return how many processes work through the same list, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    return int(os.environ.get("RANK", 0)) == 0


def say_once(text):
    """Print a line that concerns all processes, in the first one only."""
    if is_first():
        print(text, flush=True)


def share_of_cores():
    """Return the number of threads for this process, one of several on this machine if torchrun says so."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.get_num_threads() if local == 1 else max(1, os.cpu_count() // local)


def best_device():
    return next((device for device in ("cuda", "mps") if getattr(torch, device).is_available()), "cpu")


def multiplies_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot tell
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def git_commit():
    """Return the commit that this code stands at, with '-dirty' behind it if changed; None outside a repository."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def new_conditions(config, args, data_source):
    """Return the Conditions under which a run starts; raises InputError for a device that is not there."""
    device = args.device if args.device not in (None, "auto") else best_device()
    if device != "cpu" and not getattr(torch, device).is_available():
        raise InputError(f"the device {device} is not there; use --device cpu, or --device auto for the best there is")
    precision = getattr(args, "precision", None) or "auto"
    if precision == "auto":
        precision = "bf16" if "bf16" in config.precisions and multiplies_bf16(device) else "fp32"
    threads = min(args.threads, config.most_threads or args.threads)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"torchvision": version("torchvision")}
    about = {"epochs": args.epochs, "versions": versions, "commit": git_commit()}
    return Conditions(data_source, args.data_dir, device, precision, threads, **about)


def continued_conditions(folder, conditions, args):
    """Return the Conditions under which a run continues; raises InputError where a typed flag asks for others."""
    for name in ("device", "precision"):
        asked, recorded = getattr(args, name, None), getattr(conditions, name)
        if asked not in (None, "auto", recorded):
            raise InputError(
                f"{folder} was begun with --{name} {recorded}, not {asked}; leave the flag out to continue it, "
                "or start over with --fresh, or use another --runs-dir"
            )
    if conditions.device != "cpu" and not getattr(torch, conditions.device).is_available():
        raise InputError(
            f"{folder} was begun on the device {conditions.device}, which is not there; continue it where there is "
            "one, or start over with --fresh, or use another --runs-dir"
        )
    return conditions


@contextmanager
def opened_run(folder, config, args, data_source):
    """Hold a run's folder and yield its Run, as the checkpoint left it or new.

    Raises LockedError when another process trains it, InputError when it cannot be continued as asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for leftover in (*folder.glob("*.part"), *folder.glob("snapshots/*.part")):
            leftover.unlink()
        if args.fresh:
            remove_records(folder)
        checkpoint = read_checkpoint(folder, {config.script(): type(config)})
        if checkpoint is None:
            if (folder / "metrics.csv").exists():
                raise InputError(
                    f"{folder} holds a run's records without its checkpoint.pt, so that it cannot continue; "
                    "start over with --fresh, or use another --runs-dir"
                )
            record = Record(config, new_conditions(config, args, data_source))
        else:
            record = checkpoint["record"]
            if (record.config, record.conditions.data_source) != (config, data_source):
                raise InputError(f"{folder} holds another experiment; --fresh starts over, or use another --runs-dir")
            conditions = continued_conditions(folder, record.conditions, args)
            epochs = max(args.epochs, len(checkpoint["history"]))
            record = record._replace(conditions=replace(conditions, epochs=epochs))
        run = Run(folder, record._replace(diverged=diverged_before(folder)), checkpoint)
        del checkpoint
        yield run
        run.let_go()


def diverged_before(folder):
    """Return the epoch in which the last attempt to train a run diverged, None where it did not or nothing is known."""
    try:
        return json.loads((folder / "config.json").read_text()).get("diverged")
    except (OSError, ValueError, AttributeError):
        return None


def train_one(config, data, train, args, alone):
    """Train an experiment up to --epochs, from where its run's folder stands; return its Run.

    train: the script's; alone: no other experiment was asked for, else one that diverged is told and the rest goes on.
    """
    folder = run_folder(args.runs_dir, config, data.source)
    quiet = redirect_stdout(io.StringIO()) if processes() > 1 else nullcontext()
    with quiet, opened_run(folder, config, args, data.source) as run:
        if run.epoch >= run.record.conditions.epochs:
            print(f"{folder}: complete with {run.epoch} epochs; a larger --epochs extends it, --fresh starts over")
        elif run.diverged and not alone:
            print(f"{folder}: diverged in epoch {run.diverged}; --fresh starts over")
        else:
            torch.set_num_threads(run.record.conditions.threads)
            torch.manual_seed(config.seed)
            try:
                seen = permuted(data) if config.pixels == "permuted" else data
                train(config, run, seen.to(run.device))
            except TrainingError as error:
                run.record_divergence()
                kept = f"the checkpoint of epoch {run.epoch} is kept" if run.epoch else "no epoch was finished"
                where = f"in epoch {run.epoch + 1} at learning rate {number_text(config.lr)}"
                message = f"{error} {where}; {kept}; try a smaller --lr"
                if alone:
                    raise TrainingError(message) from None
                print(f"{folder}: {message}", file=sys.stderr)
    if processes() > 1 and run.has_grown:
        print(f"{folder}: {run.history[-1]['test_accuracy']:.2f} % after epoch {run.epoch}", flush=True)
    return run


def has_ended(config, args):
    """Whether an experiment's folder says, whoever trained it, that it is complete or that it diverged."""
    sources = ("real", "synthetic") if args.data == "auto" else (args.data,)
    folders = [run_folder(args.runs_dir, config, source) for source in sources]
    with suppress(InputError):
        return any(len(read_metrics(each)) >= args.epochs or diverged_before(each) for each in folders)
    return False


def tell_progress(done, total, before, start):
    """Print how many runs of a list are done and, as the ones since start took, how long the rest will take.

    before: how many were done at the start, a time.monotonic().
    """
    left = ""
    if before < done < total:
        minutes = (time.monotonic() - start) / (done - before) * (total - done) / 60
        left = f", about {math.ceil(minutes)} min left"
    print(f"{done} of {total} runs done{left}", flush=True)


def work_through(configs, attempt, is_done):
    """Train a list of experiments; return their Runs in its order, and how many were refused, each with its reason.

    attempt(config) trains one and returns its Run; is_done(config): whether one that is left needs no more training.
    What other processes train is left to them; the first process waits for that, and takes it over should they die.
    """
    left, runs, refused, is_announced = dict(enumerate(configs)), {}, 0, False

    def done():
        return len(runs) + sum(map(is_done, left.values()))

    start, before = time.monotonic(), done()
    if is_first():
        tell_progress(before, len(configs), before, start)
    while left:
        left_before = len(left)
        for number, config in list(left.items()):
            try:
                runs[number] = attempt(config)
            except LockedError:
                continue
            except InputError as error:
                refused += 1
                print(f"error: {error}", file=sys.stderr)
            del left[number]
            if number in runs and runs[number].has_grown:
                tell_progress(done(), len(configs), before, start)
        if len(left) == left_before:  # other processes train all that is left
            if not is_first():
                break
            if not is_announced:
                print(f"waiting for what other processes train, {len(left)} of {len(configs)} runs", flush=True)
            is_announced = True
            time.sleep(1)
    return [run for _, run in sorted(runs.items())], refused


def run_experiments(configs, train, args, report):
    """Train experiments in their run folders; say how they ended and what to type next."""
    args.threads, alone = share_of_cores(), len(configs) == 1

    @cache
    def data(name):
        loaded = load_data(name, args.data, args.data_dir)
        if loaded.source == "synthetic":
            say_once(synthetic_notice(name))
        return loaded

    def attempt(config):
        return train_one(config, data(config.dataset), train, args, alone)

    def is_done(config):
        return not args.fresh and has_ended(config, args)

    runs, refused = ([attempt(configs[0])], 0) if alone else work_through(configs, attempt, is_done)
    if runs and is_first():
        print_results(runs, min(args.epochs, REPORT_EPOCHS) if args.report else args.epochs, report)
        for name in {run.config.dataset: run for run in runs if run.record.conditions.data_source == "synthetic"}:
            print(synthetic_notice(name))
        print(f"\nNext:\n  tensorboard --logdir {curves_folder(runs)}")
        print(f"  python visualize.py {runs[0].folder if alone else args.runs_dir}")
        if len(runs) > len(group_by_setting(runs)):
            means = Path(args.runs_dir, "comparison", "tensorboard", runs[0].config.script())
            print(f"  tensorboard --logdir {means}  (after it: the means over seeds)")
    if refused and is_first():  # another process that failed would end them all
        raise InputError(f"{refused} of {len(configs)} runs could not be trained, for the reasons given above")


def curves_folder(runs, most=40):
    """Return the folder to open in TensorBoard, which shows no curve at first when it finds more than 40 runs."""
    below = len(list(runs[0].folder.parent.glob("*/events.out.tfevents.*")))
    return runs[0].folder.parent if below <= most else runs[0].folder


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, and with errors of one line that name the nearest flag to a mistyped one."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            nearest = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags and their values\n")


def folder_name(text):
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return text


def experiment_parser(config_class, description):
    """Return a training script's parser: a flag for each field of its Config, and the flags that both scripts share.

    A flag of Config that was not typed is None.
    """
    parser = ArgumentParser(description)
    flag = parser.add_argument
    for one in settings_of(config_class):
        metavar = f"{{{','.join(one.choices)}}}" if one.choices else one.kind.__name__.upper()
        text = (
            one.help if one.default is None else f"{one.help}; default: {number_text(one.default)}".removeprefix("; ")
        )
        flag(one.flag, nargs="+", type=one.parse, metavar=metavar, help=text.replace("%", "%%"))
    conditions = {one.name: one for one in settings_of(Conditions)}
    epochs, sources, devices = (conditions[name] for name in ("epochs", "data_source", "device"))
    flag(
        "--epochs", type=epochs.parse, default=epochs.default, metavar="INT", help=f"in all; default: {epochs.default}"
    )
    real_first = "auto: the real set if it is there or can be downloaded, else the embedded one; default: auto"
    flag("--data", choices=("auto", *sources.choices), default="auto", help=real_first)
    flag("--data-dir", type=folder_name, default="data", help="where the real sets lie or shall lie; default: data")
    flag("--runs-dir", type=folder_name, default="runs", help="where the run's folder is made; default: runs")
    flag("--device", choices=("auto", *devices.choices), default="auto", help="default: auto")
    if len(config_class.precisions) > 1:
        native = f"auto: {config_class.precisions[0]} where the hardware multiplies it natively; default: auto"
        flag("--precision", choices=("auto", *config_class.precisions), default="auto", help=native)
    flag("--report", action="store_true", help="run the reference report's experiments, for each --seed")
    flag("--fresh", action="store_true", help="start over instead of continuing the run's folder")
    return parser


def parse_experiments(config_class, report, parser):
    """Return a training script's parsed command line and the Configs that it asks for, no two alike.

    With --report that is the report's list, else every combination of the flags' values; a setting that needs a value
    of another one, as momentum needs SGD, stays at its default without it.
    """
    args = parser.parse_args()
    settings = settings_of(config_class)
    typed = {one.name: values for one in settings if (values := getattr(args, one.name)) is not None}
    if args.report and typed.keys() - {"seed"}:
        name = next(one for one in settings if one.name in typed and one.name != "seed").flag
        parser.error(f"argument --report: brings its own settings; leave out {name}")
    if args.fresh and processes() > 1:
        parser.error("argument --fresh: several processes cannot start over together; delete the run folders instead")
    grid = {one.name: typed.get(one.name, [one.default]) for one in settings}
    for one in settings:
        if one.only and one.only[1] not in grid[one.only[0]] and grid[one.name] != [one.default]:
            needed = f"--{one.only[0].replace('_', '-')} {one.only[1]}"
            value = next(value for value in grid[one.name] if value != one.default)
            parser.error(f"argument {one.flag}: {number_text(value)} needs {needed}")
    if args.report:
        configs = [replace(row.config, seed=seed) for seed in grid["seed"] for row in report]
    else:
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        configs = [config_class(**without_unfit(settings, chosen)) for chosen in combinations]
    return args, list(dict.fromkeys(configs))


def without_unfit(settings, chosen):
    """Return chosen values by setting, those that need another setting's value at their default without it."""
    unfit = {one.name: one.default for one in settings if one.only and chosen[one.only[0]] != one.only[1]}
    return {**chosen, **unfit}


def main(config_class, train, report):
    """Be a training script: train the experiments that its command line asks for.

    config_class: its Config; train(config, run, data) trains one of them; report: its list of Reported.
    """

    def work():
        parser = experiment_parser(config_class, sys.modules[config_class.__module__].__doc__)
        args, configs = parse_experiments(config_class, report, parser)
        run_experiments(configs, train, args, report)

    run_script(work)
