"""What the networks learned: the deconvolutional views checked against the paper, the recurrent ones by definition."""

import math
from collections import OrderedDict
from types import SimpleNamespace

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
from conftest import EPOCHS
from torch import nn

LAYERS = ("conv1", "pool1", "conv2", "pool2")
DEEP_LAYERS = (*LAYERS, "conv3", "pool3")


class DeepLeNet5(LeNet5):
    """LeNet-5 with a third convolution: what a reader would change who wants one more."""

    def __init__(self, config, precision="fp32", classes=10):
        super().__init__(config, precision, classes)
        layers = OrderedDict(self.layers.named_children())
        deeper = {"conv3": nn.Conv2d(64, 24, 5, padding=2), "pool3": nn.MaxPool2d(2), "relu3": nn.ReLU()}
        layers["fc1"] = nn.Linear(24 * (layers["fc1"].in_features // 64 // 4), 1024)
        names = [name for name in layers if "fc" not in name and name != "flatten"]
        rest = {name: layers[name] for name in layers if name not in names}
        self.layers = nn.Sequential(OrderedDict({name: layers[name] for name in names} | deeper | rest))


def small_network(conv1, conv2):
    """LeNet-5's convolutions with other kernels, (C, 1, h, w) and (D, C, h, w), padded to keep the size, no biases."""
    model, layers = LeNet5(cnn_cifar10.Config()), OrderedDict()
    for number, kernels in enumerate((conv1, conv2), start=1):
        layer = nn.Conv2d(*kernels.shape[1::-1], kernels.shape[-1], padding=kernels.shape[-1] // 2, bias=False)
        layer.weight = nn.Parameter(kernels)
        layers |= {f"conv{number}": layer, f"pool{number}": nn.MaxPool2d(2), f"relu{number}": nn.ReLU()}
    model.layers = nn.Sequential(layers)
    return model


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other gain nothing on networks and images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def random_lenet5():
    torch.manual_seed(0)
    return LeNet5(cnn_cifar10.Config())


@pytest.fixture
def deep_lenet5():
    torch.manual_seed(0)
    return DeepLeNet5(cnn_cifar10.Config())


def random_images(count, size=32):
    return torch.randint(256, (count, size, size), dtype=torch.uint8)


# A linear classifier


def solved_by_numpy(features, labels, classes, strength):
    """Return weights and bias of the same ridge regression, in float64, as least squares with rows for the penalty."""
    features, targets = features.double().numpy(), np.eye(classes)[labels]
    centred = features - features.mean(0)
    variance = (centred**2).sum(0).mean()
    penalty = math.sqrt(strength * variance + 1e-6) * np.eye(features.shape[1])
    wanted = np.vstack([targets - targets.mean(0), np.zeros((len(penalty), classes))])
    weights, *_ = np.linalg.lstsq(np.vstack([centred, penalty]), wanted, rcond=None)
    return weights, targets.mean(0) - features.mean(0) @ weights


@pytest.mark.parametrize(("count", "size"), [(60, 7), (20, 50)])
def test_ridge_classifiers_are_those_of_least_squares(count, size):
    """Also where there are fewer images than features."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + torch.rand(count, size, generator=generator) * torch.arange(1, size + 1)
    labels, strengths = torch.randint(3, (count,), generator=generator), (0.01, 0.1, 1.0)
    found = visualize.ridge_classifiers(features, labels, 3, strengths)
    for (weights, bias), strength in zip(found, strengths, strict=True):
        expected = solved_by_numpy(features, labels, 3, strength)
        assert (weights.dtype, weights.shape, bias.shape) == (torch.float32, (size, 3), (3,))
        np.testing.assert_allclose(weights, expected[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bias, expected[1], rtol=1e-3, atol=1e-3)


def test_features_that_tell_nothing_give_the_most_frequent_class():
    labels, test_labels = torch.tensor([1, 2, 2, 0, 2] * 4), torch.tensor([2, 2, 2, 0])
    ((weights, bias),) = visualize.ridge_classifiers(torch.full((20, 4), 0.3), labels, 3, [0.1])
    assert weights.abs().max() < 1e-3
    assert bias.tolist() == pytest.approx([0.2, 0.2, 0.6], abs=1e-3)
    found = visualize.readable(torch.full((20, 4), 0.3), labels, torch.full((4, 4), 0.3), test_labels, 3)
    assert found == 75


@pytest.mark.parametrize("strengths", [(1e-4, 3.0), (3.0, 1e-4)])
def test_the_strength_is_the_best_one_on_features_that_are_not_fitted(monkeypatch, strengths):
    monkeypatch.setattr(visualize, "RIDGE_STRENGTHS", strengths)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (600,), generator=generator)
    features = torch.randn(600, 70, generator=generator)
    features[:, :3] += F.one_hot(labels)
    fitted, held_out, test = slice(80), slice(80, 100), slice(100, 600)
    shares = {}
    for strength in strengths:
        weights, bias = solved_by_numpy(features[fitted], labels[fitted], 3, strength)
        answers = (features.double().numpy() @ weights + bias).argmax(1) == labels.numpy()
        shares[strength] = answers[held_out].mean(), 100 * answers[test].mean()
    assert shares[3.0][0] > shares[1e-4][0]
    found = visualize.readable(features[:100], labels[:100], features[test], labels[test], 3)
    assert found == pytest.approx(shares[3.0][1])
    assert found > shares[1e-4][1] + 5


@pytest.mark.parametrize("without", ["nothing", "conv1", "conv2", "fc1", "conv1+conv2"])
def test_features_of_layers_are_what_relu_lets_through_and_the_pixels(without):
    model, images = LeNet5(cnn_cifar10.Config(without=without)), random_images(5)
    found, outputs = visualize.layer_features(model, images, batch_size=2), model.outputs(images)
    rectified = {"pool1": "relu1", "pool2": "relu2", "fc1": "relu_fc1"}
    assert list(found) == ["pixels", *(name for name in rectified if name in outputs)]
    torch.testing.assert_close(found.pop("pixels"), images.flatten(1) / 255)
    for name, features in found.items():
        torch.testing.assert_close(features, outputs[rectified[name]].flatten(1))
        assert features.min() >= 0


def test_layers_are_measured_trained_and_untrained_on_the_first_training_images(tiny_pictures, monkeypatch):
    monkeypatch.setattr(visualize, "RIDGE_IMAGES", 50)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LeNet5(cnn_cifar10.Config(without="conv1+conv2")))
    run = SimpleNamespace(model=models[0], untrained_model=lambda: models[1], data=tiny_pictures)
    rows = visualize.measure_layers(run).rows
    assert [(row["network"], row["layer"]) for row in rows] == [
        (state, layer) for state in ("trained", "untrained") for layer in ("pixels", "pool1", "pool2", "fc1")
    ]
    assert visualize.MEASUREMENTS["layers"].is_whole(rows)
    assert not visualize.MEASUREMENTS["layers"].is_whole(rows[:4])
    train, test = tiny_pictures.train, tiny_pictures.test
    for row, model in zip(rows[3::4], models, strict=True):
        with torch.no_grad():
            fitted, tested = (model.outputs(images)["relu_fc1"] for images in (train.images[:50], test.images))
        assert row["accuracy"] == visualize.readable(fitted, train.labels[:50], tested, test.labels, 10)
    assert rows[0]["accuracy"] == rows[4]["accuracy"], "training does not change the pixels"


# The deconvolutional network


def test_deconvolution_of_a_network_small_enough_for_paper():
    """conv1: two 3 x 3 kernels; conv2: their pooled maps weighted by 3 and -1.

    The only strong pixel, 5 at row 1, column 2, excites map 0 at row 2, column 2 (its kernel looks up, weight 1, and
    right, weight 2) and, more strongly, at row 1, column 1: 10. Map 1, the centre's double, sees 10 where the pixel is.
    """
    conv1 = torch.tensor([[[[0.0, 1, 0], [0, 0, 2], [0, 0, 0]]], [[[0.0, 0, 0], [0, 2, 0], [0, 0, 0]]]])
    conv2 = torch.tensor([[[[3.0]], [[-1.0]]]])
    model, image = small_network(conv1, conv2), torch.zeros(1, 4, 4)
    image[0, 1, 2] = 5 * 255
    first = visualize.deconvolve(model, image, "conv1", torch.tensor([0]))[0, 0]
    assert first.tolist() == [[0, 10, 0, 0], [0, 0, 20, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # pool1: map 0 has 10 at top left (switch: row 1, column 1) and 5 at bottom right; map 1 has 10 at top right.
    # conv2: 30 at top left, 15 at bottom right; the 30 goes back as 90 in map 0 and as -30, rectified to 0, in map 1.
    second = visualize.deconvolve(model, image, "conv2", torch.tensor([0]))[0, 0]
    assert second.tolist() == [[0, 90, 0, 0], [0, 0, 180, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


class DeconvolvedReLU(torch.autograd.Function):
    """ReLU whose backward pass rectifies what comes back, whatever went forward."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


def backpropagated(model, images, layer, feature_maps):
    """Section 2.1's projection by automatic differentiation: an independent way to the same pixels."""
    inputs = (images[:, None] / 255).requires_grad_()
    maps, stages = {}, inputs
    for number in range(1, len([name for name in dir(model.layers) if name.startswith("conv")]) + 1):
        convolved = F.conv2d(stages, *getattr(model.layers, f"conv{number}").parameters(), padding=2)
        maps[f"conv{number}"] = DeconvolvedReLU.apply(convolved)
        maps[f"pool{number}"] = stages = F.max_pool2d(maps[f"conv{number}"], 2)
    strongest = torch.stack([maps[layer][image, k].max() for image, k in enumerate(feature_maps)])
    assert (strongest > 0).all()
    return torch.autograd.grad((strongest.detach() * strongest).sum(), inputs)[0]


@pytest.mark.parametrize(
    ("network", "layer"),
    [("random_lenet5", layer) for layer in LAYERS] + [("deep_lenet5", layer) for layer in DEEP_LAYERS],
)
def test_deconvolution_is_backpropagation_that_rectifies_on_its_way(request, network, layer):
    model, images, maps = request.getfixturevalue(network), random_images(3), torch.tensor([3, 0, 17])
    found = visualize.deconvolve(model, images, layer, maps)
    torch.testing.assert_close(found, backpropagated(model, images, layer, maps))
    assert found.min() < 0, "the pixels are not rectified"


@pytest.mark.parametrize("layer", LAYERS)
def test_deconvolution_is_linear_in_the_activation_that_it_starts_from(random_lenet5, layer):
    images, factors = random_images(4), torch.tensor([0.1, 1, 3, 50]).view(4, 1, 1, 1)
    with torch.no_grad():
        outputs = random_lenet5.outputs(images)
        switches = visualize.find_switches(random_lenet5, outputs)
        alone = visualize.strongest_alone(F.relu(outputs[layer]), torch.tensor([1, 2, 3, 4]))
        assert (alone.flatten(1) != 0).sum(1).tolist() == [1, 1, 1, 1]
        projected = visualize.project_back(random_lenet5, layer, alone, switches)
        scaled = visualize.project_back(random_lenet5, layer, factors * alone, switches)
    torch.testing.assert_close(scaled, factors * projected)


def test_unpooling_is_the_inverse_of_pooling_at_the_switches(random_lenet5):
    with torch.no_grad():
        outputs = random_lenet5.outputs(random_images(2))
        switches = visualize.find_switches(random_lenet5, outputs)
    assert list(switches) == ["pool1", "pool2"]
    for number in (1, 2):
        pooled, before = (F.relu(outputs[f"{kind}{number}"]) for kind in ("pool", "conv"))
        places, size = switches[f"pool{number}"]
        unpooled = F.max_unpool2d(pooled, places, 2, output_size=size)
        assert unpooled.shape == before.shape
        torch.testing.assert_close(F.max_pool2d(unpooled, 2), pooled, rtol=0, atol=0)
        assert torch.equal(unpooled[unpooled != 0], before[unpooled != 0])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("conv1", (5, 1, -2)),
        ("pool1", (6, 2, -2)),
        ("conv2", (14, 2, -6)),
        ("pool2", (16, 4, -6)),
        ("conv3", (32, 4, -14)),
        ("pool3", (36, 8, -14)),
    ],
)
def test_receptive_field_is_where_the_gradient_goes(deep_lenet5, layer, expected):
    """The kernels are all positive, so that no path from a pixel to the unit cancels another."""
    for name in ("conv1", "conv2", "conv3"):
        nn.init.uniform_(getattr(deep_lenet5.layers, name).weight, 0.1, 1)
    assert visualize.receptive_field(deep_lenet5, layer) == expected
    size, stride, offset = expected
    inputs = (255 * torch.rand(60, 32, 32)).requires_grad_()
    row, column = 3, 2
    unit = deep_lenet5.outputs(inputs)[layer][:, :, row, column].sum()
    (gradient,) = torch.autograd.grad(unit, inputs)
    seen = (gradient.abs().sum(0) > 0).nonzero()
    bounds = [(max(0, offset + stride * i), min(31, offset + stride * i + size - 1)) for i in (row, column)]
    assert [(low.item(), high.item()) for low, high in zip(*seen.aminmax(dim=0), strict=True)] == bounds


@pytest.mark.parametrize("network", ["random_lenet5", "deep_lenet5"])
def test_activations_are_those_of_each_convolution_after_relu(request, network):
    model, images = request.getfixturevalue(network), random_images(2)
    found = visualize.activations_of(model, images)
    assert list(found) == visualize.convolutions(model) == ["conv1", "conv2", "conv3"][: len(found)]
    before = images[:, None] / 255
    for layer, maps in found.items():
        expected = F.relu(getattr(model.layers, layer)(before))
        torch.testing.assert_close(maps, expected)
        before = F.max_pool2d(expected, 2)


def test_most_exciting_images_are_found_by_one_pass(random_lenet5):
    images = random_images(40)
    found = visualize.most_exciting(random_lenet5, images, count=9, batch_size=7)
    for layer, maps in visualize.activations_of(random_lenet5, images).items():
        exciting = found[layer]
        for k in (0, 5, 31):
            order = maps[:, k].amax((1, 2)).sort(descending=True)
            assert exciting.images[:, k].tolist() == order.indices[:9].tolist()
            torch.testing.assert_close(exciting.strengths[:, k], order.values[:9])
            place = divmod(maps[exciting.images[0, k], k].argmax().item(), maps.shape[3])
            assert (exciting.rows[0, k], exciting.columns[0, k]) == place


def test_patches_are_cut_to_the_receptive_field_and_end_at_the_image(random_lenet5):
    image = torch.arange(32 * 32).view(1, 32, 32)
    (patch,) = visualize.cut_patches(random_lenet5, "conv1", image, torch.tensor([10]), torch.tensor([20]))
    assert torch.equal(patch, image[0, 8:13, 18:23].float())
    (patch,) = visualize.cut_patches(random_lenet5, "conv2", image, torch.tensor([0]), torch.tensor([15]))
    assert patch.shape == (14, 14)
    assert torch.equal(patch[6:, :8], image[0, :8, 24:].float())
    assert patch.isnan().sum() == 14 * 14 - 8 * 8


@pytest.mark.parametrize(("network", "layer"), [("random_lenet5", "conv2"), ("deep_lenet5", "conv3")])
def test_a_reconstruction_stays_within_the_receptive_field(request, network, layer):
    model, images = request.getfixturevalue(network), random_images(20)
    size, *_ = visualize.receptive_field(model, layer)
    exciting = visualize.most_exciting(model, images, count=3)[layer]
    maps = torch.tensor([4, 9])
    cut, patches = visualize.exciting_patches(model, layer, images, exciting, maps)
    assert cut.shape == patches.shape == (2, 3, size, size)
    whole = visualize.deconvolve(model, images[exciting.images[:, 9]], layer, torch.tensor([9, 9, 9]))
    torch.testing.assert_close(cut[1].nan_to_num().abs().sum((1, 2)), whole.abs().sum((1, 2, 3)))


def test_the_maps_that_are_drawn_look_inside_the_image(random_lenet5):
    """A unit of conv2 sees the pixels from 2 i - 6 to 2 i + 7: all of them lie inside a picture of 32 for i 3 to 12."""
    places = torch.tensor([[3, 2, 12, 5], [12, 9, 13, 3]])  # (count, C): map 0 is inside twice, 2 and 1 once, 3 twice
    strengths = torch.tensor([[1.0, 9.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    exciting = visualize.Exciting(strengths, torch.zeros(2, 4).long(), places, places.clamp(3, 12))
    assert visualize.inside_first(random_lenet5, "conv2", exciting, 32, 2).tolist() == [0, 3]
    assert visualize.inside_first(random_lenet5, "conv2", exciting, 32, 3).tolist() == [0, 1, 3], "then the strongest"
    assert visualize.inside_first(random_lenet5, "conv2", exciting, 32, 9).tolist() == [0, 1, 2, 3]


def test_what_evolves_is_sought_anew_for_each_model(random_lenet5, deep_lenet5):
    torch.manual_seed(1)
    models, images = [random_lenet5, LeNet5(cnn_cifar10.Config())], random_images(12)
    maps = {"conv1": torch.tensor([0, 4]), "conv2": torch.tensor([1, 2, 3])}
    evolved = visualize.evolving_patches(models, images, maps)
    for layer, numbers in maps.items():
        size, *_ = visualize.receptive_field(random_lenet5, layer)
        pictures, strengths = evolved[layer]
        assert pictures.shape == (len(numbers), 2, size, size)
        for place, model in enumerate(models):
            activations = visualize.activations_of(model, images)[layer][:, numbers]
            torch.testing.assert_close(strengths[:, place], activations.amax((0, 2, 3)))


# Invariance, occlusion, silenced maps, Gabor functions


def test_transformations_move_scale_and_turn():
    images = torch.randint(256, (2, 8, 8)).float()
    down = visualize.transform(images, "vertical shift in pixels", 3)
    torch.testing.assert_close(down[:, 3:], images[:, :-3], atol=1e-2, rtol=0)
    up = visualize.transform(images, "vertical shift in pixels", -2)
    torch.testing.assert_close(up[:, :-2], images[:, 2:], atol=1e-2, rtol=0)
    turned = visualize.transform(images, "rotation in degrees", 90)
    torch.testing.assert_close(turned, images.rot90(1, (1, 2)), atol=1e-2, rtol=0)
    for kind, amount in (("scale", 1.0), ("rotation in degrees", 360.0)):
        torch.testing.assert_close(visualize.transform(images, kind, amount), images, atol=1e-2, rtol=0)
    centre = torch.zeros(1, 8, 8)
    centre[:, 3:5, 3:5] = 1
    assert visualize.transform(centre, "scale", 2)[0, 2:6, 2:6].min() > 0.5


def test_what_a_transformation_brings_in_repeats_the_edge():
    images = torch.randint(100, 256, (3, 32, 32))
    moved = visualize.transform(images, "vertical shift in pixels", 3)
    torch.testing.assert_close(moved[:, :3], images[:, :1].expand(3, 3, 32).float(), atol=1e-2, rtol=0)
    moved = visualize.transform(images, "vertical shift in pixels", -8)
    torch.testing.assert_close(moved[:, -8:], images[:, -1:].expand(3, 8, 32).float(), atol=1e-2, rtol=0)
    for kind, amounts in visualize.TRANSFORMATIONS.items():
        darkest = min(visualize.transform(images, kind, amount).min() for amount in amounts)
        assert darkest > 99, "no black comes in"


def test_sensitivity_is_nothing_where_nothing_is_transformed(random_lenet5):
    images = random_images(2).repeat(2, 1, 1)
    labels = torch.cat([random_lenet5(images[:2]).argmax(1), torch.tensor([-1, -1])])
    for kind, amounts in visualize.TRANSFORMATIONS.items():
        still = amounts.tolist().index(1 if kind == "scale" else 0)
        first, last, right = visualize.sensitivity(random_lenet5, images, labels, kind)
        assert first.shape == last.shape == right.shape == (len(amounts), 4)
        assert max(first[still].max(), last[still].max()) < 1e-4
        assert first[-2].min() > 0.1
        assert right[still].tolist() == [1, 1, 0, 0]


def test_distances_are_relative_to_the_features_of_the_untransformed_image(random_lenet5):
    images, kind = random_images(4), "vertical shift in pixels"
    first, last, right = visualize.sensitivity(random_lenet5, images, torch.tensor([0, 1, 2, 3]), kind)
    moved = random_lenet5.outputs(visualize.transform(images, kind, 5))
    original, place = random_lenet5.outputs(images), visualize.TRANSFORMATIONS[kind].tolist().index(5)
    for name, found in (("relu1", first), ("relu_fc1", last)):
        before, after = original[name].flatten(1), moved[name].flatten(1)
        torch.testing.assert_close(found[place], (after - before).norm(dim=1) / before.norm(dim=1))
    assert right[place].tolist() == (moved["fc2"].argmax(1) == torch.tensor([0, 1, 2, 3])).float().tolist()


def test_occluding_by_a_square_of_zero_area_changes_nothing(random_lenet5):
    image = random_images(1)
    assert torch.equal(visualize.occluded(image, 0), image.float().expand(1024, 32, 32))
    found = visualize.occlude(random_lenet5, image, 4, 0)
    probabilities = random_lenet5(image).softmax(1)[0]
    torch.testing.assert_close(found.probability, probabilities[4].expand(32, 32))
    assert (found.predicted == probabilities.argmax()).all()


def test_the_square_hides_what_lies_about_its_centre():
    image = random_images(1, size=28)
    pictures = visualize.occluded(image, 4).view(28, 28, 28, 28)
    expected = image[0].float()
    expected[8:12, 18:22] = 127.5
    assert torch.equal(pictures[10, 20], expected)
    assert (pictures[0, 0] == 127.5).sum() == 4, "two by two pixels are left of it in the corner"
    found = visualize.occlude(LeNet5(cnn_cifar10.Config(dataset="mnist")), image, 0, 100)
    assert found.probability.std() == pytest.approx(0, abs=1e-6), "all is gray wherever it stands"


@pytest.mark.parametrize(("network", "layer"), [("random_lenet5", "conv2"), ("deep_lenet5", "conv3")])
def test_the_map_that_is_watched_under_the_square_has_the_highest_peak_of_the_last_convolution(request, network, layer):
    model, image = request.getfixturevalue(network), torch.zeros(1, 32, 32)
    image[:, 10:16, 10:16] = random_images(1, size=6)
    maps = visualize.activations_of(model, image)[layer][0]
    found = visualize.occlude(model, image, 3, 8)
    assert found.feature_map == maps.amax((1, 2)).argmax()
    assert found.feature_map != maps.sum((1, 2)).argmax() or network == "deep_lenet5", "the peak is not the sum"
    hidden = visualize.activations_of(model, visualize.occluded(image, 8)[[5 * 32 + 7]])[layer][0]
    assert found.activity[5, 7].item() == pytest.approx(hidden[found.feature_map].sum().item(), rel=1e-4)


def without_map(model, layer, images, number):
    """Return the classes that a network finds when a map of a convolution is made zero by its weights."""
    convolution = getattr(model.layers, layer)
    kept = [parameter.detach().clone() for parameter in convolution.parameters()]
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter[number] = 0
        predicted = model(images).argmax(1)
        for parameter, values in zip(convolution.parameters(), kept, strict=True):
            parameter.copy_(values)
    return predicted


@pytest.mark.parametrize("network", ["random_lenet5", "deep_lenet5"])
def test_silencing_a_map_is_setting_it_to_zero(request, network):
    model, images = request.getfixturevalue(network), random_images(8)
    for layer in visualize.convolutions(model):
        found = visualize.predict_without_maps(model, images, layer, batch_size=5)
        assert found.shape == (getattr(model.layers, layer).out_channels, 8)
        for number in (0, 7, 23):
            assert torch.equal(found[number], without_map(model, layer, images, number))


PRECISIONS = pytest.mark.parametrize(("precision", "other"), [("fp32", "bf16"), ("bf16", "fp32")])


def hesitant_networks(*precisions):
    """Return one network in several precisions: its classes are so alike that their answers depend on the precision.

    Map 5 of its first convolution is silent.
    """
    torch.manual_seed(0)
    models = [LeNet5(cnn_cifar10.Config(), precision) for precision in precisions]
    with torch.no_grad():
        weight, bias = models[0].layers.fc2.parameters()
        weight.copy_(weight[0] + 1e-4 * torch.randn(weight.shape))
        bias.zero_()
        for parameter in models[0].layers.conv1.parameters():
            parameter[5] = 0
    for model in models:
        model.load_state_dict(models[0].state_dict())
    return models


@PRECISIONS
def test_silencing_a_map_that_is_silent_changes_no_answer(precision, other):
    models, images = hesitant_networks(precision, other), random_images(40)
    answers, others = (utils.predict(model, images).argmax(1) for model in models)
    assert not torch.equal(answers, others)
    assert torch.equal(visualize.predict_without_maps(models[0], images, "conv1")[5], answers)


def test_class_accuracies_are_those_of_each_class_and_of_all():
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    assert visualize.class_accuracies(predicted, labels, 2).tolist() == [[50, 100, 75], [0, 50, 25]]


def test_a_gabor_function_is_found_again():
    frequencies, angles = torch.tensor([0.2, 0.3, 0.25]), torch.tensor([0.0, 45.0, 120.0])
    place = [torch.full((3, 1), value) for value in (0.2, -0.3, 1.5, 2.0)]
    even, odd = visualize.gabor_waves(5, *place, frequencies[:, None], torch.deg2rad(angles)[:, None])
    kernels = (0.3 * even - 0.2 * odd).view(3, 5, 5)
    found = visualize.fit_gabor(kernels)
    assert found.r2.min() > 0.99
    torch.testing.assert_close(found.fitted, kernels, atol=0.02, rtol=0)
    torch.testing.assert_close(found.frequency, frequencies, atol=0.03, rtol=0)
    difference = (found.orientation - angles + 90) % 180 - 90
    assert difference.abs().max() < 5


def test_r2_is_the_share_of_variance_about_the_mean(monkeypatch):
    monkeypatch.setattr(visualize, "GABOR_STARTS", 4)
    kernels = 0.5 + 0.1 * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = visualize.fit_gabor(kernels, steps=30)
    errors = (kernels - found.fitted).square().sum((1, 2))
    torch.testing.assert_close(found.r2, 1 - errors / (25 * kernels.flatten(1).var(1, correction=0)))


def test_shuffled_kernels_keep_their_pixels_and_are_fitted_less_well(monkeypatch):
    monkeypatch.setattr(visualize, "GABOR_STARTS", 12)
    even, _ = visualize.gabor_waves(5, *torch.tensor([0.0, 0, 1.5, 2, 0.2, 0.5])[:, None])
    kernels = even.view(1, 5, 5).repeat(8, 1, 1)
    start = 0.1 * torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(0))
    fits = visualize.gabor_fits(kernels, start)
    assert list(fits) == ["trained", "shuffled", "untrained"]
    assert torch.equal(fits["trained"][0], kernels)
    assert torch.equal(fits["untrained"][0], start)
    shuffled, fit = fits["shuffled"]
    assert torch.equal(shuffled.flatten(1).sort().values, kernels.flatten(1).sort().values)
    assert len({tuple(kernel.flatten().tolist()) for kernel in shuffled}) == 8, "each in an order of its own"
    assert fits["trained"][1].r2.min() > 0.99 > 0.9 > fit.r2.median()
    assert fit.fitted.norm(dim=(1, 2)).max() < 1.01 * kernels[0].norm()


# Inside the recurrent networks


def row_reader(cell, hidden_size, row_length=28, **settings):
    return RowReader(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings), row_length)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_gradient_norms_agree_with_finite_differences(cell):
    """The top layer's state is nudged between two rows, and the loss watched; the images are sequences already."""
    torch.manual_seed(1)
    model, labels = row_reader(cell, 3, row_length=4).double(), torch.tensor([7])
    model.rows = lambda sequences: sequences
    inputs, nudge = torch.randn(1, 6, 4, dtype=torch.double), 1e-6
    norms = visualize.gradient_norms(model, inputs, labels)
    assert list(norms) == ["hidden", "cell"][: 1 + (cell == "lstm")]

    def loss(step, which, unit, change):
        outputs, state = model.recurrent(inputs[:, :step])
        parts = [part.clone() for part in (state if cell == "lstm" else (state,))]
        parts[which][-1, 0, unit] += change
        if step < inputs.shape[1]:
            _, state = model.recurrent(inputs[:, step:], tuple(parts) if cell == "lstm" else parts[0])
            parts = state if cell == "lstm" else (state,)
        return F.cross_entropy(model.fc(parts[0][-1]), labels).item()

    for which, state in enumerate(norms):
        for step in (1, 4, 6):
            slopes = [
                (loss(step, which, unit, nudge) - loss(step, which, unit, -nudge)) / (2 * nudge) for unit in range(3)
            ]
            assert norms[state][step - 1].item() == pytest.approx(math.hypot(*slopes), rel=1e-4, abs=1e-9)


def test_gradient_norms_are_averaged_over_images_and_span_the_blank_rows():
    model, images, labels = row_reader("gru", 4, rows_after=3), random_images(2, size=28), torch.tensor([0, 1])
    together = visualize.gradient_norms(model, images, labels)["hidden"]
    alone = [visualize.gradient_norms(model, images[i : i + 1], labels[i : i + 1])["hidden"] for i in (0, 1)]
    assert together.shape == (31,)
    torch.testing.assert_close(together, torch.stack(alone).mean(0))


@pytest.fixture
def echo():
    """A plain RNN whose top layer's state at a step is a factor times the one before: set by echo(factor)."""

    def build(factor):
        model = row_reader("rnn", 4)
        with torch.no_grad():
            for name, parameter in model.recurrent.named_parameters():
                parameter.copy_(factor * torch.eye(4) if name == "weight_hh_l1" else torch.zeros_like(parameter))
        return model

    return build


def test_gradient_of_an_rnn_with_known_weights_vanishes_at_the_known_rate(echo):
    """Without input and bias every state is zero and tanh has slope one: a step back multiplies by W_hh = 0.5 I."""
    norms = visualize.gradient_norms(echo(0.5), torch.zeros(2, 28, 28), torch.tensor([0, 1]))["hidden"]
    assert norms[-1] > 0
    torch.testing.assert_close(norms / norms[-1], 0.5 ** torch.arange(27.0, -1, -1))


def test_a_gradient_of_nothing_is_measured_as_nothing(echo):
    norms = visualize.gradient_norms(echo(0.0), torch.zeros(2, 28, 28), torch.tensor([0, 1]))["hidden"]
    assert norms[-1] > 0
    assert norms[:-1].tolist() == [0] * 27


def gradient_rows(norms, epoch=0, state="hidden"):
    return [{"epoch": epoch, "state": state, "step": step, "norm": norm} for step, norm in enumerate(norms, start=1)]


@pytest.fixture
def measured(monkeypatch):
    """Let a run have measured gradients: rows of gradients.csv."""

    def let(*rows):
        monkeypatch.setattr(visualize, "read_measured", lambda run, name: sum(rows, []))

    return let


def test_the_factor_that_a_step_back_leaves_is_that_of_steps_25_to_5(measured):
    halved = [0.5 ** (28 - step) for step in range(1, 29)]
    measured(gradient_rows(halved), gradient_rows([1.0] * 28, epoch=10), gradient_rows([2.0] * 28, 10, "cell"))
    assert visualize.gradient_kept("hidden", 0)(None) == pytest.approx(0.5)
    assert visualize.gradient_kept("hidden", -1)(None) == pytest.approx(1)
    assert visualize.gradient_kept("cell", -1)(None) == pytest.approx(1)
    spoiled = [9.0, 9, 9, 9, *halved[4:25], 9, 9, 9]
    measured(gradient_rows(spoiled))
    assert visualize.gradient_kept("hidden", 0)(None) == pytest.approx(0.5), "the other steps do not count"


@pytest.mark.parametrize("norms", [[0.0] * 27 + [1.0], [0.0] * 5 + [1.0] * 23])
def test_nothing_is_kept_of_a_gradient_that_vanished_altogether(measured, norms):
    measured(gradient_rows(norms))
    assert visualize.gradient_kept("hidden", 0)(None) == 0


def test_a_run_that_was_not_measured_after_an_epoch_keeps_no_known_factor(measured):
    measured([])
    assert visualize.gradient_kept("hidden", 0)(None) is None
    measured(gradient_rows([1.0] * 28), gradient_rows([1.0] * 28, epoch=12))
    assert visualize.gradient_kept("hidden", 10)(None) is None


def test_the_share_that_reaches_the_first_row_is_that_of_the_larger_state():
    rows = gradient_rows([1e-8, 1.0, 2.0]) + gradient_rows([1e-4, 1.0, 0.0], state="cell")
    rows += gradient_rows([0.5, 1.0, 2.0], epoch=2) + gradient_rows([1e-4, 1.0, 0.0], epoch=2, state="cell")
    epochs, shares = visualize.reach_by_epoch(rows)
    assert epochs == [0, 2]
    assert shares == pytest.approx([0.5e-4, 0.25])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_probabilities_by_row_are_those_of_an_image_that_ends_there(cell):
    model, images = row_reader(cell, 6), random_images(3, size=28)
    probabilities = visualize.probabilities_by_row(model, images, batch_size=2)
    assert probabilities.shape == (3, 28, 10)
    for rows in (1, 13, 28):
        torch.testing.assert_close(probabilities[:, rows - 1], model(images[:, :rows]).softmax(1))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_states_by_row_are_those_that_the_network_has_when_an_image_ends_there(cell):
    model, images = row_reader(cell, 6, rows_before=2, rows_after=1), random_images(3, size=28)
    rows = model.rows(images)
    outputs, _ = model.recurrent(rows)
    states = list(visualize.states_by_row(model, images))
    assert len(states) == 31
    for step, state in enumerate(states):
        torch.testing.assert_close(state[0][-1], outputs[:, step])
        _, expected = model.recurrent(rows[:, : step + 1])
        torch.testing.assert_close(state, expected if cell == "lstm" else (expected,))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_a_state_knows_is_nothing_before_the_first_row_and_is_read_from_all_of_it(cell):
    """Images are about as bright as their class says; a third of them are of class 2."""
    torch.manual_seed(0)
    model, labels = row_reader(cell, 8, rows_before=2, rows_after=1), torch.tensor([0, 1, 2, 2, 3, 4] * 20)
    brightness = (50 * labels + torch.randint(56, (120,))).to(torch.uint8)
    split = utils.Split(brightness[:, None, None].expand(-1, 28, 28), labels)
    known = visualize.readable_by_row(model, split, split, 5)
    assert len(known) == 31
    assert known[:2] == [pytest.approx(100 / 3)] * 2
    assert min(known[2:30]) > 50
    with torch.no_grad():
        _, state = model.recurrent(model.rows(split.images)[:, :7])
    parts = [part.transpose(0, 1).flatten(1) for part in (state if cell == "lstm" else (state,))]
    whole, hidden = (visualize.readable(each, labels, each, labels, 5) for each in (torch.cat(parts, 1), parts[0]))
    assert known[6] == pytest.approx(whole, abs=1)
    assert whole > hidden + 2 or cell == "gru"


@pytest.mark.parametrize(("larger", "expected"), [("hidden", 40.0), ("cell", 50.0)])
def test_the_gradient_at_the_digit_is_that_of_its_last_row_before_training_in_the_larger_state(
    measured, larger, expected
):
    run = SimpleNamespace(config=rnn_mnist.Config(cell="lstm", rows_before=5, rows_after=7))
    hidden, cell = [[100.0] * 40 for _ in range(2)]
    hidden[5 + 28 - 1], cell[5 + 28 - 1] = 40.0, {"hidden": 1e-3, "cell": 50.0}[larger]
    measured(gradient_rows(hidden), gradient_rows(cell, 0, "cell"), gradient_rows([1e3] * 40, epoch=10))
    assert visualize.gradient_at_digit(run) == expected
    assert visualize.log_gradient_at_digit(run) == pytest.approx(math.log10(expected))


def test_a_gradient_at_the_digit_that_vanished_or_was_not_measured(measured):
    run = SimpleNamespace(config=rnn_mnist.Config(rows_after=2))
    measured(gradient_rows([0.0] * 28 + [0.5, 1.0]))
    assert (visualize.gradient_at_digit(run), visualize.log_gradient_at_digit(run)) == (0, -16)
    for rows in ([], gradient_rows([1.0] * 30, epoch=10)):
        measured(rows)
        assert (visualize.gradient_at_digit(run), visualize.log_gradient_at_digit(run)) == (None, None)


# From a run's folder


@pytest.mark.parametrize("kind", ["cnn_run", "rnn_run"])
def test_snapshots_and_the_untrained_network_are_those_of_the_run(request, kind):
    run = visualize.SavedRun(request.getfixturevalue(kind)[1])
    start, middle, end = (run.snapshot(epoch).state_dict() for epoch in (0, 1, EPOCHS))
    untrained, trained = run.untrained_model().state_dict(), run.model.state_dict()
    kept = [name for name in trained if kind == "rnn_run" or name.startswith("layers.conv")]
    assert len(kept) == (4 if kind == "cnn_run" else 10)
    for name in kept:
        assert torch.equal(start[name], untrained[name])
        assert torch.equal(end[name], trained[name])
        assert not torch.equal(start[name], end[name])
        assert not torch.equal(middle[name], end[name])


def test_the_gabor_table_holds_the_kernels_both_null_models_and_how_far_they_moved(cnn_run, monkeypatch):
    monkeypatch.setattr(visualize, "GABOR_STARTS", 2)
    run = visualize.SavedRun(cnn_run[1])
    rows = visualize.MEASUREMENTS["gabor"].measure(run).rows
    assert [(row["kernels"], row["feature_map"]) for row in rows] == [
        (kernels, number) for kernels in ("trained", "shuffled", "untrained") for number in range(32)
    ]
    trained, start = (visualize.first_kernels(model) for model in (run.model, run.untrained_model()))
    fits = visualize.gabor_fits(trained, start, run.config.seed)
    for name, value in (("r2", "r2"), ("orientation_degrees", "orientation"), ("cycles_per_pixel", "frequency")):
        expected = torch.cat([getattr(fit, value) for _, fit in fits.values()])
        assert [row[name] for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(row["r2"] <= 1 and 0 <= row["cycles_per_pixel"] <= 0.5 for row in rows)
    cosines = F.cosine_similarity(trained.flatten(1), start.flatten(1)).tolist()
    assert [row["cosine_to_start"] for row in rows[:32]] == pytest.approx(cosines, abs=1e-6)
    assert [row["cosine_to_start"] for row in rows[64:]] == pytest.approx([1] * 32)
    assert max(abs(row["cosine_to_start"]) for row in rows[32:64]) < 0.9
