"""Train a two-layer RNN, GRU or LSTM on MNIST, each image read as 28 steps of 28 pixels, one row a step.

    python rnn_mnist.py                             plain RNN with 30 hidden units, Adam at 1e-3
    python rnn_mnist.py --cell gru                  or lstm
    python rnn_mnist.py --hidden-size 5 --lr 1e-1   any size and learning rate
    python rnn_mnist.py --report                    all the report's experiments, then a table
    python rnn_mnist.py --cell rnn gru lstm --seed 0 1 2    every combination of the values
    python rnn_mnist.py --data synthetic            on embedded digits, where there is neither data nor network

The run's folder, runs/rnn_mnist/..., gets TensorBoard's events, metrics.csv, the checkpoint and the weights after every
epoch.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

import utils
from utils import Metrics, Reported, evaluate, main, make_optimizer, setting

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


@dataclass(frozen=True)
class Config(utils.Config):
    """The settings of an experiment; optimizer, lr, momentum, batch_size and seed are those of utils.Config."""

    cell: str = setting("rnn", choices=tuple(CELLS), always=True, tag="", words="", help="kind of recurrent layer")
    hidden_size: int = setting(
        30, minimum=1, maximum=4096, always=True, tag="", words="{} hidden units", help="hidden units of each layer"
    )

    dataset = "mnist"

    @property
    def network(self):
        return self.cell.upper()

    @property
    def most_threads(self):
        # Threads that wait for each other at every small step gain little, and crawl beside another busy process.
        return 1 if self.hidden_size <= 64 else None


class RowReader(nn.Module):
    """Two recurrent layers that read an image row by row; the last step's output goes through a linear layer."""

    def __init__(self, config, row_length=28, classes=10):
        super().__init__()
        self.recurrent = CELLS[config.cell](row_length, config.hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(config.hidden_size, classes)

    def rows(self, images):
        """Turn images (N, H, W) of gray values 0 to 255 into normalised sequences (N, H steps, W pixels)."""
        return images.float().div(255).sub(MNIST_MEAN).div(MNIST_STD)

    def forward(self, images):
        """Turn images (N, H, W) of gray values 0 to 255 into logits, float32 (N, classes)."""
        outputs, _ = self.recurrent(self.rows(images))
        return self.fc(outputs[:, -1])


def train(config, run, data):
    """Train an experiment in its run's folder on data, a Dataset, from where the run stands."""
    model = RowReader(config).to(run.device)
    optimizer = make_optimizer(model, config)
    run.take_up(model=model, optimizer=optimizer)
    if run.epoch == 0:
        run.writer.add_graph(model, data.test.images[:1])
        run.save_snapshot(0, model.state_dict())
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
        run.save_snapshot(epoch, model.state_dict())
        run.finish(epoch, seen.score(), test)


# The reference report's experiments, with the test accuracy in percent that it gives after ten epochs.
REPORT = [
    Reported(Config(cell="rnn", hidden_size=5, lr=1e-1), 10.09),
    Reported(Config(cell="rnn", hidden_size=5, lr=1e-3), 47.73),
    Reported(Config(cell="rnn", hidden_size=5, lr=1e-4), None, "tested, but without a figure"),
    Reported(Config(cell="rnn", hidden_size=5, lr=1e-5), 16.10),
    Reported(Config(cell="rnn", hidden_size=5, lr=1e-3, optimizer="sgd"), 15.13),
    Reported(Config(cell="rnn", hidden_size=10, lr=1e-3), 74.55),
    Reported(Config(cell="rnn", hidden_size=20, lr=1e-3), 90.75),
    Reported(Config(cell="rnn", hidden_size=30, lr=1e-3), 94.17),
    Reported(Config(cell="gru", hidden_size=20, lr=1e-3), 97.60),
    Reported(Config(cell="gru", hidden_size=30, lr=1e-3), 98.32),
    Reported(Config(cell="lstm", hidden_size=20, lr=1e-3), 97.86),
    Reported(Config(cell="lstm", hidden_size=30, lr=1e-3), 97.84),
]


if __name__ == "__main__":
    main(Config, train, REPORT)
