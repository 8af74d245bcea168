"""Train LeNet-5 on grayscale CIFAR-10, or on MNIST.

    python cnn_cifar10.py                           Adam at 1e-4 on CIFAR-10, the reference report's best setting
    python cnn_cifar10.py --optimizer sgd           the same with SGD
    python cnn_cifar10.py --dataset mnist           the network that rnn_mnist.py's are compared with
    python cnn_cifar10.py --report                  all the report's experiments, then a table
    python cnn_cifar10.py --lr 1e-3 1e-4 --seed 0 1 2    every combination of the values
    python cnn_cifar10.py --data synthetic          on embedded pictures, where there is neither data nor network

The run's folder, runs/cnn_cifar10/..., gets TensorBoard's events, metrics.csv, the checkpoint and the convolution
weights after every epoch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import Classifier, Experiment, experiment_parser, parse_experiments, run_experiments, run_script


class LeNet5(Classifier):
    """Two 5 x 5 convolutions, each rectified and max-pooled by 2, and two fully connected layers.

    image_size: height and width of the square grayscale images in pixels, a multiple of 4.
    """

    def __init__(self, image_size=32, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.fc1 = nn.Linear(64 * (image_size // 4) ** 2, 1024)
        self.fc2 = nn.Linear(1024, classes)
        self.to(memory_format=torch.channels_last)

    def prepare(self, images):
        """Turn uint8 images (N, H, W) into float32 (N, 1, H, W), scaled to [0, 1]."""
        return images.unsqueeze(1).float().div(255)

    def forward(self, inputs):
        """Turn images (N, 1, H, W) into logits (N, classes)."""
        # Pooling before ReLU is the same function as after it, and leaves ReLU a quarter of the work.
        maps = F.relu(F.max_pool2d(self.conv1(inputs), 2))
        maps = F.relu(F.max_pool2d(self.conv2(maps), 2))
        return self.fc2(self.hidden(maps))

    def hidden(self, maps):
        """Turn the second pooling's maps (N, 64, H / 4, W / 4) into fc1's activations after ReLU (N, 1024)."""
        features = maps.movedim(1, -1).flatten(1)  # channels last, as the maps lie in memory: nothing is copied
        return F.relu(self.fc1(features))

    def activations(self, inputs):
        """Return both convolution layers' activations after ReLU: (N, 32, H, W) and (N, 64, H / 2, W / 2)."""
        conv1 = F.relu(self.conv1(inputs))
        conv2 = F.relu(self.conv2(F.max_pool2d(conv1, 2)))
        return {"conv1": conv1, "conv2": conv2}


# The reference report's experiments, with the test accuracy in percent that it gives after ten epochs.
COMMON = {"momentum": 0.0, "batch_size": 128}
EXPERIMENTS = [
    Experiment({"dataset": "cifar10", "optimizer": "adam", "lr": 1e-4, **COMMON}, 61.3),
    Experiment({"dataset": "cifar10", "optimizer": "sgd", "lr": 1e-4, **COMMON}, 11.33),
    Experiment({"dataset": "cifar10", "optimizer": "adam", "lr": 1e-3, **COMMON}, None, "only 'similar to 1e-4'"),
    Experiment({"dataset": "mnist", "optimizer": "adam", "lr": 1e-4, **COMMON}, 98.5, "by a CNN of another design"),
]


def build_model(config):
    return LeNet5(image_size=32 if config["dataset"] == "cifar10" else 28)


@torch.no_grad()
def log_convolutions(run, model, data, epoch):
    """Write conv1's filters and both layers' activations to TensorBoard, and the convolution weights to a snapshot."""
    kernels = model.conv1.weight.float()
    tiles = F.pad(0.5 + 0.5 * kernels / kernels.abs().max(), (0, 1, 0, 1), value=1.0)  # (32, 1, 6, 6)
    grid = tiles.view(4, 8, 6, 6).permute(0, 2, 1, 3).reshape(1, 24, 48)
    run.writer.add_image("conv1/filters", F.interpolate(grid[None], scale_factor=10)[0], epoch)
    for layer, maps in model.activations(model.prepare(data.test_images[:100])).items():
        run.writer.add_histogram(f"{layer}/activations", maps, epoch)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("conv")}
    run.save_snapshot(epoch, weights)


def main():
    parser = experiment_parser(__doc__, lr=1e-4, batch_size=128)
    parser.add_argument(
        "--dataset", nargs="+", choices=("cifar10", "mnist"), default=["cifar10"], help="default: cifar10"
    )
    args = parse_experiments("cnn_cifar10", parser)
    run_experiments("cnn_cifar10", args, build_model, EXPERIMENTS, log_convolutions)


if __name__ == "__main__":
    run_script(main)
