"""The networks: shapes, sizes, and what their methods promise."""

import cnn_cifar10
import rnn_mnist
from cnn_cifar10 import LeNet5
from rnn_mnist import RowReader

import pytest
import torch
import torch.nn.functional as F


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def lenet5(dataset="cifar10", precision="fp32"):
    return LeNet5(cnn_cifar10.Config(dataset=dataset), precision)


def row_reader(cell, hidden_size, **settings):
    return RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings))


def test_lenet5_has_the_layers_of_the_report():
    model = lenet5()
    shapes = [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 4096), (10, 1024)]
    assert count_parameters(model) == 4_257_674
    assert count_parameters(lenet5("mnist")) == 4_257_674 - 1024 * (4096 - 7 * 7 * 64)


@pytest.mark.parametrize(
    ("without", "expected", "names"),
    [
        ("nothing", 4_257_674, "conv1 pool1 relu1 conv2 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("conv1", 4_207_242, "pool1 relu1 conv2 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("conv2", 2_109_258, "conv1 pool1 relu1 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("fc1", 93_066, "conv1 pool1 relu1 conv2 pool2 relu2 flatten fc2"),
        ("conv1+conv2", 76_810, "pool1 relu1 pool2 relu2 flatten fc1 relu_fc1 fc2"),
    ],
)
def test_a_network_trained_without_a_layer_keeps_its_poolings(without, expected, names):
    model = LeNet5(cnn_cifar10.Config(without=without))
    assert count_parameters(model) == expected
    outputs = model.outputs(torch.randint(256, (2, 32, 32), dtype=torch.uint8))
    assert " ".join(outputs) == names
    assert [outputs[name].shape[2:] for name in ("pool1", "pool2")] == [(16, 16), (8, 8)]


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


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 2), (4, 5)])
def test_blank_rows_are_black_and_leave_the_digits_rows_as_they_are(before, after):
    images = torch.randint(1, 256, (2, 28, 28), dtype=torch.uint8)
    rows = row_reader("rnn", 4, rows_before=before, rows_after=after).rows(images)
    plain, black = (row_reader("rnn", 4).rows(each) for each in (images, torch.zeros_like(images)))
    assert rows.shape == (2, before + 28 + after, 28)
    assert torch.equal(rows[:, before : before + 28], plain)
    assert torch.equal(rows[:, :before], black[:, :before])
    assert torch.equal(rows[:, before + 28 :], black[:, :after])
    assert black.unique().tolist() == pytest.approx([-0.1307 / 0.3081])


def untrained_lstm(keep_bias=None, hidden_size=5):
    torch.manual_seed(3)
    return row_reader("lstm", hidden_size, keep_bias=keep_bias)


@pytest.mark.parametrize("bias", [1.0, 2.0, 0.0, -3.5])
def test_forget_gates_start_with_their_bias_and_all_else_as_without_it(bias):
    weights, default = (dict(untrained_lstm(each).named_parameters()) for each in (bias, None))
    forget, changed = slice(5, 10), {"ih": bias, "hh": 0.0}
    assert weights.keys() == default.keys()
    for name, values in weights.items():
        expected = default[name].detach().clone()
        if "bias_" in name:
            expected[forget] = changed[name.split("_")[1]]
        assert torch.equal(values, expected), name
    assert sum("bias_" in name for name in weights) == 4, "of both layers"


@pytest.mark.parametrize("bias", [1.0, 2.0, -3.5])
def test_the_forget_gates_bias_is_what_is_kept_of_a_cell_state_that_nothing_is_added_to(bias):
    """With all weights and all other biases zero, a step adds tanh(0) = 0 to the cell state."""
    model = untrained_lstm(bias)
    with torch.no_grad():
        for name, parameter in model.recurrent.named_parameters():
            kept = parameter[5:10].clone()
            parameter.zero_()
            if "bias" in name:
                parameter[5:10] = kept
        ones = torch.ones(2, 1, 5)
        _, (_, cell) = model.recurrent(torch.randn(1, 3, 28), (ones, ones))
    torch.testing.assert_close(cell, torch.sigmoid(torch.tensor(bias)) ** 3 * ones)


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
