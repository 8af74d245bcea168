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

SIZES = {"conv1": 5, "pool1": 6, "conv2": 14, "pool2": 16}  # of receptive fields, in pixels


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def lenet5():
    return LeNet5(Config())


def row_reader(cell, **settings):
    return rnn_mnist.RowReader(rnn_mnist.Config(cell=cell, hidden_size=6, **settings))


def random_images(count, size=32):
    return torch.randint(256, (count, size, size), dtype=torch.uint8)


@pytest.mark.parametrize(("count", "size"), [(60, 7), (20, 50)])
def test_ridge_classifiers_minimise_their_penalised_error(count, size):
    """With more images than features, and with fewer, where another system of equations is solved."""
    features = 3 + torch.rand(count, size) * torch.arange(1, size + 1)
    labels = torch.randint(3, (count,))
    found = visualize.ridge_classifiers(features, labels, 3, visualize.RIDGE_PENALTIES)
    for (weights, bias), penalty in zip(found, visualize.RIDGE_PENALTIES, strict=True):
        weights = weights.double().requires_grad_()
        bias = bias.double().requires_grad_()
        errors = features.double() @ weights + bias - F.one_hot(labels)
        scale = count * features.double().var(0, correction=0).mean()
        loss = errors.square().sum() + penalty * scale * weights.square().sum()
        for gradient in torch.autograd.grad(loss, (weights, bias)):
            assert gradient.abs().max() < 1e-5 * scale


@pytest.mark.parametrize("test_labels", [[0, 0, 0, 0], [0, 1, 1, 1]])
def test_ridge_penalty_is_chosen_on_held_out_training_images(monkeypatch, test_labels):
    """With the low penalty, a probe follows the feature; with the high one, it always answers 0."""
    monkeypatch.setattr(visualize, "RIDGE_PENALTIES", (1e-3, 1e6))
    labels = torch.cat([torch.arange(80) % 5 > 2, torch.arange(20) % 2 > 0]).long()
    features = 2.0 * labels[:, None] - 1
    if any(test_labels):
        labels[80:] = 0  # held-out images, which then prefer the high penalty
    test_features = torch.tensor([[-1.0], [1.0], [1.0], [1.0]])  # the other penalty answers all of them correctly
    assert visualize.linear_probe_accuracy(features, labels, test_features, torch.tensor(test_labels), 2) == 25


def test_layer_features_are_the_pixels_and_the_rectified_outputs(lenet5):
    images = random_images(5)
    layers = {"pool1": "relu1", "pool2": "relu2", "fc1": "relu_fc1"}
    expected = {layer: lenet5.outputs(images)[relu].flatten(1) for layer, relu in layers.items()}
    expected["pixels"] = images.flatten(1) / 255
    torch.testing.assert_close(visualize.layer_features(lenet5, images, batch_size=2), expected)


@torch.no_grad()
def test_activation_statistics_agree_with_their_definitions(lenet5):
    images = random_images(30)
    run = SimpleNamespace(model=lenet5, epoch=3, data=SimpleNamespace(test=utils.Split(images, None)))
    rows = visualize.measure_activations(run, batch_size=7)
    maps = F.relu(lenet5.outputs(images)["conv2"]).double()
    found = np.array([[row["mean"], row["std"], row["zeros_percent"]] for row in rows if row["layer"] == "conv2"])
    expected = [maps.mean((0, 2, 3)), maps.std((0, 2, 3), correction=0), 100 * (maps == 0).double().mean((0, 2, 3))]
    np.testing.assert_allclose(found, torch.stack(expected, dim=1), rtol=1e-4)


@pytest.mark.parametrize("layer", SIZES)
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


