"""Train a two-layer RNN, GRU or LSTM on MNIST. It reads each image row by row: 28 steps of 28 pixels.

    python rnn_mnist.py                             plain RNN with 30 hidden units, Adam, learning rate 1e-3
    python rnn_mnist.py --cell gru                  GRU or LSTM instead of the plain RNN
    python rnn_mnist.py --cell gru --gates constant    gates that see neither the input nor the state
    python rnn_mnist.py --cell lstm --rows-after 28 --keep-bias 1    remember the digit across 28 blank rows
    python rnn_mnist.py --report                    train all experiments of the report, then print a table
    python rnn_mnist.py --data synthetic            work offline, on a small built-in data set

The run's folder, runs/rnn_mnist/NAME, holds TensorBoard's event files, metrics.csv, the checkpoint, and the weights
after every epoch.
"""

from dataclasses import dataclass

import utils
from utils import DATASETS, InputError, Metrics, ReportedResult, evaluate, main, make_optimizer, setting

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of MNIST's training images, in [0, 1]
CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
# PyTorch stacks the weights of a layer in blocks of hidden_size rows; the block left out here is the candidate's.
GATE_BLOCKS = {"rnn": {}, "gru": {"reset": 0, "update": 1}, "lstm": {"input": 0, "forget": 1, "output": 3}}


@dataclass(frozen=True)
class Config(utils.Config):
    """The settings of an experiment. pixels, optimizer, lr, momentum, batch_size and seed are in utils.Config."""

    cell: str = setting("rnn", choices=tuple(CELLS), always_shown=True, prefix="_", caption="", help="recurrent cell")
    hidden_size: int = setting(
        30, minimum=1, maximum=4096, always_shown=True, prefix="", caption="{} hidden units", help="units of each layer"
    )
    rows_before: int = setting(
        0, minimum=0, maximum=1000, prefix="_before", caption="{} blank rows before", help="blank rows before the digit"
    )
    rows_after: int = setting(
        0, minimum=0, maximum=1000, prefix="_after", caption="{} blank rows after", help="blank rows after the digit"
    )
    keep_bias: float | None = setting(
        None,
        minimum=-100,
        maximum=100,
        prefix="_keep",
        caption="B = {}",
        none_label="PyTorch's initialisation",
        help="initial bias B of the gates: at first each step keeps sigmoid(B) of the state",
    )
    gates: str = setting(
        "full",
        choices={"full": "full", "input": "input-only", "constant": "constant"},
        prefix="_gates-",
        caption="{} gates",
        help="what the gates of a GRU or LSTM see: full (input and state), input (input only) or constant (neither)",
    )

    script = "rnn_mnist"
    dataset = "mnist"

    def __post_init__(self):
        super().__post_init__()
        if self.gates != "full" and not GATE_BLOCKS[self.cell]:
            raise InputError(f"--gates {self.gates} needs --cell gru or lstm; a plain RNN has no gates")

    @property
    def network(self):
        return self.cell.upper()

    @property
    def max_threads(self):
        # In a small network threads gain little, because they wait for each other at every step.
        return 1 if self.hidden_size <= 64 else None


