"""Time an epoch of the CNN against the usual pipeline, in turn, on the same real images.

    python tests/benchmark.py [REPEATS]

The usual pipeline: torchvision's transforms on one PIL image after the other, a DataLoader with two workers, fp32 and
plain Adam. The suite: what cnn_cifar10.py does by default on this machine. Prints each epoch's training seconds, the
medians and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnn_cifar10
import utils

BATCH_SIZE, LEARNING_RATE = 128, 1e-4


class UsualLeNet5(nn.Sequential):
    """The same network as most would write it."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4096, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )


def usual_epochs():
    """Yield the seconds of one epoch after the other."""
    steps = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    images = datasets.CIFAR10("data", train=True, transform=steps)
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=2)
    model = UsualLeNet5()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    while True:
        start = time.perf_counter()
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        yield time.perf_counter() - start


def suite_epochs():
    """Yield the seconds of one epoch after the other."""
    data = utils.load_data("cifar10", "real", "data")
    args = SimpleNamespace(device="auto", precision="auto", epochs=1, data_dir="data")
    settings = {"dataset": "cifar10", "optimizer": "adam", "lr": LEARNING_RATE}
    config = utils.resolve_config("cnn_cifar10", args, settings, "real")
    data, model = data.to(config["device"]), cnn_cifar10.build_model(config).to(config["device"])
    optimizer = utils.make_optimizer(model, config)
    print(f"suite: {config['device']}, {config['precision']}, {config['threads']} threads")
    while True:
        start = time.perf_counter()
        order = utils.shuffled(len(data.train_images), seed=0, epoch=1).to(config["device"])
        arguments = (data.train_images, data.train_labels, order, BATCH_SIZE, config["precision"])
        utils.train_epoch(model, optimizer, *arguments)
        yield time.perf_counter() - start


def main():
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    pipelines = {"usual": usual_epochs(), "suite": suite_epochs()}
    seconds = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, epochs in pipelines.items():
            seconds[name].append(next(epochs))
            print(f"{name}: {seconds[name][-1]:.1f} s an epoch", flush=True)
    usual, suite = (statistics.median(values) for values in seconds.values())
    print(f"median: usual {usual:.1f} s, suite {suite:.1f} s: {usual / suite:.2f} times as fast")


if __name__ == "__main__":
    main()
