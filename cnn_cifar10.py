"""Train LeNet-5 on grayscale CIFAR-10, or on MNIST.

    python cnn_cifar10.py                           Adam with a learning rate of 1e-3
    python cnn_cifar10.py --lr 1e-4                 the learning rate of the reference report
    python cnn_cifar10.py --optimizer sgd           SGD instead of Adam
    python cnn_cifar10.py --dataset mnist           MNIST instead of CIFAR-10, to compare with rnn_mnist.py
    python cnn_cifar10.py --without conv1           train the network without a layer
    python cnn_cifar10.py --dataset mnist --pixels permuted    put the pixels of all images in one random order
    python cnn_cifar10.py --report                  train all experiments of the report, then print a table
    python cnn_cifar10.py --lr 1e-3 1e-4 --seed 0 1 2    train every combination of these values
    python cnn_cifar10.py --data synthetic          work offline, on a small built-in data set

The run's folder, runs/cnn_cifar10/NAME, holds TensorBoard's event files, metrics.csv, the checkpoint, and the weights
of the convolutions after every epoch.
"""

from collections import OrderedDict
from dataclasses import dataclass

import utils
from utils import DATASETS, Metrics, ReportedResult, evaluate, main, make_optimizer, setting

import torch
import torch.nn.functional as F
from torch import nn

REMOVABLE_LAYERS = ("conv1", "conv2", "fc1", "conv1+conv2")


@dataclass(frozen=True)
class Config(utils.Config):
    """The settings of an experiment. pixels, optimizer, lr, momentum and seed are inherited from utils.Config."""

    dataset: str = setting("cifar10", choices=tuple(DATASETS), prefix="_", caption="", help="data set")
    without: str = setting(
        "nothing",
        choices={"nothing": "all layers"} | {layers: f"without {layers}" for layers in REMOVABLE_LAYERS},
        prefix="_no-",
        caption="{}",
        help="layers that are left out of the network; the pooling layers stay",
    )
    batch_size: int = 128

    script = "cnn_cifar10"
    precisions = ("bf16", "fp32")

    @property
    def network(self):
        return f"LeNet-5 on {DATASETS[self.dataset].label}"


class Flatten(nn.Module):
    """Flatten feature maps (N, C, H, W) to (N, H * W * C): the order of channels-last memory, so nothing is copied."""

    def forward(self, maps):
        return maps.movedim(1, -1).flatten(1)


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions, each followed by 2 x 2 max pooling and ReLU, and two fully connected layers.

    Pooling before ReLU gives the same result as pooling after it, and leaves ReLU a quarter of the work.
    precision: 'bf16' or 'fp32', the number format in which the layers compute.
    """

    def __init__(self, config, precision="fp32"):
        super().__init__()
        self.precision = precision
        layers = OrderedDict()
        channels = 1
        size = DATASETS[config.dataset].size
        for number, maps in enumerate((32, 64), start=1):
            if f"conv{number}" not in config.without:  # which may be "conv1+conv2"
                layers[f"conv{number}"] = nn.Conv2d(channels, maps, kernel_size=5, padding=2)
                channels = maps
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            layers[f"relu{number}"] = nn.ReLU()
            size //= 2
        layers["flatten"] = Flatten()
        features = channels * size**2
        if "fc1" not in config.without:
            layers["fc1"] = nn.Linear(features, 1024)
            layers["relu_fc1"] = nn.ReLU()
            features = 1024
        layers["fc2"] = nn.Linear(features, 10)
        self.layers = nn.Sequential(layers).to(memory_format=torch.channels_last)

    def forward(self, images):
        """Return the logits, float32 (N, 10), of images (N, H, W) with gray values from 0 to 255."""
        return self.outputs(images)["fc2"].float()

    def outputs(self, images):
        """Return the output of every layer, by name and in order, for images (N, H, W) with gray values 0 to 255."""
        maps = images.unsqueeze(1).float().div(255)
        outputs = {}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for name, layer in self.layers.named_children():
                maps = layer(maps)
                outputs[name] = maps
        return outputs


def train(config, run, data):
    """Train one experiment on a utils.Dataset, continuing from run.epoch. utils.train_run has seeded torch."""
    model = LeNet5(config, run.precision).to(run.device)
    optimizer = make_optimizer(model, config)
    run.resume(model=model, optimizer=optimizer)
    if run.epoch == 0:
        run.writer.add_graph(model, data.test.images[:1])
        log_convolutions(run, model.eval(), data, epoch=0)
    for epoch in run.epochs():
        model.train()
        metrics = Metrics()
        for images, labels in run.batches(data.train, epoch):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics.update(loss, logits, labels)
        model.eval()
        test_score = evaluate(model, data.test)
        log_convolutions(run, model, data, epoch)
        run.finish(epoch, metrics.compute(), test_score)


@torch.no_grad()
def log_convolutions(run, model, data, epoch):
    """Log the first kernels and the activations of all convolutions to TensorBoard; save the weights as a snapshot."""
    from torchvision.utils import make_grid

    outputs = model.outputs(data.test.images[:100])
    for name, layer in model.layers.named_children():
        if isinstance(layer, nn.Conv2d):
            activations = outputs[name].float()
            positive = activations[activations > 0]  # ReLU sets the others to zero, which would hide these
            run.writer.add_scalar(f"Zeros_percent/{name}", 100 * (1 - len(positive) / activations.numel()), epoch)
            if len(positive):
                run.writer.add_histogram(f"{name}/positive_activations", positive, epoch)
            if layer.in_channels == 1:  # the first convolution
                largest = layer.weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
                scaled = layer.weight / largest  # one scale per kernel
                grid = make_grid(scaled, padding=1, normalize=True, value_range=(-1, 1), pad_value=1)
                run.writer.add_image(f"{name}/filters", F.interpolate(grid[None], scale_factor=10)[0], epoch)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("layers.conv")}
    run.save_snapshot(epoch, weights)


# The experiments of the reference report, with the test accuracy in percent that it gives after ten epochs.
REPORT = [
    ReportedResult(Config(lr=1e-4), 61.3),
    ReportedResult(Config(lr=1e-4, optimizer="sgd"), 11.33),
    ReportedResult(Config(lr=1e-3), None, "only 'similar to 1e-4'"),
    ReportedResult(Config(lr=1e-4, dataset="mnist"), 98.5, "by a CNN of another design"),
]


if __name__ == "__main__":
    main(Config, train, REPORT, __doc__)
