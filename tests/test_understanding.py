"""What is measured inside networks for the figures of a run, compared with an independent computation."""

import math
from types import SimpleNamespace

import rnn_mnist
import utils
import visualize
from cnn_cifar10 import Config, LeNet5

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

# Size, stride and offset, in pixels, of what a unit of each layer of LeNet-5 sees along each axis.
RECEPTIVE_FIELDS = {"conv1": (5, 1, -2), "pool1": (6, 2, -2), "conv2": (14, 2, -6), "pool2": (16, 4, -6)}
# In which order PyTorch stacks the weights of a layer. 'candidate' is no gate.
BLOCKS = {"gru": ("reset", "update", "candidate"), "lstm": ("input", "forget", "candidate", "output")}
UNITS = 6  # hidden units of the recurrent networks

each_cell = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
each_gated_cell = pytest.mark.parametrize("cell", ["gru", "lstm"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def lenet5():
    return LeNet5(Config())


def row_reader(cell, **settings):
    return rnn_mnist.RowReader(rnn_mnist.Config(cell=cell, hidden_size=UNITS, **settings))


def random_images(count, size=32):
    return torch.randint(256, (count, size, size), dtype=torch.uint8)


# Linear probes


def ridge_by_least_squares(features, labels, classes, penalty):
    """Return weights and bias of a ridge regression by least squares with one more equation per weight."""
    features = features.double().numpy()
    count, size = features.shape
    scale = count * features.var(0).mean()
    penalties = math.sqrt(penalty * scale + 1e-6) * np.eye(size, size + 1)  # none for the bias, the last one
    equations = np.vstack([np.column_stack([features, np.ones(count)]), penalties])
    targets = np.vstack([np.eye(classes)[labels], np.zeros((size, classes))])
    solution, *_ = np.linalg.lstsq(equations, targets, rcond=None)
    return solution[:-1], solution[-1]


@pytest.mark.parametrize(("count", "size"), [(60, 7), (20, 50)])
def test_ridge_classifiers_equal_least_squares(count, size):
    """With more images than features, and with fewer, where another system of equations is solved."""
    features = 3 + torch.rand(count, size) * torch.arange(1, size + 1)
    labels = torch.randint(3, (count,))
    penalties = (0.01, 0.1, 1.0)
    found = visualize.ridge_classifiers(features, labels, 3, penalties)
    for (weights, bias), penalty in zip(found, penalties, strict=True):
        expected_weights, expected_bias = ridge_by_least_squares(features, labels, 3, penalty)
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bias, expected_bias, rtol=1e-3, atol=1e-3)


def test_layer_features_are_the_pixels_and_the_rectified_outputs(lenet5):
    images = random_images(5)
    expected = {"pixels": images.flatten(1) / 255}
    for name, rectified in (("pool1", "relu1"), ("pool2", "relu2"), ("fc1", "relu_fc1")):
        expected[name] = lenet5.outputs(images)[rectified].flatten(1)
    torch.testing.assert_close(visualize.layer_features(lenet5, images, batch_size=2), expected)


# Feature maps and the deconvolutional network


@torch.no_grad()
def test_activation_statistics_agree_with_their_definitions(lenet5):
    images = random_images(30)
    found = visualize.activation_statistics(lenet5, images, batch_size=7)["conv2"]
    maps = F.relu(lenet5.outputs(images)["conv2"]).double()
    np.testing.assert_allclose(found["image_mean"], maps.mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(found["mean"], maps.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(found["std"], maps.std((0, 2, 3), correction=0), rtol=1e-4)
    np.testing.assert_allclose(found["zeros"], 100 * (maps == 0).double().mean((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("layer", RECEPTIVE_FIELDS)
def test_deconvolve_equals_backpropagation_that_rectifies_gradients(lenet5, layer):
    """Section 2.1 of the paper by automatic differentiation, without switches and transposed convolutions."""
    images = random_images(3)
    numbers = torch.tensor([3, 0, 17])
    pixels = (images[:, None] / 255).requires_grad_()
    maps = {"pool0": pixels}
    for number in (1, 2):
        convolved = getattr(lenet5.layers, f"conv{number}")(maps[f"pool{number - 1}"])
        rectified = convolved + (F.relu(convolved) - convolved).detach()  # ReLU, but every gradient passes it
        rectified.register_hook(F.relu)
        maps[f"conv{number}"] = rectified
        maps[f"pool{number}"] = F.max_pool2d(rectified, 2)
    strongest = maps[layer][range(3), numbers].amax((1, 2))
    (expected,) = torch.autograd.grad((strongest.detach() * strongest).sum(), pixels)
    found = visualize.deconvolve(lenet5, images, layer, numbers)
    torch.testing.assert_close(found, expected)
    assert found.min() < 0 < strongest.min()


@pytest.mark.parametrize(("layer", "expected"), RECEPTIVE_FIELDS.items())
def test_receptive_field_holds_the_pixels_that_change_a_unit(lenet5, layer, expected):
    """The weights are positive, so that no path from a pixel to the unit cancels another."""
    for convolution in (lenet5.layers.conv1, lenet5.layers.conv2):
        nn.init.uniform_(convolution.weight, 0.1, 1)
    assert visualize.receptive_field(lenet5, layer) == expected
    pixels = (255 * torch.rand(60, 32, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(lenet5.outputs(pixels)[layer][:, :, 3, 2].sum(), pixels)
    seen = (gradient.abs().sum(0) > 0).nonzero()
    size, stride, offset = expected
    first = offset + stride * torch.tensor([3, 2])
    assert torch.equal(seen.amin(0), first.clamp(min=0))
    assert torch.equal(seen.amax(0), first + size - 1)


@torch.no_grad()
def test_top_activations_are_the_highest_peaks_after_relu(lenet5):
    images = random_images(40)
    for layer, top in visualize.top_activations(lenet5, images, count=9, batch_size=7).items():
        maps = F.relu(lenet5.outputs(images)[layer]).transpose(0, 1)
        peaks = maps.amax((2, 3)).sort(dim=1, descending=True).values
        torch.testing.assert_close(top.values, peaks[:, :9].T)
        numbers = torch.arange(len(maps)).expand(9, -1)
        torch.testing.assert_close(maps[numbers, top.images, top.rows, top.columns], top.values)
        assert (top.images.sort(dim=0).values.diff(dim=0) > 0).all(), "an image appears twice"


def test_patches_are_receptive_fields_and_are_nan_beyond_the_image(lenet5):
    image = torch.arange(32 * 32).view(1, 32, 32)
    (inner,) = visualize.cut_patches(lenet5, "conv1", image, torch.tensor([10]), torch.tensor([20]))
    assert torch.equal(inner, image[0, 8:13, 18:23].float())
    (outer,) = visualize.cut_patches(lenet5, "conv2", image, torch.tensor([0]), torch.tensor([15]))
    assert torch.equal(outer[6:, :8], image[0, :8, 24:].float())
    assert outer.isnan().sum() == 14 * 14 - 8 * 8


@pytest.mark.parametrize(("count", "maps"), [(2, [0, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])])
def test_maps_with_patches_inside_the_image_come_first_then_strong_ones(lenet5, count, maps):
    """Unit i of conv2 sees the pixels 2 i - 6 to 2 i + 7: in 32 pixels, all are inside for i = 3 to 12."""
    rows = torch.tensor([[3, 2, 12, 5], [12, 9, 13, 3]])  # maps 0 and 3 are inside twice, 1 and 2 once
    values = torch.tensor([[1.0, 9.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    top = visualize.TopActivations(values, torch.zeros(2, 4).long(), rows, rows.clamp(3, 12))
    assert visualize.select_inner_maps(lenet5, "conv2", top, 32, count).tolist() == maps


def test_top_patches_hold_whole_reconstructions_beside_their_patches(lenet5):
    images = random_images(20)
    top = visualize.top_activations(lenet5, images, count=3)["conv2"]
    reconstructions, patches = visualize.top_patches(lenet5, "conv2", images, top, torch.tensor([4, 9]))
    chosen = images[top.images[:, 9]]
    whole = visualize.deconvolve(lenet5, chosen, "conv2", torch.tensor([9, 9, 9]))
    torch.testing.assert_close(reconstructions[1].nansum((1, 2)), whole.sum((1, 2, 3)))
    expected = visualize.cut_patches(lenet5, "conv2", chosen, top.rows[:, 9], top.columns[:, 9])
    torch.testing.assert_close(patches[1], expected, equal_nan=True)


def test_pattern_similarity_averages_cosines_within_and_between_maps():
    reconstructions = torch.randn(3, 3, 5, 5)
    reconstructions[1, 2, :, :2] = math.nan  # beyond the image
    vectors = np.nan_to_num(reconstructions.numpy().reshape(9, 25))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T  # rows 0, 3 and 6 are the strongest of each map
    within = cosines[[0, 0, 3, 3, 6, 6], [1, 2, 4, 5, 7, 8]].mean()
    between = cosines[[0, 0, 3], [3, 6, 6]].mean()
    assert visualize.pattern_similarity(reconstructions) == pytest.approx((within, between), rel=1e-4)


def test_evolution_shows_the_strongest_reconstruction_of_each_network(lenet5):
    models = [lenet5, LeNet5(Config())]
    images = random_images(12)
    maps = torch.tensor([1, 2, 3])
    tops = [visualize.top_activations(model, images)["conv2"] for model in models]
    reconstructions, values = visualize.reconstructions_by_epoch(models, "conv2", images, tops, maps)
    for place, model in enumerate(models):
        peaks = visualize.rectified_activations(model, images)["conv2"][:, maps].amax((2, 3))
        torch.testing.assert_close(values[:, place], peaks.amax(0))
        whole = visualize.deconvolve(model, images[peaks.argmax(0)], "conv2", maps)
        torch.testing.assert_close(reconstructions[:, place].nansum((1, 2)), whole.sum((1, 2, 3)))


# Invariance, occlusion and Gabor functions


def test_transform_shifts_scales_and_rotates_and_repeats_the_edges():
    images = random_images(2, size=8).float()
    down = torch.cat([images[:, :1].expand(-1, 3, -1), images[:, :-3]], dim=1)
    up = torch.cat([images[:, 2:], images[:, -1:].expand(-1, 2, -1)], dim=1)
    for kind, amount, expected in (
        ("vertical shift in pixels", 3, down),
        ("vertical shift in pixels", -2, up),
        ("rotation in degrees", 90, images.rot90(1, (1, 2))),  # counterclockwise
        ("rotation in degrees", 360, images),
        ("scale", 1, images),
    ):
        torch.testing.assert_close(visualize.transform(images, kind, amount), expected, atol=1e-2, rtol=0)
    square = F.pad(torch.ones(1, 2, 2), (3, 3, 3, 3))
    assert visualize.transform(square, "scale", 2)[0, 2:6, 2:6].min() > 0.5


def test_sensitivity_is_relative_to_the_original_features(lenet5, monkeypatch):
    kind = "vertical shift in pixels"
    monkeypatch.setitem(visualize.TRANSFORMATIONS, kind, torch.tensor([0, 5]))
    images = random_images(4)
    all_outputs = [lenet5.outputs(images), lenet5.outputs(visualize.transform(images, kind, 5))]
    labels = torch.cat([all_outputs[0]["fc2"].argmax(1)[:2], all_outputs[1]["fc2"].argmax(1)[2:] + 1])
    found = visualize.sensitivity(lenet5, images, labels, kind)
    for amount, outputs in enumerate(all_outputs):
        for place, layer in enumerate(("relu1", "relu_fc1")):
            before = all_outputs[0][layer].flatten(1)
            distance = (outputs[layer].flatten(1) - before).norm(dim=1) / before.norm(dim=1)
            torch.testing.assert_close(found[place, amount], distance, atol=1e-4, rtol=1e-4)
        assert torch.equal(found[2, amount], (outputs["fc2"].argmax(1) == labels).float())


@torch.no_grad()
def test_occlude_measures_the_network_with_the_square_at_each_position(lenet5):
    """The feature map that is watched has the highest peak, not the largest sum."""
    image = torch.zeros(1, 32, 32)
    image[:, 10:16, 10:16] = random_images(1, size=6)
    lenet5.layers.fc2.weight.mul_(100)  # so that the predicted class changes with the position
    maps = visualize.rectified_activations(lenet5, image)["conv2"][0]
    probability, predicted, map_sum, feature_map = visualize.occlude(lenet5, image, 3, size=8)
    assert feature_map == maps.amax((1, 2)).argmax() != maps.sum((1, 2)).argmax()
    assert len(predicted.unique()) > 1
    for row, column in ((0, 0), (5, 7), (13, 12), (14, 17), (31, 9)):
        hidden = image.clone()
        hidden[:, max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = 127.5
        probabilities = lenet5(hidden).softmax(1)[0]
        maps = visualize.rectified_activations(lenet5, hidden)["conv2"][0]
        torch.testing.assert_close(probability[row, column], probabilities[3], rtol=1e-3, atol=0)
        assert predicted[row, column] == probabilities.argmax()
        torch.testing.assert_close(map_sum[row, column], maps[feature_map].sum(), rtol=1e-4, atol=0)


def test_first_correct_image_of_each_class_is_chosen():
    """Where no image of a class is classified correctly, here of class 2, the first one is chosen."""
    labels = torch.tensor([1, 0, 2, 1, 0, 2, 1])
    answers = torch.tensor([0, 0, 1, 1, 0, 0, 1])
    data = SimpleNamespace(test=utils.Split(None, labels), classes=range(3))
    run = SimpleNamespace(data=data, probabilities=F.one_hot(answers))
    assert visualize.first_correct_of_each_class(run).tolist() == [1, 3, 2]


def test_fit_gabor_finds_the_parameters_of_gabor_functions():
    frequencies = torch.tensor([0.2, 0.3, 0.25])
    orientations = torch.tensor([0.0, 45.0, 120.0])
    angles = orientations.deg2rad().view(3, 1, 1)
    right = torch.arange(5) - 2.2
    up = 2.3 - torch.arange(5)[:, None]
    along = right * angles.cos() + up * angles.sin()
    across = up * angles.cos() - right * angles.sin()
    phase = 2 * math.pi * frequencies.view(3, 1, 1) * along
    envelope = torch.exp(-((along / 1.5) ** 2 + (across / 2) ** 2) / 2)
    kernels = envelope * (0.3 * phase.cos() - 0.2 * phase.sin())
    noise = torch.randn(3, 5, 5)
    fit = visualize.fit_gabor(torch.cat([kernels, noise]))
    assert fit.r2[:3].min() > 0.99
    torch.testing.assert_close(fit.fitted[:3], kernels, atol=0.02, rtol=0)
    torch.testing.assert_close(fit.frequency[:3], frequencies, atol=0.03, rtol=0)
    assert ((fit.orientation[:3] - orientations + 90) % 180 - 90).abs().max() < 5
    expected = 1 - (noise - fit.fitted[3:]).square().sum((1, 2)) / (25 * noise.var((1, 2), correction=0))
    torch.testing.assert_close(fit.r2[3:], expected)


# Inside the recurrent networks


def state_parts(state):
    """Return the hidden state and, for an LSTM, the cell state that torch's recurrent layers return."""
    return state if isinstance(state, tuple) else (state,)


def gradient_norm_after(model, inputs, labels, count):
    """Return the gradient norm after count rows: that of the state from which the network then continues."""
    _, state = model.recurrent(inputs[:, :count])
    parts = [part.detach().requires_grad_() for part in state_parts(state)]
    output = parts[0][-1]
    if count < inputs.shape[1]:
        outputs, _ = model.recurrent(inputs[:, count:], tuple(parts) if len(parts) == 2 else parts[0])
        output = outputs[:, -1]
    loss = F.cross_entropy(model.fc(output), labels, reduction="sum")
    gradients = torch.stack(torch.autograd.grad(loss, parts, materialize_grads=True))
    return gradients.square().sum((0, 1, 3)).sqrt().mean().item()


@each_cell
def test_gradient_norms_equal_those_of_continuing_from_each_state(cell):
    model = row_reader(cell, rows_before=2, rows_after=3)
    images = random_images(3, 28)
    labels = torch.tensor([4, 0, 4])
    expected = [gradient_norm_after(model, model.rows(images), labels, count) for count in range(1, 34)]
    assert visualize.gradient_norms(model, images, labels).tolist() == pytest.approx(expected, rel=1e-3)


@each_cell
def test_states_and_answers_by_row_are_those_of_an_image_that_ends_there(cell):
    model = row_reader(cell, rows_before=2)
    images = random_images(3, 28)
    probabilities = visualize.probabilities_by_row(model, images, batch_size=2)
    states = list(visualize.states_by_row(model, images))
    assert probabilities.shape == (3, len(states), 10) == (3, 30, 10)
    for count in (1, 13, 28):
        torch.testing.assert_close(probabilities[:, count + 1], model(images[:, :count]).softmax(1))
        _, expected = model.recurrent(model.rows(images[:, :count]))
        torch.testing.assert_close(states[count + 1], state_parts(expected))


@each_gated_cell
def test_state_probes_are_fitted_to_training_and_tested_on_test_images(cell):
    """They read the whole state. All that they know after blank rows alone is the most frequent class."""
    model = row_reader(cell, rows_before=2, rows_after=1)
    labels = torch.randint(5, (160,))
    brightness = (50 * labels + torch.randint(56, (160,))).to(torch.uint8)  # roughly shows the class
    images = brightness[:, None, None].expand(-1, 28, 28)
    train = utils.Split(images[:60], labels[:60])
    test = utils.Split(images[60:], labels[60:])
    known = visualize.probe_states(model, train, test, classes=5)
    share = (test.labels == train.labels[:48].mode().values).double().mean().item()
    assert known[:2] == pytest.approx([100 * share, 100 * share])

    _, state = model.recurrent(model.rows(images)[:, :9])
    features = torch.cat([part.detach().movedim(0, 1).flatten(1) for part in state_parts(state)], dim=1)
    expected = visualize.linear_probe_accuracy(features[:60], train.labels, features[60:], test.labels, 5)
    assert known[8] == pytest.approx(expected)


# Gates


@each_gated_cell
@pytest.mark.parametrize("kind", ["full", "input", "constant"])
@pytest.mark.parametrize("blank_rows", [0, 2])
@torch.no_grad()
def test_states_computed_from_the_gates_equal_the_networks_states(cell, kind, blank_rows):
    model = row_reader(cell, gates=kind, rows_before=blank_rows, rows_after=blank_rows)
    for weight in model.recurrent.parameters():
        weight.mul_(2)  # so that the gates open and shut further
    images = random_images(4, 28)
    gates = visualize.gate_activations(model, images)
    states = torch.stack([torch.stack(state) for state in visualize.states_by_row(model, images)], dim=3)
    previous = F.pad(states[:, :, :, :-1], (0, 0, 1, 0))  # both are (parts, layers, N, steps, units)
    inputs = model.rows(images)
    # The candidate's block of each weight:
    weights = {name: weight.split(UNITS)[2] for name, weight in model.recurrent.named_parameters()}
    for layer in (0, 1):
        opened = {gate: gates[layer + 1, gate] for gate in BLOCKS[cell] if gate != "candidate"}
        from_input = F.linear(inputs, weights[f"weight_ih_l{layer}"], weights[f"bias_ih_l{layer}"])
        hidden = previous[0, layer]
        from_state = F.linear(hidden, weights[f"weight_hh_l{layer}"], weights[f"bias_hh_l{layer}"])
        if cell == "gru":
            candidate = torch.tanh(from_input + opened["reset"] * from_state)
            expected = [(1 - opened["update"]) * candidate + opened["update"] * hidden]
        else:
            candidate = torch.tanh(from_input + from_state)
            memory = opened["forget"] * previous[1, layer] + opened["input"] * candidate
            expected = [opened["output"] * torch.tanh(memory), memory]
        torch.testing.assert_close(states[:, layer], torch.stack(expected), atol=1e-5, rtol=0)
        inputs = states[0, layer]


@each_gated_cell
@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_only_the_gate_with_a_large_bias_is_open(cell, layer):
    """No gate is open if the bias is the candidate's."""
    model = row_reader(cell)
    for block, gate in enumerate(BLOCKS[cell]):
        for name, weight in model.recurrent.named_parameters():
            weight.fill_(-10 if name.startswith("bias") else 0)
        getattr(model.recurrent, f"bias_ih_l{layer - 1}").split(UNITS)[block].fill_(30)
        gates = visualize.gate_activations(model, random_images(2, 28))
        assert len(gates) == 2 * (len(BLOCKS[cell]) - 1)
        for key, values in gates.items():
            expected = 1.0 if key == (layer, gate) else 0.0
            torch.testing.assert_close(values, torch.full((2, 28, UNITS), expected), atol=1e-4, rtol=0)


@each_gated_cell
@pytest.mark.parametrize("kind", ["full", "input", "constant"])
@torch.no_grad()
def test_input_gates_do_not_see_the_state_and_constant_gates_see_nothing(cell, kind):
    """Other recurrent weights of the candidate change all states, and so the input of the second layer."""
    model = row_reader(cell, gates=kind, rows_after=2)
    images = random_images(2, 28)
    gates = visualize.gate_activations(model, images)
    model.recurrent.weight_hh_l0.split(UNITS)[2].neg_()
    with_other_states = visualize.gate_activations(model, images)
    for (layer, gate), values in gates.items():
        is_same_for_other_states = torch.equal(values, with_other_states[layer, gate])
        assert is_same_for_other_states == ((kind, layer) == ("input", 1) or kind == "constant"), gate
        is_same_for_all_rows = torch.equal(values, values[0, 0].expand_as(values))
        assert is_same_for_all_rows == (kind == "constant"), gate


@each_gated_cell
def test_gate_table_holds_mean_and_quantiles_over_the_units(cell):
    model = row_reader(cell, rows_before=1)
    images = random_images(5, 28)
    run = SimpleNamespace(model=model, epoch=3, data=SimpleNamespace(test=utils.Split(images, None)))
    columns, rows = visualize.measure_gates(run, batch_size=2)
    assert columns == ("epoch", "layer", "gate", "row", "mean", "low", "high")
    gates = visualize.gate_activations(model, images)
    assert len(rows) == 29 * len(gates)
    for epoch, layer, gate, row, *found in rows:
        units = gates[layer, gate][:, row - 1].double().mean(0).numpy()
        assert (epoch, *found) == pytest.approx((3, units.mean(), *np.percentile(units, [10, 90])))
