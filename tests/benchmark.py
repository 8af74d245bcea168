"""Time the suite against a standard PyTorch pipeline on the same real data, and print medians and ratios.

    python tests/benchmark.py                  everything, about fifteen minutes on two cores
    python tests/benchmark.py cnn rnn          only these: cnn rnn report start memory figures logging
    python tests/benchmark.py --repeats 5      medians of five measurements (default: 3)

The standard pipeline applies torchvision's transforms to one PIL image at a time, and uses a DataLoader (with two
workers for CIFAR-10, without any for MNIST), fp32 and Adam. The suite is measured by calling its scripts. The lower
bound for LeNet-5 is the time that the multiplications and additions of an epoch would take at the rate of a
2048 x 2048 matrix product in the same precision; the backward pass counts as twice the forward pass.

The data sets must be in data/.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnn_cifar10
import rnn_mnist
import utils

ROOT = Path(utils.__file__).parent
ONE_EPOCH = ("--data", "real", "--epochs", "1")


def run_script(*command):
    """Run a Python command in the project's folder; return the seconds it took and its peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def seconds_of(*command):
    return run_script(*command)[0]


def megabytes_of(*command):
    return run_script(*command)[1]


def medians_in_turn(repeats, measurements):
    """Return the median of each measurement, a dict by name; they are repeated in turn, not one after the other.

    measurements: functions that return a number, by name.
    """
    values = {name: [] for name in measurements}
    for _ in range(repeats):
        for name, measure in measurements.items():
            values[name].append(measure())
    return {name: statistics.median(numbers) for name, numbers in values.items()}


# An epoch of training ------------------------------------------------------------------------------------------------


class StandardReader(nn.Module):
    """The recurrent network that reads images row by row, as most would write it."""

    def __init__(self, cell, hidden_size=30):
        super().__init__()
        self.recurrent = cell(28, hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden_size, 10)

    def forward(self, inputs):
        outputs, _ = self.recurrent(inputs.squeeze(1))
        return self.fc(outputs[:, -1])


def standard_lenet5():
    convolutions = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 10))


def standard_cifar10():
    transform = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    return datasets.CIFAR10(ROOT / "data", train=True, transform=transform)


def standard_mnist():
    normalize = transforms.Normalize((rnn_mnist.PIXEL_MEAN,), (rnn_mnist.PIXEL_STD,))
    transform = transforms.Compose([transforms.ToTensor(), normalize])
    return datasets.MNIST(ROOT / "data", train=True, transform=transform)


def standard_epoch(model, images, batch_size, workers, lr):
    """Train a model for an epoch with the standard pipeline; return the seconds."""
    loader = DataLoader(images, batch_size, shuffle=True, num_workers=workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    start = time.perf_counter()
    for inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return time.perf_counter() - start


def suite_epoch(script, *flags):
    """Train for an epoch with a script of the suite; return the seconds of training, from metrics.csv."""
    with tempfile.TemporaryDirectory() as folder:
        run_script(script, *ONE_EPOCH, "--runs-dir", folder, *flags)
        [path] = Path(folder).rglob("metrics.csv")
        return float(path.read_text().split(",")[-1])  # of the last epoch


def matrix_product_rate(dtype, size=2048):
    """Return the number of operations a second in a product of two size x size matrices."""
    matrix = torch.randn(size, size).to(dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def lenet5_lower_bound(precision, images=50_000):
    """Return the seconds that the operations of an epoch take at the rate of a matrix product."""
    model = cnn_cifar10.LeNet5(cnn_cifar10.Config())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, 32))
    operations = 3 * images * counter.get_total_flops()
    return operations / matrix_product_rate(torch.bfloat16 if precision == "bf16" else torch.float32)


def cnn(repeats):
    """Time an epoch of LeNet-5 on CIFAR-10."""
    measurements = {"standard": partial(standard_epoch, standard_lenet5(), standard_cifar10(), 128, 2, 1e-4)}
    for precision in ("bf16", "fp32"):
        measurements[precision] = partial(suite_epoch, "cnn_cifar10.py", "--precision", precision)
    seconds = medians_in_turn(repeats, measurements)
    print("| LeNet-5, an epoch of CIFAR-10 | seconds | times as fast | lower bound / time |\n|---|---:|---:|---:|")
    print(f"| standard pipeline, fp32 | {seconds['standard']:.1f} | 1 | |")
    for precision in ("bf16", "fp32"):
        ratio = seconds["standard"] / seconds[precision]
        share = 100 * lenet5_lower_bound(precision) / seconds[precision]
        print(f"| suite, {precision} | {seconds[precision]:.1f} | {ratio:.2f} | {share:.0f} % |")


def rnn(repeats):
    """Time an epoch of each recurrent network with 30 hidden units on MNIST."""
    images = standard_mnist()
    print("| 30 hidden units, an epoch of MNIST | standard, s | suite, s | times as fast |\n|---|---:|---:|---:|")
    for name, cell in rnn_mnist.CELLS.items():
        standard = partial(standard_epoch, StandardReader(cell), images, 64, 0, 1e-3)
        suite = partial(suite_epoch, "rnn_mnist.py", "--cell", name)
        seconds = medians_in_turn(repeats, {"standard": standard, "suite": suite})
        ratio = seconds["standard"] / seconds["suite"]
        print(f"| {name.upper()} | {seconds['standard']:.1f} | {seconds['suite']:.1f} | {ratio:.2f} |")


