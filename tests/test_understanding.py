"""What is computed for the figures of one run, tensors in and tensors out, beside another way to the same numbers."""

import math

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from cnn_cifar10 import LeNet5
from rnn_mnist import RowReader

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

FIELDS = {"conv1": (5, 1, -2), "pool1": (6, 2, -2), "conv2": (14, 2, -6), "pool2": (16, 4, -6)}  # of each layer
CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])


@pytest.fixture(autouse=True)
def _fixed():
    """The same random numbers in every test, and one thread, which is the fastest for tensors this small."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def lenet5():
    return LeNet5(cnn_cifar10.Config())


def random_images(count, size=32):
    return torch.randint(256, (count, size, size), dtype=torch.uint8)


def row_reader(cell, hidden_size, **settings):
    return RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings))


# A linear classifier


def solved_by_numpy(features, labels, classes, strength):
    """Return weights and bias of the same ridge regression, in float64, as least squares with rows for the penalty."""
    features, targets = features.double().numpy(), np.eye(classes)[labels]
    centred = features - features.mean(0)
    penalty = math.sqrt(strength * (centred**2).sum(0).mean() + 1e-6) * np.eye(features.shape[1])
    wanted = np.vstack([targets - targets.mean(0), np.zeros((len(penalty), classes))])
    weights, *_ = np.linalg.lstsq(np.vstack([centred, penalty]), wanted, rcond=None)
    return weights, targets.mean(0) - features.mean(0) @ weights


@pytest.mark.parametrize(("count", "size"), [(60, 7), (20, 50)])
def test_ridge_classifiers_are_those_of_least_squares(count, size):
    """Of more images than features, and of fewer, where the dual system is solved."""
    features = 3 + torch.rand(count, size) * torch.arange(1, size + 1)
    labels, strengths = torch.randint(3, (count,)), (0.01, 0.1, 1.0)
    found = visualize.ridge_classifiers(features, labels, 3, strengths)
    for (weights, bias), strength in zip(found, strengths, strict=True):
        expected = solved_by_numpy(features, labels, 3, strength)
        np.testing.assert_allclose(weights, expected[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bias, expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strengths", [(1e-4, 3.0), (3.0, 1e-4)])
def test_the_strength_is_the_best_one_on_features_that_are_not_fitted(monkeypatch, strengths):
    monkeypatch.setattr(visualize, "RIDGE_STRENGTHS", strengths)
    torch.manual_seed(3)
    labels, features = torch.randint(3, (600,)), torch.randn(600, 70)
    features[:, :3] += F.one_hot(labels)
    fitted, held_out, test, right = slice(80), slice(80, 100), slice(100, 600), {}
    for strength in strengths:
        weights, bias = solved_by_numpy(features[fitted], labels[fitted], 3, strength)
        right[strength] = (features.double().numpy() @ weights + bias).argmax(1) == labels.numpy()
    assert right[3.0][held_out].mean() > right[1e-4][held_out].mean()
    assert right[3.0][test].mean() > right[1e-4][test].mean() + 0.05
    found = visualize.readable(features[:100], labels[:100], features[test], labels[test], 3)
    assert found == pytest.approx(100 * right[3.0][test].mean())


@pytest.mark.parametrize("without", ["nothing", "fc1", "conv1+conv2"])
def test_features_of_layers_are_the_pixels_and_what_relu_lets_through(without):
    model, images = LeNet5(cnn_cifar10.Config(without=without)), random_images(5)
    found, outputs = visualize.layer_features(model, images, batch_size=2), model.outputs(images)
    rectified = {"pool1": "relu1", "pool2": "relu2", "fc1": "relu_fc1"}
    expected = {name: outputs[relu].flatten(1) for name, relu in rectified.items() if relu in outputs}
    torch.testing.assert_close(found, {"pixels": images.flatten(1) / 255, **expected})


# The deconvolutional network


class DeconvolvedReLU(torch.autograd.Function):
    """ReLU whose backward pass rectifies what comes back, whatever went forward."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


