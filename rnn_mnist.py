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

from torch import nn

from utils import (
    MNIST_MEAN,
    MNIST_STD,
    RULES,
    Classifier,
    Experiment,
    experiment_parser,
    parse_experiments,
    run_experiments,
    run_script,
)

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class RowReader(Classifier):
    """Two recurrent layers that read an image row by row; the last step's output goes through a linear layer.

    cell: 'rnn', 'gru' or 'lstm'; hidden_size: hidden units of each layer.
    """

    def __init__(self, cell="rnn", hidden_size=30, row_length=28, classes=10):
        super().__init__()
        self.recurrent = CELLS[cell](row_length, hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden_size, classes)

    def prepare(self, images):
        """Turn uint8 images (N, H, W) into float32 sequences (N, H steps, W pixels), normalised like MNIST."""
        return images.float().div(255).sub(MNIST_MEAN).div(MNIST_STD)

    def forward(self, inputs):
        """Turn sequences (N, steps, pixels) into logits (N, classes)."""
        outputs, _ = self.recurrent(inputs)
        return self.fc(outputs[:, -1])


# The reference report's experiments, with the test accuracy in percent that it gives after ten epochs.
COMMON = {"dataset": "mnist", "momentum": 0.0, "batch_size": 64}
EXPERIMENTS = [
    Experiment({"cell": cell, "hidden_size": hidden_size, "optimizer": optimizer, "lr": lr, **COMMON}, *reported)
    for cell, hidden_size, optimizer, lr, *reported in [
        ("rnn", 5, "adam", 1e-1, 10.09),
        ("rnn", 5, "adam", 1e-3, 47.73),
        ("rnn", 5, "adam", 1e-4, None, "tested, but without a figure"),
        ("rnn", 5, "adam", 1e-5, 16.10),
        ("rnn", 5, "sgd", 1e-3, 15.13),
        ("rnn", 10, "adam", 1e-3, 74.55),
        ("rnn", 20, "adam", 1e-3, 90.75),
        ("rnn", 30, "adam", 1e-3, 94.17),
        ("gru", 20, "adam", 1e-3, 97.60),
        ("gru", 30, "adam", 1e-3, 98.32),
        ("lstm", 20, "adam", 1e-3, 97.86),
        ("lstm", 30, "adam", 1e-3, 97.84),
    ]
]


def build_model(config):
    return RowReader(config["cell"], config["hidden_size"])


def keep_weights(run, model, data, epoch):
    run.save_snapshot(epoch, model.state_dict())


def main():
    parser = experiment_parser(__doc__, lr=1e-3, batch_size=64)
    parser.set_defaults(dataset=["mnist"])
    parser.add_argument("--cell", nargs="+", choices=tuple(CELLS), default=["rnn"], help="default: rnn")
    text = "hidden units of each layer; default: 30"
    parser.add_argument("--hidden-size", nargs="+", type=RULES["hidden_size"], default=[30], help=text)
    args = parse_experiments("rnn_mnist", parser)
    run_experiments("rnn_mnist", args, build_model, EXPERIMENTS, keep_weights)


if __name__ == "__main__":
    run_script(main)
