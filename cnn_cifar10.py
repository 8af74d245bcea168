"""Train LeNet-5 on grayscale CIFAR-10, or on MNIST.

    python cnn_cifar10.py                           Adam at 1e-4 on CIFAR-10, the reference report's best setting
    python cnn_cifar10.py --optimizer sgd           the same with SGD
    python cnn_cifar10.py --dataset mnist           the network that rnn_mnist.py's are compared with
    python cnn_cifar10.py --without conv1           the network trained without a layer
    python cnn_cifar10.py --dataset mnist --pixels permuted    with the pixels of all images in one random order
    python cnn_cifar10.py --report                  all the report's experiments, then a table
    python cnn_cifar10.py --lr 1e-3 1e-4 --seed 0 1 2    every combination of the values
    python cnn_cifar10.py --data synthetic          on embedded patterns, where there is neither data nor network

The run's folder, runs/cnn_cifar10/..., gets TensorBoard's events, metrics.csv, the checkpoint and the convolution
weights after every epoch.
"""

from collections import OrderedDict
from dataclasses import dataclass

import utils
from utils import DATASETS, Metrics, Reported, evaluate, main, make_optimizer, setting

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config(utils.Config):
    """The settings of an experiment; pixels, optimizer, momentum and seed are those of utils.Config."""

    dataset: str = setting("cifar10", choices=tuple(DATASETS), tag="_", words="", help="what the network classifies")
    without: str = setting(
        "nothing",
        choices=("nothing", "conv1", "conv2", "fc1", "conv1+conv2"),
        tag="_no-",
        words="without {}",
        help="layers that the network is trained without; the poolings stay",
    )
    lr: float = 1e-4
    batch_size: int = 128

    script = "cnn_cifar10"
    precisions = ("bf16", "fp32")

    @property
    def network(self):
        return f"LeNet-5 on {DATASETS[self.dataset].words}"


class Flatten(nn.Module):
    """Turn maps (N, C, H, W) into (N, H * W * C): in the order in which they lie in memory, so nothing is copied."""

    def forward(self, maps):
        return maps.movedim(1, -1).flatten(1)


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions, each max-pooled by 2 and rectified, and two fully connected layers.

    Pooling before ReLU is the same function as after it, and leaves ReLU a quarter of the work.
    precision: 'bf16' or 'fp32', in which the layers compute.
    """

    def __init__(self, config, precision="fp32", classes=10):
        super().__init__()
        self.precision = precision
        layers, channels, size = OrderedDict(), 1, DATASETS[config.dataset].size
        for number, maps in enumerate((32, 64), start=1):
            if f"conv{number}" not in config.without:
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
        layers["fc2"] = nn.Linear(features, classes)
        self.layers = nn.Sequential(layers).to(memory_format=torch.channels_last)

    def forward(self, images):
        """Turn images (N, H, W) of gray values 0 to 255 into logits, float32 (N, classes)."""
        *_, logits = self.outputs(images).values()
        return logits.float()

    def outputs(self, images):
        """Return what each layer makes of images (N, H, W) of gray values 0 to 255, by the layer's name, in order."""
        maps, outputs = images.unsqueeze(1).float().div(255), {}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for name, layer in self.layers.named_children():
                maps = outputs[name] = layer(maps)
        return outputs


def train(config, run, data):
    """Train an experiment in its run's folder on data, a Dataset, from where the run stands.

    torch is seeded with config.seed.
    """
    model = LeNet5(config, run.precision).to(run.device)
    optimizer = make_optimizer(model, config)
    run.resume(model=model, optimizer=optimizer)
    if run.epoch == 0:
        run.writer.add_graph(model, data.test.images[:1])
        log_convolutions(run, model.eval(), data, epoch=0)
    for epoch in run.epochs():
        model.train()
        seen = Metrics()
        for images, labels in run.batches(data.train, epoch):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.add(loss, logits, labels)
        model.eval()
        test = evaluate(model, data.test)
        log_convolutions(run, model, data, epoch)
        run.finish(epoch, seen.score(), test)


@torch.no_grad()
def log_convolutions(run, model, data, epoch):
    """Write the first convolution's kernels and all activations to TensorBoard, and all their weights to a snapshot."""
    from torchvision.utils import make_grid

    outputs = model.outputs(data.test.images[:100])
    for name, layer in model.layers.named_children():
        if isinstance(layer, nn.Conv2d):
            run.writer.add_histogram(f"{name}/activations", outputs[name].float().relu(), epoch)
            if layer.in_channels == 1:
                limit = layer.weight.abs().max().item()
                grid = make_grid(layer.weight, padding=1, normalize=True, value_range=(-limit, limit), pad_value=1)
                run.writer.add_image(f"{name}/filters", F.interpolate(grid[None], scale_factor=10)[0], epoch)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("layers.conv")}
    run.save_snapshot(epoch, weights)


# The reference report's experiments, with the test accuracy in percent that it gives after ten epochs.
REPORT = [
    Reported(Config(lr=1e-4), 61.3),
    Reported(Config(lr=1e-4, optimizer="sgd"), 11.33),
    Reported(Config(lr=1e-3), None, "only 'similar to 1e-4'"),
    Reported(Config(lr=1e-4, dataset="mnist"), 98.5, "by a CNN of another design"),
]


if __name__ == "__main__":
    main(Config, train, REPORT, __doc__)
