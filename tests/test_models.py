"""The networks: shapes, sizes, and what their methods promise."""

import pytest
import torch
import torch.nn.functional as F

from cnn_cifar10 import LeNet5
from cnn_cifar10 import build_model as build_cnn
from rnn_mnist import RowReader


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_lenet5_has_the_layers_of_the_report():
    model = LeNet5()
    shapes = [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 4096), (10, 1024)]
    assert count_parameters(model) == 4_257_674
    assert count_parameters(build_cnn({"dataset": "mnist"})) == 4_257_674 - 1024 * (4096 - 7 * 7 * 64)


@pytest.mark.parametrize(("cell", "expected"), [("rnn", 3_970), ("gru", 11_290), ("lstm", 14_950)])
def test_recurrent_networks_have_the_expected_size(cell, expected):
    assert count_parameters(RowReader(cell, 30)) == expected


@pytest.mark.parametrize("size", [28, 32])
def test_lenet5_turns_images_into_logits_and_probabilities(size):
    model = LeNet5(size)
    inputs = model.prepare(torch.randint(256, (3, size, size), dtype=torch.uint8))
    assert inputs.shape == (3, 1, size, size)
    assert model(inputs).shape == (3, 10)
    torch.testing.assert_close(model.probabilities(inputs), F.softmax(model(inputs), dim=1))


def test_lenet5_pools_what_relu_lets_through():
    """The written order, convolution, ReLU, pooling, gives the same logits."""
    model, inputs = LeNet5(), torch.rand(4, 1, 32, 32)
    maps = F.max_pool2d(F.relu(model.conv1(inputs)), 2)
    maps = F.max_pool2d(F.relu(model.conv2(maps)), 2)
    logits = model.fc2(F.relu(model.fc1(maps.permute(0, 2, 3, 1).reshape(4, -1))))
    torch.testing.assert_close(model(inputs), logits)
    activations = model.activations(inputs)
    torch.testing.assert_close(activations["conv1"], F.relu(model.conv1(inputs)))
    torch.testing.assert_close(F.max_pool2d(activations["conv2"], 2), maps)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_row_reader_reads_rows_in_order_and_answers_after_the_last(cell):
    model = RowReader(cell, 6)
    images = torch.randint(256, (2, 28, 28), dtype=torch.uint8)
    inputs = model.prepare(images)
    assert inputs.shape == (2, 28, 28)
    state = None
    for step in range(28):
        output, state = model.recurrent(inputs[:, step : step + 1], state)
    torch.testing.assert_close(model(inputs), model.fc(output[:, 0]))
    torch.testing.assert_close(model.probabilities(inputs).sum(1), torch.ones(2))


def test_plain_rnn_agrees_with_its_equation():
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), the second layer reading the first."""
    model, inputs = RowReader("rnn", 4), torch.randn(1, 28, 28)
    weights = dict(model.recurrent.named_parameters())
    sequence = list(inputs[0])
    for layer in (0, 1):
        hidden, outputs = torch.zeros(4), []
        for x in sequence:
            pushed = weights[f"weight_ih_l{layer}"] @ x + weights[f"bias_ih_l{layer}"]
            hidden = torch.tanh(pushed + weights[f"weight_hh_l{layer}"] @ hidden + weights[f"bias_hh_l{layer}"])
            outputs.append(hidden)
        sequence = outputs
    torch.testing.assert_close(model(inputs)[0], model.fc(sequence[-1]))
