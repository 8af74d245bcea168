"""Time the suite against the usual pipeline, in turn on the same real data, and print medians and ratios.

    python tests/benchmark.py                  everything, about fifteen minutes on two cores
    python tests/benchmark.py cnn rnn          only these: cnn rnn report start memory figures logging
    python tests/benchmark.py --repeats 5      medians of five; default: 3

The usual pipeline: torchvision's transforms on one PIL image after the other, a DataLoader (two workers for CIFAR-10,
none for MNIST), fp32, plain Adam. The suite: its scripts, started as a user starts them. The floor: the training step's
multiply-adds, two operations each and the backward pass counted as twice the forward pass, at the rate of a
2048 x 2048 matrix product in the same precision. The data sets must lie in data/.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
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

# ---------------------------------------------------------------------------------------------------------------------
# An epoch of training
# ---------------------------------------------------------------------------------------------------------------------


class UsualReader(nn.Module):
    """The row-reading network as most would write it."""

    def __init__(self, cell, hidden_size=30):
        super().__init__()
        self.recurrent = cell(28, hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden_size, 10)

    def forward(self, inputs):
        outputs, _ = self.recurrent(inputs.squeeze(1))
        return self.fc(outputs[:, -1])


def usual_lenet5():
    convolutions = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 10))


def usual_epochs(images, batch_size, workers, model, lr):
    """Yield the seconds of one epoch of training after the other."""
    loader = DataLoader(images, batch_size, shuffle=True, num_workers=workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    while True:
        start = time.perf_counter()
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        yield time.perf_counter() - start


def suite_epochs(script, *flags):
    """Yield the training seconds of one run of one epoch after the other."""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            run_script(script, "--data", "real", "--epochs", "1", "--runs-dir", folder, *flags)
            (metrics,) = Path(folder).rglob("metrics.csv")
            yield float(utils.read_table(metrics)[-1]["seconds"])


def in_turn(repeats, contestants):
    """Return the median of each contestant's seconds (by name), each run once in every round."""
    seconds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, values in contestants.items():
            seconds[name].append(next(values))
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_product_rate(dtype, size=2048):
    """Return the operations a second of a size x size matrix product."""
    matrix, seconds = torch.randn(size, size).to(dtype), []
    for _ in range(12):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def lenet5_floor(precision, images=50_000):
    """Return the seconds that an epoch's multiply-adds take at the rate of a matrix product."""
    model = cnn_cifar10.LeNet5(cnn_cifar10.Config())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, 32))
    operations = 3 * images * counter.get_total_flops()
    return operations / matrix_product_rate(torch.bfloat16 if precision == "bf16" else torch.float32)


def cnn(repeats):
    images = datasets.CIFAR10(
        ROOT / "data", train=True, transform=transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    )
    contestants = {"usual": usual_epochs(images, 128, 2, usual_lenet5(), 1e-4)}
    for precision in ("bf16", "fp32"):
        contestants[precision] = suite_epochs("cnn_cifar10.py", "--precision", precision)
    seconds = in_turn(repeats, contestants)
    print("| LeNet-5, an epoch of CIFAR-10 | seconds | times as fast | floor / time |\n|---|---:|---:|---:|")
    print(f"| usual pipeline, fp32 | {seconds['usual']:.1f} | 1 | |")
    for precision in ("bf16", "fp32"):
        ratio, share = seconds["usual"] / seconds[precision], 100 * lenet5_floor(precision) / seconds[precision]
        print(f"| suite, {precision} | {seconds[precision]:.1f} | {ratio:.2f} | {share:.0f} % |")


def usual_digits():
    normalise = transforms.Normalize((utils.DATASETS["mnist"].mean,), (utils.DATASETS["mnist"].std,))
    return datasets.MNIST(ROOT / "data", train=True, transform=transforms.Compose([transforms.ToTensor(), normalise]))


def rnn(repeats):
    images = usual_digits()
    print("| 30 hidden units, an epoch of MNIST | usual, s | suite, s | times as fast |\n|---|---:|---:|---:|")
    for name, cell in rnn_mnist.CELLS.items():
        usual = usual_epochs(images, 64, 0, UsualReader(cell), 1e-3)
        seconds = in_turn(repeats, {"usual": usual, "suite": suite_epochs("rnn_mnist.py", "--cell", name)})
        ratio = seconds["usual"] / seconds["suite"]
        print(f"| {name.upper()} | {seconds['usual']:.1f} | {seconds['suite']:.1f} | {ratio:.2f} |")


