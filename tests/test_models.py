"""The networks: shapes, numbers of weights, and what their methods promise."""

import cnn_cifar10
import rnn_mnist

import pytest
import torch
import torch.nn.functional as F

SIZE = 5  # hidden units of the small networks
# The order in which PyTorch stacks the weights of a layer. The candidate is not a gate.
BLOCKS = {"gru": ("reset", "update", "candidate"), "lstm": ("input", "forget", "candidate", "output")}

each_cell = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])


def lenet5(precision="fp32", **settings):
    torch.manual_seed(3)
    return cnn_cifar10.LeNet5(cnn_cifar10.Config(**settings), precision)


def row_reader(cell, hidden_size=SIZE, **settings):
    torch.manual_seed(3)
    return rnn_mnist.RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings))


def count_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def random_images(count, size):
    return torch.randint(256, (count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def lenet5_outputs(weights, images):
    """Return outputs of layers, by name, computed in the textbook's order: convolution, ReLU, pooling."""
    outputs = {}
    maps = images[:, None] / 255
    for number in (1, 2):
        if f"conv{number}.weight" in weights:
            maps = F.conv2d(maps, weights[f"conv{number}.weight"], weights[f"conv{number}.bias"], padding=2)
            outputs[f"conv{number}"] = maps
        maps = F.max_pool2d(F.relu(maps), 2)
        outputs[f"relu{number}"] = maps
    features = maps.permute(0, 2, 3, 1).reshape(len(images), -1)
    if "fc1.weight" in weights:
        features = F.relu(F.linear(features, weights["fc1.weight"], weights["fc1.bias"]))
        outputs["relu_fc1"] = features
    outputs["fc2"] = F.linear(features, weights["fc2.weight"], weights["fc2.bias"])
    return outputs


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
def test_lenet5_equals_a_textbook_network(dataset, size, without, on_cifar10, on_mnist, names):
    model = lenet5(dataset=dataset, without=without)
    images = random_images(3, size)
    assert count_weights(model) == {"cifar10": on_cifar10, "mnist": on_mnist}[dataset]
    outputs = model.outputs(images)
    assert " ".join(outputs) == names
    for name, expected in lenet5_outputs(dict(model.layers.named_parameters()), images).items():
        assert torch.allclose(outputs[name], expected, atol=1e-5), name
    assert torch.equal(model(images), outputs["fc2"])


def test_lenet5_computes_in_bf16_and_returns_fp32():
    images = random_images(3, 32)
    model = lenet5("bf16")
    outputs = model.outputs(images)
    assert {outputs[name].dtype for name in ("conv1", "conv2", "fc1", "fc2")} == {torch.bfloat16}
    logits, expected = model(images), lenet5("fp32")(images)
    torch.testing.assert_close(logits, expected, atol=0.01, rtol=0)
    assert not torch.equal(logits, expected)


def next_state(cell, from_input, from_state, hidden, memory):
    """Return the hidden state and the LSTM's memory after a step, by the textbook's equations.

    from_input, from_state: what input and state contribute to each block of a layer, before its nonlinearity.
    """
    if cell == "rnn":
        return torch.tanh(from_input[0] + from_state[0]), memory
    if cell == "gru":
        reset = torch.sigmoid(from_input[0] + from_state[0])
        update = torch.sigmoid(from_input[1] + from_state[1])
        candidate = torch.tanh(from_input[2] + reset * from_state[2])
        return (1 - update) * candidate + update * hidden, memory
    input_gate = torch.sigmoid(from_input[0] + from_state[0])
    forget_gate = torch.sigmoid(from_input[1] + from_state[1])
    candidate = torch.tanh(from_input[2] + from_state[2])
    output_gate = torch.sigmoid(from_input[3] + from_state[3])
    memory = forget_gate * memory + input_gate * candidate
    return output_gate * torch.tanh(memory), memory


@each_cell
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 3)])
def test_row_reader_equals_a_textbook_network(cell, before, after):
    model = row_reader(cell, rows_before=before, rows_after=after)
    image = random_images(1, 28)[0]
    weights = model.recurrent.state_dict()
    rows = [*[torch.zeros(28)] * before, *image, *[torch.zeros(28)] * after]
    sequence = [(row / 255 - 0.1307) / 0.3081 for row in rows]
    torch.testing.assert_close(model.rows(image[None])[0], torch.stack(sequence))
    for layer in (0, 1):
        hidden, memory = torch.zeros(SIZE), torch.zeros(SIZE)
        outputs = []
        for step in sequence:
            from_input = weights[f"weight_ih_l{layer}"] @ step + weights[f"bias_ih_l{layer}"]
            from_state = weights[f"weight_hh_l{layer}"] @ hidden + weights[f"bias_hh_l{layer}"]
            hidden, memory = next_state(cell, from_input.split(SIZE), from_state.split(SIZE), hidden, memory)
            outputs.append(hidden)
        sequence = outputs
    torch.testing.assert_close(model(image[None])[0], model.fc.weight @ sequence[-1] + model.fc.bias)


@each_cell
@pytest.mark.parametrize("bias", [0.0, 1.0, -3.5])
def test_keep_bias_changes_its_own_weights_of_both_layers_only(cell, bias):
    weights = row_reader(cell, keep_bias=bias).state_dict()
    expected = row_reader(cell).state_dict()
    for layer in (0, 1):
        if cell == "rnn":
            expected[f"recurrent.weight_hh_l{layer}"] = torch.sigmoid(torch.tensor(bias)) * torch.eye(SIZE)
            expected[f"recurrent.bias_ih_l{layer}"].zero_()
            expected[f"recurrent.bias_hh_l{layer}"].zero_()
        else:
            expected[f"recurrent.bias_ih_l{layer}"][SIZE : 2 * SIZE] = bias  # the forget or the update gate
            expected[f"recurrent.bias_hh_l{layer}"][SIZE : 2 * SIZE] = 0
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("gates", ["input", "constant"])
def test_restricted_gates_start_at_zero_and_all_else_as_usual(cell, gates):
    """The keep bias is kept, too; with constant gates it alone then sets the gate."""
    weights = row_reader(cell, gates=gates, keep_bias=1.5).state_dict()
    expected = row_reader(cell, keep_bias=1.5).state_dict()
    gate_rows = [row for row in range(len(BLOCKS[cell]) * SIZE) if BLOCKS[cell][row // SIZE] != "candidate"]
    for layer in (0, 1):
        expected[f"recurrent.weight_hh_l{layer}"][gate_rows] = 0
        if gates == "constant":
            expected[f"recurrent.weight_ih_l{layer}"][gate_rows] = 0
    for name, values in weights.items():
        assert torch.equal(values, expected[name]), name
