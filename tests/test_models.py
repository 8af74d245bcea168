"""The networks: shapes, sizes, and what their methods promise."""

import cnn_cifar10
import rnn_mnist

import pytest
import torch
import torch.nn.functional as F

CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
BIASES = pytest.mark.parametrize("bias", [0.0, 1.0, -3.5])
SIZE = 5  # hidden units of the small networks
SECOND_GATE = slice(SIZE, 2 * SIZE)  # forget of the LSTM's i f g o, update of the GRU's r z n


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def lenet5(precision="fp32", **settings):
    torch.manual_seed(3)
    return cnn_cifar10.LeNet5(cnn_cifar10.Config(**settings), precision)


def row_reader(cell, hidden_size=SIZE, **settings):
    torch.manual_seed(3)
    return rnn_mnist.RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings))


def some_images(count, size):
    return torch.randint(256, (count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain_lenet5(weights, images):
    """Return what layers make, as they are usually written: convolution, ReLU, pooling; a dict by their names."""
    made, maps = {}, images[:, None] / 255
    for number in (1, 2):
        if f"conv{number}.weight" in weights:
            maps = F.conv2d(maps, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], padding=2)
            made[f"conv{number}"] = maps
        maps = made[f"relu{number}"] = F.max_pool2d(F.relu(maps), 2)
    features = maps.permute(0, 2, 3, 1).reshape(len(images), -1)
    if "fc1.weight" in weights:
        features = made["relu_fc1"] = F.relu(F.linear(features, weights["fc1.weight"], weights["fc1.bias"]))
    return made | {"fc2": F.linear(features, weights["fc2.weight"], weights["fc2.bias"])}


@pytest.mark.parametrize(
    ("without", "on_cifar10", "on_mnist", "names"),
    [
        ("nothing", 4_257_674, 3_274_634, "conv1 pool1 relu1 conv2 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("conv1", 4_207_242, 3_224_202, "pool1 relu1 conv2 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("conv2", 2_109_258, 1_617_738, "conv1 pool1 relu1 pool2 relu2 flatten fc1 relu_fc1 fc2"),
        ("fc1", 93_066, 83_466, "conv1 pool1 relu1 conv2 pool2 relu2 flatten fc2"),
        ("conv1+conv2", 76_810, 61_450, "pool1 relu1 pool2 relu2 flatten fc1 relu_fc1 fc2"),
    ],
)
@pytest.mark.parametrize(("dataset", "size"), [("cifar10", 32), ("mnist", 28)])
def test_lenet5_is_the_plain_network_also_without_a_layer(dataset, size, without, on_cifar10, on_mnist, names):
    model, images = lenet5(dataset=dataset, without=without), some_images(3, size)
    assert count_parameters(model) == {"cifar10": on_cifar10, "mnist": on_mnist}[dataset]
    outputs = model.outputs(images)
    assert " ".join(outputs) == names
    for name, made in plain_lenet5(dict(model.layers.named_parameters()), images).items():
        assert torch.allclose(outputs[name], made, atol=1e-5), name
    assert torch.equal(model(images), outputs["fc2"])


def test_lenet5_computes_in_bf16_where_asked_and_answers_in_fp32():
    images, model, exact = some_images(3, 32), lenet5("bf16"), lenet5()(some_images(3, 32))
    outputs, logits = model.outputs(images), model(images)
    assert {outputs[name].dtype for name in ("conv1", "conv2", "fc1", "fc2")} == {torch.bfloat16}
    torch.testing.assert_close(logits, exact, atol=0.01, rtol=0)
    assert not torch.equal(logits, exact)


def plain_step(cell, pushed, kept, hidden, memory):
    """Return the hidden and the cell state after a step, by the cells' equations; pushed, kept: by gate."""
    if cell == "rnn":
        return torch.tanh(pushed[0] + kept[0]), memory
    if cell == "gru":
        reset, update = (torch.sigmoid(pushed[gate] + kept[gate]) for gate in (0, 1))
        return (1 - update) * torch.tanh(pushed[2] + reset * kept[2]) + update * hidden, memory
    taken, forget, given = (torch.sigmoid(pushed[gate] + kept[gate]) for gate in (0, 1, 3))
    memory = forget * memory + taken * torch.tanh(pushed[2] + kept[2])
    return given * torch.tanh(memory), memory


@CELLS
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 3)])
def test_row_reader_is_the_plain_network_that_reads_row_by_row_and_answers_after_the_last(cell, before, after):
    model, image = row_reader(cell, rows_before=before, rows_after=after), some_images(1, 28)[0]
    weights, blank = model.recurrent.state_dict(), torch.zeros(28)
    sequence = [(row / 255 - 0.1307) / 0.3081 for row in (*[blank] * before, *image, *[blank] * after)]
    torch.testing.assert_close(model.rows(image[None])[0], torch.stack(sequence))
    for layer in (0, 1):
        hidden, memory, outputs = torch.zeros(SIZE), torch.zeros(SIZE), []
        for step in sequence:
            pushed, kept = (
                (weights[f"weight_{part}_l{layer}"] @ read + weights[f"bias_{part}_l{layer}"]).split(SIZE)
                for part, read in (("ih", step), ("hh", hidden))
            )
            hidden, memory = plain_step(cell, pushed, kept, hidden, memory)
            outputs.append(hidden)
        sequence = outputs
    torch.testing.assert_close(model(image[None])[0], model.fc.weight @ sequence[-1] + model.fc.bias)


@pytest.mark.parametrize(("cell", "expected"), [("rnn", 3_970), ("gru", 11_290), ("lstm", 14_950)])
def test_recurrent_networks_have_the_expected_size(cell, expected):
    assert count_parameters(row_reader(cell, 30)) == expected


@CELLS
@BIASES
def test_at_the_start_a_step_keeps_sigmoid_of_the_bias_where_nothing_is_added(cell, bias):
    """Blank rows are read by a network of which only what the setting changed is left, so that nothing else acts."""
    model, usual = row_reader(cell, keep_bias=bias), row_reader(cell).recurrent.state_dict()
    with torch.no_grad():
        for name, values in model.recurrent.named_parameters():
            values[values == usual[name]] = 0
        start = torch.full((2, 1, SIZE), 1e-3)  # of both layers; small, so that tanh is the identity
        blank = model.rows(torch.zeros(1, 28, 28, dtype=torch.uint8))[:, :3]
        _, state = model.recurrent(blank, (start, start) if cell == "lstm" else start)
    kept = state[1] if cell == "lstm" else state
    torch.testing.assert_close(kept, torch.sigmoid(torch.tensor(bias)) ** 3 * start)


@CELLS
@BIASES
def test_the_bias_of_keeping_changes_its_own_weights_of_both_layers_and_no_others(cell, bias):
    weights, expected = row_reader(cell, keep_bias=bias).state_dict(), row_reader(cell).state_dict()
    for layer in (0, 1):
        gate, start = (slice(None), 0) if cell == "rnn" else (SECOND_GATE, bias)
        expected[f"recurrent.bias_ih_l{layer}"][gate], expected[f"recurrent.bias_hh_l{layer}"][gate] = start, 0
        if cell == "rnn":
            expected[f"recurrent.weight_hh_l{layer}"] = torch.sigmoid(torch.tensor(bias)) * torch.eye(SIZE)
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        assert torch.equal(values, expected[name]), name