@pytest.mark.parametrize("layer", FIELDS)
def test_deconvolution_is_backpropagation_that_rectifies_on_its_way(lenet5, layer):
    """Section 2.1's projection by automatic differentiation, which knows no biases: another way to the same pixels."""
    images, chosen, maps = random_images(3), torch.tensor([3, 0, 17]), {}
    inputs = stage = (images[:, None] / 255).requires_grad_()
    for number in (1, 2):
        convolved = F.conv2d(stage, *getattr(lenet5.layers, f"conv{number}").parameters(), padding=2)
        maps[f"conv{number}"] = DeconvolvedReLU.apply(convolved)
        maps[f"pool{number}"] = stage = F.max_pool2d(maps[f"conv{number}"], 2)
    strongest = maps[layer][range(3), chosen].amax((1, 2))
    assert strongest.min() > 0
    (expected,) = torch.autograd.grad((strongest.detach() * strongest).sum(), inputs)
    found = visualize.deconvolve(lenet5, images, layer, chosen)
    torch.testing.assert_close(found, expected)
    assert found.min() < 0, "the pixels are not rectified"


def test_unpooling_is_the_inverse_of_pooling_at_the_switches(lenet5):
    with torch.no_grad():
        outputs = lenet5.outputs(random_images(2))
        switches = visualize.find_switches(lenet5, outputs)
    assert list(switches) == ["pool1", "pool2"]
    for pool, (places, size) in switches.items():
        pooled, before = F.relu(outputs[pool]), F.relu(outputs[pool.replace("pool", "conv")])
        unpooled = F.max_unpool2d(pooled, places, 2, output_size=size)
        assert torch.equal(F.max_pool2d(unpooled, 2), pooled)
        assert torch.equal(unpooled[unpooled != 0], before[unpooled != 0])