@pytest.mark.parametrize("layer", SIZES)
def test_patches_hold_the_pixels_that_change_a_unit(lenet5, layer):
    """They are NaN beyond the image. No path from a pixel to the unit cancels another, because weights are positive."""
    for convolution in (lenet5.layers.conv1, lenet5.layers.conv2):
        nn.init.uniform_(convolution.weight, 0.1, 1)
    pixels = (255 * torch.rand(60, 32, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(lenet5.outputs(pixels)[layer][:, :, 3, 2].sum(), pixels)
    image = torch.arange(32 * 32).view(1, 32, 32)
    (patch,) = visualize.cut_patches(lenet5, layer, image, torch.tensor([3]), torch.tensor([2]))
    assert patch.shape == (SIZES[layer], SIZES[layer])
    assert torch.equal(patch[~patch.isnan()].long(), image[0, gradient.abs().sum(0) > 0])
    assert not patch[-1, -1].isnan()


@torch.no_grad()
@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_top_activations_are_the_highest_peaks_after_relu(lenet5, layer):
    images = random_images(40)
    top = visualize.top_activations(lenet5, images, layer, count=9, batch_size=7)
    maps = F.relu(lenet5.outputs(images)[layer]).transpose(0, 1)
    peaks = maps.amax((2, 3)).sort(dim=1, descending=True).values
    torch.testing.assert_close(top.values, peaks[:, :9].T)
    numbers = torch.arange(len(maps)).expand(9, -1)
    torch.testing.assert_close(maps[numbers, top.images, top.rows, top.columns], top.values)
    assert (top.images.sort(dim=0).values.diff(dim=0) > 0).all(), "an image appears twice"


def test_top_patches_hold_whole_reconstructions_beside_their_patches(lenet5):
    images = random_images(20)
    top = visualize.top_activations(lenet5, images, "conv2", count=3)
    reconstructions, patches = visualize.top_patches(lenet5, "conv2", images, top, torch.tensor([4, 9]))
    chosen = images[top.images[:, 9]]
    whole = visualize.deconvolve(lenet5, chosen, "conv2", torch.tensor([9, 9, 9]))
    torch.testing.assert_close(reconstructions[1].nansum((1, 2)), whole.sum((1, 2, 3)))
    expected = visualize.cut_patches(lenet5, "conv2", chosen, top.rows[:, 9], top.columns[:, 9])
    np.testing.assert_equal(patches[1].numpy(), expected.numpy())


def test_transform_shifts_scales_and_rotates_and_repeats_the_edges():
    images = random_images(2, size=8).float()
    down = torch.cat([images[:, :1].expand(-1, 3, -1), images[:, :-3]], dim=1)
    up = torch.cat([images[:, 2:], images[:, -1:].expand(-1, 2, -1)], dim=1)
    for kind, amount, expected in (
        ("vertical shift in pixels", 3, down),
        ("vertical shift in pixels", -2, up),
        ("rotation in degrees", 90, images.rot90(1, (1, 2))),  # counterclockwise
    ):
        torch.testing.assert_close(visualize.transform(images, kind, amount), expected, atol=1e-2, rtol=0)
    square = F.pad(torch.ones(1, 2, 2), (3, 3, 3, 3))
    assert visualize.transform(square, "scale", 2)[0, 2:6, 2:6].min() > 0.5


@torch.no_grad()
def test_occlude_measures_the_network_with_the_square_at_each_position(lenet5):
    image = random_images(1)
    probabilities = visualize.occlude(lenet5, image[0], size=8)
    for row, column in ((0, 0), (5, 7), (13, 12), (14, 17), (31, 9)):
        hidden = image.float()
        hidden[:, max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = 127.5
        torch.testing.assert_close(probabilities[row, column], lenet5(hidden).softmax(1)[0], rtol=1e-5, atol=0)


def test_first_correct_image_of_each_class_is_chosen():
    """Where no image of a class is classified correctly, here of class 2, the first one is chosen."""
    labels = torch.tensor([1, 0, 2, 1, 0, 2, 1])
    answers = torch.tensor([0, 0, 1, 1, 0, 0, 1])
    data = SimpleNamespace(test=SimpleNamespace(labels=labels), classes=range(3))
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
    fitted, r2, found_orientations, found_frequencies = visualize.fit_gabor(torch.cat([kernels, noise]))
    torch.testing.assert_close(fitted[:3], kernels, atol=0.02, rtol=0)
    torch.testing.assert_close(found_frequencies[:3], frequencies, atol=0.03, rtol=0)
    assert ((found_orientations[:3] - orientations + 90) % 180 - 90).abs().max() < 5
    expected = 1 - (noise - fitted[3:]).square().sum((1, 2)) / (25 * noise.var((1, 2), correction=0))
    torch.testing.assert_close(r2[3:], expected)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_gradient_norms_equal_those_of_continuing_from_each_state(cell):
    model = row_reader(cell, rows_before=2, rows_after=3)
    images = random_images(3, 28)
    labels = torch.tensor([4, 0, 4])
    inputs = model.rows(images)
    norms = visualize.gradient_norms(model, images, labels).tolist()
    for count, norm in enumerate(norms, start=1):
        _, state = model.recurrent(inputs[:, :count])
        parts = tuple(part.detach().requires_grad_() for part in (state if cell == "lstm" else [state]))
        output = parts[0][-1]
        if count < len(norms):
            outputs, _ = model.recurrent(inputs[:, count:], parts if cell == "lstm" else parts[0])
            output = outputs[:, -1]
        loss = F.cross_entropy(model.fc(output), labels, reduction="sum")
        gradients = torch.stack(torch.autograd.grad(loss, parts, materialize_grads=True))
        assert norm == pytest.approx(gradients.square().sum((0, 1, 3)).sqrt().mean().item(), rel=1e-3)
    assert count == 33


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_states_and_answers_by_row_are_those_of_an_image_that_ends_there(cell):
    model = row_reader(cell, rows_before=2)
    images = random_images(3, 28)
    probabilities = visualize.probabilities_by_row(model, images, batch_size=2)
    states = list(visualize.states_by_row(model, images))
    assert probabilities.shape == (3, len(states), 10) == (3, 30, 10)
    for count in (1, 13, 28):
        torch.testing.assert_close(probabilities[:, count + 1], model(images[:, :count]).softmax(1))
        _, expected = model.recurrent(model.rows(images[:, :count]))
        torch.testing.assert_close(states[count + 1], expected if cell == "lstm" else (expected,))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("kind", ["full", "input", "constant"])
@torch.no_grad()
def test_states_computed_from_the_gates_equal_the_networks_states(cell, kind):
    model = row_reader(cell, gates=kind, rows_before=2, rows_after=2)
    for weight in model.recurrent.parameters():
        weight.mul_(2)  # so that the gates open and shut further
    images = random_images(4, 28)
    gates = visualize.gate_activations(model, images)
    states = torch.stack([torch.stack(state) for state in visualize.states_by_row(model, images)], dim=3)
    previous = F.pad(states[:, :, :, :-1], (0, 0, 1, 0))  # both are (parts, layers, N, steps, units)
    inputs = model.rows(images)
    weights = {name: weight.split(6)[2] for name, weight in model.recurrent.named_parameters()}  # of the candidate
    for layer in (0, 1):
        opened = {gate: values for (number, gate), values in gates.items() if number == layer + 1}
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