def report(repeats):
    """Time rnn_mnist.py --report under torchrun, once, and the same experiments one after the other as usual."""
    images, usual = usual_digits(), 0
    for config in (row.config for row in rnn_mnist.REPORT):
        model = UsualReader(rnn_mnist.CELLS[config.cell], config.hidden_size)
        usual += utils.REPORT_EPOCHS * next(usual_epochs(images, 64, 0, model, config.lr))
    with tempfile.TemporaryDirectory() as folder:
        flags = ("rnn_mnist.py", "--report", "--data", "real", "--runs-dir", folder)
        suite, _ = run_script("-m", "torch.distributed.run", "--nproc-per-node=2", *flags)
    print("| rnn_mnist.py --report, one seed | minutes |\n|---|---:|")
    print(f"| usual pipeline, one after the other, from one epoch of each | {usual / 60:.1f} |")
    print(f"| torchrun with two processes | {suite / 60:.1f} |\n| times as fast | {usual / suite:.2f} |")


# ---------------------------------------------------------------------------------------------------------------------
# Start, memory, figures, logging
# ---------------------------------------------------------------------------------------------------------------------

TRAINED = {"cnn_cifar10.py": ("--data", "real", "--epochs", "1"), "rnn_mnist.py": ("--data", "real", "--epochs", "1")}


def run_script(*command):
    """Run a Python command in the project's folder; return (seconds, peak memory in MB)."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def repeated(measure):
    while True:
        yield measure()


def seconds_to_first_step(script):
    """Return the seconds from the command to the table's head, which is printed just before the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, script, *TRAINED[script], "--runs-dir", folder]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if line.startswith("epoch "))
        seconds = time.perf_counter() - start
        process.kill()
        process.communicate()
    return seconds


def start(repeats):
    contestants = {"import torch alone": repeated(lambda: run_script("-c", "import torch")[0])}
    for script in TRAINED:
        contestants[f"{script} to its first training step"] = repeated(lambda name=script: seconds_to_first_step(name))
    for script in (*TRAINED, "visualize.py"):
        contestants[f"{script} --help"] = repeated(lambda name=script: run_script(name, "--help")[0])
    seconds = in_turn(repeats, contestants)
    alone = seconds["import torch alone"]
    print("| from the command | seconds | more than `import torch` |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {value - alone:.1f} |")


def memory(repeats):
    imports = "import torch, torchvision; from torch.utils.tensorboard import SummaryWriter"
    contestants = {"imports alone": repeated(lambda: run_script("-c", imports)[1])}
    with tempfile.TemporaryDirectory() as folder:
        for script, flags in TRAINED.items():
            command = (script, *flags, "--fresh", "--runs-dir", folder)
            contestants[f"{script}, one epoch"] = repeated(lambda command=command: run_script(*command)[1])
        megabytes = in_turn(repeats, contestants)
    print("| peak memory | MB | more than the imports |\n|---|---:|---:|")
    for name, value in megabytes.items():
        print(f"| {name} | {value:.0f} | {value - megabytes['imports alone']:.0f} |")


def figures(repeats):
    four = ("filters", "activations", "curves", "confusion")
    with tempfile.TemporaryDirectory() as folder:
        run_script("cnn_cifar10.py", *TRAINED["cnn_cifar10.py"], "--runs-dir", folder)
        (run,) = Path(folder, "cnn_cifar10").iterdir()
        contestants = {
            "all": repeated(lambda: run_script("visualize.py", run)[0]),
            " ".join(four): repeated(lambda: run_script("visualize.py", run, "--figures", *four)[0]),
        }
        seconds = in_turn(repeats, contestants)
    print("| figures of a CNN run | seconds |\n|---|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} |")


def logging(repeats):
    """Time what keeps the records of a default CNN run, beside its training and evaluation."""
    keeping = []

    def timed(function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            keeping.append(time.perf_counter() - start)
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
        whole = time.perf_counter() - start
    print(
        f"TensorBoard, checkpoints, snapshots and metrics: {100 * sum(keeping) / whole:.1f} % of {repeats} CNN epochs"
    )


MEASUREMENTS = {function.__name__: function for function in (cnn, rnn, report, start, memory, figures, logging)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for name in args.names or MEASUREMENTS:
        MEASUREMENTS[name](args.repeats)
        print(flush=True)


if __name__ == "__main__":
    main()