@pytest.mark.parametrize(("layer", "expected"), FIELDS.items())
def test_receptive_field_is_where_the_gradient_goes(lenet5, layer, expected):
    """The kernels are all positive, so that no path from a pixel to the unit cancels another."""
    for name in ("conv1", "conv2"):
        nn.init.uniform_(getattr(lenet5.layers, name).weight, 0.1, 1)
    assert visualize.receptive_field(lenet5, layer) == expected
    (size, stride, offset), (row, column) = expected, (3, 2)
    inputs = (255 * torch.rand(60, 32, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(lenet5.outputs(inputs)[layer][:, :, row, column].sum(), inputs)
    seen = (gradient.abs().sum(0) > 0).nonzero()
    bounds = [(max(0, offset + stride * i), min(31, offset + stride * i + size - 1)) for i in (row, column)]
    assert [(low.item(), high.item()) for low, high in zip(*seen.aminmax(dim=0), strict=True)] == bounds


@torch.no_grad()
def test_most_exciting_images_are_those_of_the_strongest_activations_after_relu(lenet5):
    images = random_images(40)
    found, stage = visualize.most_exciting(lenet5, images, count=9, batch_size=7), images[:, None] / 255
    for layer in ("conv1", "conv2"):
        maps = F.relu(getattr(lenet5.layers, layer)(stage))
        torch.testing.assert_close(visualize.activations_of(lenet5, images)[layer], maps)
        for k in (0, 5, 31):
            strongest, exciting = maps[:, k].amax((1, 2)).sort(descending=True), [part[:, k] for part in found[layer]]
            torch.testing.assert_close(exciting[0], strongest.values[:9])
            assert exciting[1].tolist() == strongest.indices[:9].tolist()
            place = divmod(maps[exciting[1][0], k].argmax().item(), maps.shape[3])
            assert (exciting[2][0], exciting[3][0]) == place
        stage = F.max_pool2d(maps, 2)


def test_patches_are_cut_to_the_receptive_field_and_end_at_the_image(lenet5):
    image = torch.arange(32 * 32).view(1, 32, 32)
    (patch,) = visualize.cut_patches(lenet5, "conv1", image, torch.tensor([10]), torch.tensor([20]))
    assert torch.equal(patch, image[0, 8:13, 18:23].float())
    (patch,) = visualize.cut_patches(lenet5, "conv2", image, torch.tensor([0]), torch.tensor([15]))
    assert torch.equal(patch[6:, :8], image[0, :8, 24:].float())
    assert patch.isnan().sum() == 14 * 14 - 8 * 8


def test_a_reconstruction_stays_within_the_receptive_field_and_beside_its_patch(lenet5):
    images, maps = random_images(20), torch.tensor([4, 9])
    exciting = visualize.most_exciting(lenet5, images, count=3)["conv2"]
    cut, patches = visualize.exciting_patches(lenet5, "conv2", images, exciting, maps)
    numbers, rows, columns = (part[:, 9] for part in exciting[1:])
    whole = visualize.deconvolve(lenet5, images[numbers], "conv2", torch.tensor([9, 9, 9]))
    torch.testing.assert_close(cut[1].nan_to_num().abs().sum((1, 2)), whole.abs().sum((1, 2, 3)))
    expected = visualize.cut_patches(lenet5, "conv2", images[numbers], rows, columns)
    torch.testing.assert_close(patches[1], expected, equal_nan=True)


@pytest.mark.parametrize(("count", "maps"), [(2, [0, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])])
def test_the_maps_that_are_drawn_look_inside_the_image_and_then_are_strong(lenet5, count, maps):
    """A unit of conv2 sees the pixels from 2 i - 6 to 2 i + 7: all of them lie inside a picture of 32 for i 3 to 12."""
    places = torch.tensor([[3, 2, 12, 5], [12, 9, 13, 3]])  # (count, C): map 0 is inside twice, 2 and 1 once, 3 twice
    strengths = torch.tensor([[1.0, 9.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    exciting = visualize.Exciting(strengths, torch.zeros(2, 4).long(), places, places.clamp(3, 12))
    assert visualize.inside_first(lenet5, "conv2", exciting, 32, count).tolist() == maps


def test_what_evolves_is_each_models_strongest(lenet5):
    models, images, maps = [lenet5, LeNet5(cnn_cifar10.Config())], random_images(12), torch.tensor([1, 2, 3])
    strongest = [visualize.most_exciting(model, images) for model in models]
    pictures, strengths = visualize.evolving_patches(models, strongest, images, {"conv2": maps})["conv2"]
    for place, model in enumerate(models):
        activations = visualize.activations_of(model, images)["conv2"][:, maps].amax((2, 3))
        torch.testing.assert_close(strengths[:, place], activations.amax(0))
        whole = visualize.deconvolve(model, images[activations.argmax(0)], "conv2", maps)
        torch.testing.assert_close(pictures[:, place].nan_to_num().sum((1, 2)), whole.sum((1, 2, 3)))


def test_activation_statistics_agree_with_the_definition(lenet5):
    images = random_images(30)
    found = visualize.activation_statistics(lenet5, images, batch_size=7)["conv2"]
    maps = F.relu(lenet5.outputs(images)["conv2"].detach()).double()
    expected = {
        "image_mean": maps.mean((1, 2, 3)),
        "mean": maps.mean((0, 2, 3)),
        "std": maps.std((0, 2, 3), correction=0),
        "zeros": 100 * (maps == 0).double().mean((0, 2, 3)),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


# Invariance and occlusion


def test_transformations_move_scale_and_turn_and_bring_in_the_edge():
    images, close = random_images(2, size=8).float(), {"atol": 1e-2, "rtol": 0}
    for pixels, moved, kept, new, edge in (
        (3, slice(3, None), slice(-3), slice(3), slice(1)),
        (-2, slice(-2), slice(2, None), slice(-2, None), slice(-1, None)),
    ):
        found = visualize.transform(images, "vertical shift in pixels", pixels)
        torch.testing.assert_close(found[:, moved], images[:, kept], **close)
        torch.testing.assert_close(found[:, new], images[:, edge].expand(-1, abs(pixels), -1), **close)
    turned = visualize.transform(images, "rotation in degrees", 90)
    torch.testing.assert_close(turned, images.rot90(1, (1, 2)), **close)
    for kind, amount in (("scale", 1.0), ("rotation in degrees", 360.0)):
        torch.testing.assert_close(visualize.transform(images, kind, amount), images, **close)
    centre = F.pad(torch.ones(1, 2, 2), (3, 3, 3, 3))
    assert visualize.transform(centre, "scale", 2)[0, 2:6, 2:6].min() > 0.5


@pytest.mark.parametrize(("kind", "amount"), [("vertical shift in pixels", 5), ("scale", 1.5)])
def test_sensitivity_is_relative_to_the_features_of_the_untransformed_image(lenet5, monkeypatch, kind, amount):
    still = int(kind == "scale")
    monkeypatch.setitem(visualize.TRANSFORMATIONS, kind, torch.tensor([still, amount]))
    images = random_images(4)
    original, moved = lenet5.outputs(images), lenet5.outputs(visualize.transform(images, kind, amount))
    labels = torch.cat([original["fc2"].argmax(1)[:2], moved["fc2"].argmax(1)[2:]])
    first, last, right = visualize.sensitivity(lenet5, images, labels, kind)
    assert max(first[0].max(), last[0].max()) < 1e-4
    for name, found in (("relu1", first), ("relu_fc1", last)):
        before, after = original[name].flatten(1), moved[name].flatten(1)
        torch.testing.assert_close(found[1], (after - before).norm(dim=1) / before.norm(dim=1))
    expected = torch.stack([outputs["fc2"].argmax(1) == labels for outputs in (original, moved)])
    assert right.tolist() == expected.float().tolist()


def test_occlusion_gives_the_answer_and_the_activity_for_each_place_of_the_square(lenet5):
    """The map that is watched has the highest peak of the last convolution, not the largest sum."""
    image, size = torch.zeros(1, 32, 32), 8
    image[:, 10:16, 10:16] = random_images(1, size=6)
    with torch.no_grad():
        lenet5.layers.fc2.weight.mul_(100)  # so that classes change as the square moves
    maps = visualize.activations_of(lenet5, image)["conv2"][0]
    assert maps.amax((1, 2)).argmax() != maps.sum((1, 2)).argmax()
    probability, predicted, activity, feature_map = visualize.occlude(lenet5, image, 3, size)
    assert feature_map == maps.amax((1, 2)).argmax()
    assert len(predicted.unique()) > 1
    for row, column in ((0, 0), (5, 7), (13, 12), (14, 17), (31, 9)):
        hidden = image.clone()
        hidden[:, max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = 127.5
        probabilities = lenet5(hidden).softmax(1)[0]
        assert probability[row, column].item() == pytest.approx(probabilities[3].item(), rel=1e-3)
        assert predicted[row, column] == probabilities.argmax()
        summed = visualize.activations_of(lenet5, hidden)["conv2"][0, feature_map].sum().item()
        assert activity[row, column].item() == pytest.approx(summed, rel=1e-4)


# Gabor functions


def test_a_gabor_function_is_found_again():
    frequencies, angles = torch.tensor([0.2, 0.3, 0.25]), torch.tensor([0.0, 45.0, 120.0])
    steps = torch.arange(5) - 2.0
    u = torch.stack([(steps - 0.2) * angle.cos() + (-steps[:, None] + 0.3) * angle.sin() for angle in angles.deg2rad()])
    v = torch.stack([(-steps[:, None] + 0.3) * angle.cos() - (steps - 0.2) * angle.sin() for angle in angles.deg2rad()])
    envelope, phase = torch.exp(-((u / 1.5) ** 2 + (v / 2) ** 2) / 2), 2 * math.pi * frequencies.view(3, 1, 1) * u
    kernels = envelope * (0.3 * phase.cos() - 0.2 * phase.sin())
    found, noise = visualize.fit_gabor(kernels), torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    fitted, r2, *_ = visualize.fit_gabor(noise)
    assert found.r2.min() > 0.99 > 0.95 > r2.max()
    torch.testing.assert_close(r2, 1 - (noise - fitted).square().sum((1, 2)) / (25 * noise.var((1, 2), correction=0)))
    torch.testing.assert_close(found.fitted, kernels, atol=0.02, rtol=0)
    torch.testing.assert_close(found.frequency, frequencies, atol=0.03, rtol=0)
    assert ((found.orientation - angles + 90) % 180 - 90).abs().max() < 5


# Inside the recurrent networks


def norms_by_cells(model, images, labels):
    """Return the gradient norms from torch's single cells, zeros added to what the next step reads of both layers."""
    kind = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}[type(model.recurrent)]
    size, parts, cells = model.recurrent.hidden_size, 1 + (kind is nn.LSTMCell), []
    for layer, inputs in (("_l0", 28), ("_l1", size)):
        weights = {name.removesuffix(layer): each for name, each in model.recurrent.state_dict().items()}
        cells.append(kind(inputs, size))
        cells[-1].load_state_dict({name: each for name, each in weights.items() if "_l" not in name})
    states, added = torch.zeros(2, parts, len(images), size), []
    for row in model.rows(images).unbind(1):
        after = []
        for cell, state in zip(cells, states, strict=True):
            after.append(torch.stack(cell(row, tuple(state))) if parts == 2 else cell(row, state[0])[None])
            row = after[-1][0]
        added.append(torch.zeros(2, parts, len(images), size, requires_grad=True))
        states = torch.stack(after) + added[-1]
    loss = F.cross_entropy(model.fc(states[1][0]), labels, reduction="sum")
    return torch.stack(
        [torch.linalg.vector_norm(each, dim=(0, 1, 3)).mean() for each in torch.autograd.grad(loss, added)]
    )


@CELLS
def test_gradient_norms_are_those_of_single_cells(cell):
    """At every step, blank rows too, of both layers and of both states of an LSTM, the mean over images."""
    model, images, labels = row_reader(cell, 5, rows_before=2, rows_after=3), random_images(3, 28), torch.arange(3)
    found, expected = visualize.gradient_norms(model, images, labels), norms_by_cells(model, images, labels)
    assert len(found) == 33
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_share_that_reaches_the_first_row_is_of_what_reaches_the_last_one():
    lines = visualize.gradient_lines([("0", "1e-4", "1e-20", "2"), ("2", "0.5", "1", "2")])
    assert {epoch: [*norms] for epoch, norms in lines.items()} == {0: [1e-4, 1e-16, 2], 2: [0.5, 1, 2]}
    assert [visualize.reach(norms) for norms in lines.values()] == [0.5e-4, 0.25]


@CELLS
def test_answers_and_states_by_row_are_those_of_an_image_that_ends_there(cell):
    model, images = row_reader(cell, 6, rows_before=2), random_images(3, size=28)
    probabilities = visualize.probabilities_by_row(model, images, batch_size=2)
    states = list(visualize.states_by_row(model, images))
    assert probabilities.shape == (3, len(states), 10) == (3, 30, 10)
    for rows in (1, 13, 28):
        torch.testing.assert_close(probabilities[:, rows + 1], model(images[:, :rows]).softmax(1))
        _, expected = model.recurrent(model.rows(images[:, :rows]))
        torch.testing.assert_close(states[rows + 1], expected if cell == "lstm" else (expected,))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_a_state_knows_is_nothing_before_the_first_row_and_is_read_from_all_of_it(cell):
    """Images are about as bright as their class says; a third of them are of class 2."""
    model, labels = row_reader(cell, 8, rows_before=2, rows_after=1), torch.tensor([0, 1, 2, 2, 3, 4] * 20)
    brightness = (50 * labels + torch.randint(56, (120,))).to(torch.uint8)
    split = utils.Split(brightness[:, None, None].expand(-1, 28, 28), labels)
    known = visualize.readable_by_row(model, split, split, 5)
    assert len(known) == 31
    assert known[:2] == [pytest.approx(100 / 3)] * 2
    assert min(known[2:30]) > 50
    _, state = model.recurrent(model.rows(split.images)[:, :7])
    parts = [part.detach().transpose(0, 1).flatten(1) for part in (state if cell == "lstm" else (state,))]
    whole, hidden = (visualize.readable(each, labels, each, labels, 5) for each in (torch.cat(parts, 1), parts[0]))
    assert known[6] == pytest.approx(whole, abs=1)
    assert whole > hidden + 2 or cell == "gru"