def report(repeats):
    """Time rnn_mnist.py --report with two processes of torchrun once; estimate the standard pipeline's time for it."""
    images = standard_mnist()
    standard = 0
    for config in (reported.config for reported in rnn_mnist.REPORT):
        model = StandardReader(rnn_mnist.CELLS[config.cell], config.hidden_size)
        standard += utils.REPORT_EPOCHS * standard_epoch(model, images, 64, 0, config.lr)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("rnn_mnist.py", "--report", "--data", "real", "--runs-dir", folder)
        suite = seconds_of("-m", "torch.distributed.run", "--nproc-per-node=2", *flags)
    print("| rnn_mnist.py --report, one seed | minutes |\n|---|---:|")
    print(f"| standard pipeline, one run after the other, estimated from an epoch of each | {standard / 60:.1f} |")
    print(f"| suite, two processes of torchrun | {suite / 60:.1f} |\n| times as fast | {standard / suite:.2f} |")


# Start, memory, figures and logging ----------------------------------------------------------------------------------

TRAINING_SCRIPTS = ("cnn_cifar10.py", "rnn_mnist.py")


def seconds_to_first_step(script):
    """Return the seconds until the head of the table is printed, just before the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, script, *ONE_EPOCH, "--runs-dir", folder]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if line.split()[:1] == ["epoch"])
        seconds = time.perf_counter() - start
        process.kill()
        process.communicate()
    return seconds


def start(repeats):
    """Time how long the scripts take to start, beside the import of torch."""
    measurements = {"import torch": partial(seconds_of, "-c", "import torch")}
    for script in TRAINING_SCRIPTS:
        measurements[f"{script} to its first training step"] = partial(seconds_to_first_step, script)
    for script in (*TRAINING_SCRIPTS, "visualize.py"):
        measurements[f"{script} --help"] = partial(seconds_of, script, "--help")
    seconds = medians_in_turn(repeats, measurements)
    print("| time to start | seconds | more than `import torch` |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {value - seconds['import torch']:.1f} |")


def memory(repeats):
    """Measure the peak memory of an epoch of each script, beside that of its imports."""
    imports = "import torch, torchvision; from torch.utils.tensorboard import SummaryWriter"
    measurements = {"imports": partial(megabytes_of, "-c", imports)}
    with tempfile.TemporaryDirectory() as folder:
        for script in TRAINING_SCRIPTS:
            flags = (*ONE_EPOCH, "--fresh", "--runs-dir", folder)
            measurements[f"{script}, one epoch"] = partial(megabytes_of, script, *flags)
        megabytes = medians_in_turn(repeats, measurements)
    print("| peak memory | MB | more than the imports |\n|---|---:|---:|")
    for name, value in megabytes.items():
        print(f"| {name} | {value:.0f} | {value - megabytes['imports']:.0f} |")


def figures(repeats):
    """Time the figures of a CNN run, all of them and four fast ones."""
    four = ("filters", "activations", "curves", "confusion")
    with tempfile.TemporaryDirectory() as folder:
        run_script("cnn_cifar10.py", *ONE_EPOCH, "--runs-dir", folder)
        [run] = Path(folder, "cnn_cifar10").iterdir()
        all_figures = partial(seconds_of, "visualize.py", run)
        four_figures = partial(seconds_of, "visualize.py", run, "--figures", *four)
        seconds = medians_in_turn(repeats, {"all": all_figures, " ".join(four): four_figures})
    print("| figures of a CNN run | seconds |\n|---|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} |")


def logging(repeats):
    """Measure which share of a default CNN run is spent on its records rather than on training and evaluation."""
    seconds = []

    def timed(function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    with tempfile.TemporaryDirectory() as folder:
        flags = ["cnn_cifar10.py", "--data", "real", "--epochs", str(repeats), "--runs-dir", folder]
        with (
            mock.patch.object(sys, "argv", flags),
            mock.patch.object(utils.Run, "resume", timed(utils.Run.resume)),
            mock.patch.object(utils.Run, "finish", timed(utils.Run.finish)),
            mock.patch.object(cnn_cifar10, "log_convolutions", timed(cnn_cifar10.log_convolutions)),
            suppress(SystemExit),
        ):
            start = time.perf_counter()
            utils.main(cnn_cifar10.Config, cnn_cifar10.train, cnn_cifar10.REPORT, "")
        total = time.perf_counter() - start
    share = 100 * sum(seconds) / total
    print(f"TensorBoard, checkpoints, snapshots and metrics take {share:.1f} % of {repeats} epochs of the CNN.")


MEASUREMENTS = {function.__name__: function for function in (cnn, rnn, report, start, memory, figures, logging)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []], metavar="NAME", help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="number of measurements (default: 3)")
    args = parser.parse_args()
    for name in args.names or MEASUREMENTS:
        MEASUREMENTS[name](args.repeats)
        print(flush=True)


if __name__ == "__main__":
    main()
