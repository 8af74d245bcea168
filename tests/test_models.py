"""The networks: shapes, sizes, and what their methods promise."""

import pytest
import torch
import torch.nn.functional as F

import cnn_cifar10
import rnn_mnist
from cnn_cifar10 import LeNet5
from rnn_mnist import RowReader


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def lenet5(dataset="cifar10", precision="fp32"):
    return LeNet5(cnn_cifar10.Config(dataset=dataset), precision)


def row_reader(cell, hidden_size):
    return RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size))


def test_lenet5_has_the_layers_of_the_report():
    model = lenet5()
    shapes = [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 4096), (10, 1024)]
    assert count_parameters(model) == 4_257_674
    assert count_parameters(lenet5("mnist")) == 4_257_674 - 1024 * (4096 - 7 * 7 * 64)


@pytest.mark.parametrize(("cell", "expected"), [("rnn", 3_970), ("gru", 11_290), ("lstm", 14_950)])
def test_recurrent_networks_have_the_expected_size(cell, expected):
    assert count_parameters(row_reader(cell, 30)) == expected


@pytest.mark.parametrize(("dataset", "size"), [("mnist", 28), ("cifar10", 32)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lenet5_turns_gray_values_into_logits_and_shows_each_layer_on_the_way(dataset, size, precision):
    model, images = lenet5(dataset, precision), torch.randint(256, (3, size, size), dtype=torch.uint8)
    outputs = model.outputs(images)
    assert " ".join(outputs) == "conv1 pool1 relu1 conv2 pool2 relu2 flatten fc1 relu_fc1 fc2"
    assert outputs["conv1"].shape == (3, 32, size, size)
    assert outputs["relu2"].shape == (3, 64, size // 4, size // 4)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    assert torch.equal(logits, outputs["fc2"].float())


def test_lenet5_pools_what_relu_lets_through():
    """The written order, convolution, ReLU, pooling, gives the same logits."""
    model, images = lenet5(), torch.randint(256, (4, 32, 32), dtype=torch.uint8)
    layers, outputs = model.layers, model.outputs(images)
    maps = F.max_pool2d(F.relu(layers.conv1(images[:, None] / 255)), 2)
    torch.testing.assert_close(outputs["relu1"], maps)
    maps = F.max_pool2d(F.relu(layers.conv2(maps)), 2)
    torch.testing.assert_close(outputs["relu2"], maps)
    logits = layers.fc2(F.relu(layers.fc1(maps.permute(0, 2, 3, 1).reshape(4, -1))))
    torch.testing.assert_close(model(images), logits)


def test_a_part_of_lenet5_continues_from_what_came_before_it():
    model, images = lenet5(), torch.randint(256, (2, 32, 32), dtype=torch.uint8)
    outputs = model.outputs(images)
    rest = model.pass_through(model.layers[3:], outputs["relu1"])
    assert list(rest) == list(outputs)[3:]
    assert torch.equal(rest["fc2"], outputs["fc2"])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_row_reader_reads_rows_in_order_and_answers_after_the_last(cell):
    model = row_reader(cell, 6)
    images = torch.randint(256, (2, 28, 28), dtype=torch.uint8)
    rows = model.rows(images)
    assert rows.shape == (2, 28, 28)
    state = None
    for step in range(28):
        output, state = model.recurrent(rows[:, step : step + 1], state)
    torch.testing.assert_close(model(images), model.fc(output[:, 0]))


def test_plain_rnn_agrees_with_its_equation():
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), the second layer reading the first."""
    model, images = row_reader("rnn", 4), torch.randint(256, (1, 28, 28), dtype=torch.uint8)
    weights = dict(model.recurrent.named_parameters())
    sequence = list((images[0] / 255 - 0.1307) / 0.3081)
    for layer in (0, 1):
        hidden, outputs = torch.zeros(4), []
        for x in sequence:
            pushed = weights[f"weight_ih_l{layer}"] @ x + weights[f"bias_ih_l{layer}"]
            hidden = torch.tanh(pushed + weights[f"weight_hh_l{layer}"] @ hidden + weights[f"bias_hh_l{layer}"])
            outputs.append(hidden)
        sequence = outputs
    torch.testing.assert_close(model(images)[0], model.fc(sequence[-1]))