class RowReader(nn.Module):
    """Two recurrent layers that read an image row by row; a linear layer classifies the output of the last step."""

    def __init__(self, config):
        super().__init__()
        pixels = DATASETS[config.dataset].size
        self.recurrent = CELLS[config.cell](pixels, config.hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(config.hidden_size, 10)
        self.blank_rows = (config.rows_before, config.rows_after)
        self.frozen_weights = 0
        if config.keep_bias is not None:
            self.init_gates(config.cell, config.keep_bias)
        if config.gates != "full":
            self.restrict_gates(config.cell, config.gates)

    @torch.no_grad()
    def init_gates(self, cell, bias):
        """Initialise both layers so that each step keeps sigmoid(bias) of the state.

        In an LSTM this is the bias of the forget gate (Gers et al., 2000; Jozefowicz et al., 2015), in a GRU that of
        the update gate (Tallec & Ollivier, 2018, arXiv:1804.11188). A plain RNN has no gates: its recurrent weights
        become sigmoid(bias) times the identity, and its biases 0 (Le et al., 2015, arXiv:1504.00941).
        """
        size = self.recurrent.hidden_size
        for layer in range(self.recurrent.num_layers):
            bias_ih = getattr(self.recurrent, f"bias_ih_l{layer}")
            bias_hh = getattr(self.recurrent, f"bias_hh_l{layer}")
            if cell == "rnn":
                share = torch.sigmoid(torch.tensor(bias))
                getattr(self.recurrent, f"weight_hh_l{layer}").copy_(share * torch.eye(size))
                bias_ih.zero_()
                bias_hh.zero_()
            else:
                block = GATE_BLOCKS[cell]["update" if cell == "gru" else "forget"]
                bias_ih[block * size : (block + 1) * size] = bias
                bias_hh[block * size : (block + 1) * size] = 0

    @torch.no_grad()
    def restrict_gates(self, cell, gates):
        """Zero the gate weights that `gates` excludes, and keep them at zero during training.

        gates: 'input' removes the gates' recurrent weights, 'constant' their input weights too, so that only their
        biases are left. A weight of zero whose gradient is zero stays at zero under Adam and SGD.
        """
        size = self.recurrent.hidden_size
        for layer in range(self.recurrent.num_layers):
            for part in {"input": ["hh"], "constant": ["hh", "ih"]}[gates]:
                weight = getattr(self.recurrent, f"weight_{part}_l{layer}")
                mask = torch.ones_like(weight)
                for block in GATE_BLOCKS[cell].values():
                    mask[block * size : (block + 1) * size] = 0
                weight.mul_(mask)
                weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
                self.frozen_weights += int((mask == 0).sum())

    def rows(self, images):
        """Return the input sequences (N, steps, W), normalised, of images (N, H, W) with gray values from 0 to 255.

        Each step is a row of the image; the blank rows before and after them are black.
        """
        return F.pad(images, (0, 0, *self.blank_rows)).float().div(255).sub(PIXEL_MEAN).div(PIXEL_STD)

    def forward(self, images):
        """Return the logits, float32 (N, 10), of images (N, H, W) with gray values from 0 to 255."""
        outputs, _ = self.recurrent(self.rows(images))
        return self.fc(outputs[:, -1])


def train(config, run, data):
    """Train one experiment on a utils.Dataset, continuing from run.epoch. utils.train_run has seeded torch."""
    model = RowReader(config).to(run.device)
    optimizer = make_optimizer(model, config)
    run.resume(model=model, optimizer=optimizer)
    if run.epoch == 0:
        run.writer.add_graph(model, data.test.images[:1])
        run.save_snapshot(0, model.state_dict())
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
        outputs, _ = model.recurrent(model.rows(data.test.images[:100]))
        run.writer.add_histogram("state/after_last_row", outputs[:, -1], epoch)
        run.save_snapshot(epoch, model.state_dict())
        run.finish(epoch, metrics.compute(), test_score)


# The experiments of the reference report, with the test accuracy in percent that it gives after ten epochs.
REPORT = [
    ReportedResult(Config(cell="rnn", hidden_size=5, lr=1e-1), 10.09),
    ReportedResult(Config(cell="rnn", hidden_size=5, lr=1e-3), 47.73),
    ReportedResult(Config(cell="rnn", hidden_size=5, lr=1e-4), None, "tested, but without a figure"),
    ReportedResult(Config(cell="rnn", hidden_size=5, lr=1e-5), 16.10),
    ReportedResult(Config(cell="rnn", hidden_size=5, lr=1e-3, optimizer="sgd"), 15.13),
    ReportedResult(Config(cell="rnn", hidden_size=10, lr=1e-3), 74.55),
    ReportedResult(Config(cell="rnn", hidden_size=20, lr=1e-3), 90.75),
    ReportedResult(Config(cell="rnn", hidden_size=30, lr=1e-3), 94.17),
    ReportedResult(Config(cell="gru", hidden_size=20, lr=1e-3), 97.60),
    ReportedResult(Config(cell="gru", hidden_size=30, lr=1e-3), 98.32),
    ReportedResult(Config(cell="lstm", hidden_size=20, lr=1e-3), 97.86),
    ReportedResult(Config(cell="lstm", hidden_size=30, lr=1e-3), 97.84),
]


if __name__ == "__main__":
    main(Config, train, REPORT, __doc__)
