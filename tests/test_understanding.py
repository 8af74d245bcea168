"""What the networks learned: the deconvolutional views checked against the paper, the recurrent ones by definition."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EPOCHS
from matplotlib.image import imread
from torch import nn

import visualize
from cnn_cifar10 import LeNet5
from rnn_mnist import RowReader
from visualize import LAYERS


def lenet5(conv1, conv2):
    """A LeNet-5 with other convolutions: kernels (C, 1, h, w) and (D, C, h, w), padded to keep the size, no biases."""
    model = LeNet5()
    for name, kernels in (("conv1", conv1), ("conv2", conv2)):
        layer = nn.Conv2d(*kernels.shape[1::-1], kernels.shape[-1], padding=kernels.shape[-1] // 2, bias=False)
        layer.weight = nn.Parameter(kernels)
        setattr(model, name, layer)
    return model


@pytest.fixture
def random_lenet5():
    torch.manual_seed(0)
    return LeNet5()


# The deconvolutional network


def test_deconvolution_of_a_network_small_enough_for_paper():
    """conv1: two 3 x 3 kernels; conv2: their pooled maps weighted by 3 and -1.

    The only strong pixel, 5 at row 1, column 2, excites map 0 at row 2, column 2 (its kernel looks up, weight 1, and
    right, weight 2) and, more strongly, at row 1, column 1: 10. Map 1, the centre's double, sees 10 where the pixel is.
    """
    conv1 = torch.tensor([[[[0.0, 1, 0], [0, 0, 2], [0, 0, 0]]], [[[0.0, 0, 0], [0, 2, 0], [0, 0, 0]]]])
    conv2 = torch.tensor([[[[3.0]], [[-1.0]]]])
    model, image = lenet5(conv1, conv2), torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 2] = 5
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


@pytest.mark.parametrize("layer", LAYERS)
def test_deconvolution_is_backpropagation_that_rectifies_on_its_way(random_lenet5, layer):
    """Section 2.1's projection by automatic differentiation: an independent way to the same pixels."""
    model, inputs = random_lenet5, torch.rand(3, 1, 32, 32, requires_grad=True)
    maps = {"conv1": DeconvolvedReLU.apply(model.conv1(inputs))}
    maps["pool1"] = F.max_pool2d(maps["conv1"], 2)
    maps["conv2"] = DeconvolvedReLU.apply(model.conv2(maps["pool1"]))
    maps["pool2"] = F.max_pool2d(maps["conv2"], 2)
    chosen = torch.tensor([3, 0, 17])
    strongest = torch.stack([maps[layer][image, k].max() for image, k in enumerate(chosen)])
    assert (strongest > 0).all()
    (expected,) = torch.autograd.grad((strongest.detach() * strongest).sum(), inputs)
    found = visualize.deconvolve(model, inputs.detach(), layer, chosen)
    torch.testing.assert_close(found, expected)
    assert found.min() < 0, "the pixels are not rectified"


@pytest.mark.parametrize("layer", LAYERS)
def test_deconvolution_is_linear_in_the_activation_that_it_starts_from(random_lenet5, layer):
    inputs, factors = torch.rand(4, 1, 32, 32), torch.tensor([0.1, 1, 3, 50]).view(4, 1, 1, 1)
    with torch.no_grad():
        maps, switches = visualize.maps_and_switches(random_lenet5, inputs)
        alone = visualize.strongest_alone(maps[layer], torch.tensor([1, 2, 3, 4]))
        assert (alone.flatten(1) != 0).sum(1).tolist() == [1, 1, 1, 1]
        projected = visualize.project_back(random_lenet5, layer, alone, switches)
        scaled = visualize.project_back(random_lenet5, layer, factors * alone, switches)
    torch.testing.assert_close(scaled, factors * projected)


def test_unpooling_is_the_inverse_of_pooling_at_the_switches(random_lenet5):
    with torch.no_grad():
        maps, switches = visualize.maps_and_switches(random_lenet5, torch.rand(2, 1, 28, 28))
    for number in (1, 2):
        pooled, before = maps[f"pool{number}"], maps[f"conv{number}"]
        unpooled = F.max_unpool2d(pooled, switches[f"pool{number}"], visualize.POOL)
        assert unpooled.shape == before.shape
        torch.testing.assert_close(F.max_pool2d(unpooled, visualize.POOL), pooled, rtol=0, atol=0)
        assert torch.equal(unpooled[unpooled != 0], before[unpooled != 0])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [("conv1", (5, 1, -2)), ("pool1", (6, 2, -2)), ("conv2", (14, 2, -6)), ("pool2", (16, 4, -6))],
)
def test_receptive_field_is_where_the_gradient_goes(layer, expected):
    model = lenet5(torch.rand(2, 1, 5, 5), torch.rand(2, 2, 5, 5))
    assert visualize.receptive_field(model, layer) == expected
    size, stride, offset = expected
    inputs = torch.rand(300, 1, 32, 32, requires_grad=True)
    maps, _ = visualize.maps_and_switches(model, inputs)
    row, column = 3, 2
    (gradient,) = torch.autograd.grad(maps[layer][:, :, row, column].sum(), inputs)
    seen = (gradient.abs().sum((0, 1)) > 0).nonzero()
    bounds = [(max(0, offset + stride * i), offset + stride * i + size - 1) for i in (row, column)]
    assert [(low.item(), high.item()) for low, high in zip(*seen.aminmax(dim=0), strict=True)] == bounds


def test_most_exciting_images_are_found_by_one_pass(random_lenet5):
    images = torch.randint(256, (40, 32, 32), dtype=torch.uint8)
    found = visualize.most_exciting(random_lenet5, images, count=9, batch_size=7)
    for layer, maps in random_lenet5.activations(random_lenet5.prepare(images)).items():
        strengths, numbers, positions = found[layer]
        for k in (0, 5, 31):
            order = maps[:, k].amax((1, 2)).sort(descending=True)
            assert numbers[:, k].tolist() == order.indices[:9].tolist()
            torch.testing.assert_close(strengths[:, k], order.values[:9])
            assert positions[0, k] == maps[numbers[0, k], k].argmax()


def test_patches_are_cut_to_the_receptive_field_and_end_at_the_image(random_lenet5):
    image = torch.arange(32 * 32).view(1, 32, 32)
    (patch,) = visualize.cut_patches(random_lenet5, "conv1", image, torch.tensor([10 * 32 + 20]))
    assert torch.equal(patch, image[0, 8:13, 18:23].float())
    (patch,) = visualize.cut_patches(random_lenet5, "conv2", image, torch.tensor([15]))  # row 0, column 15 of 16
    assert patch.shape == (14, 14)
    assert torch.equal(patch[6:, :8], image[0, :8, 24:].float())
    assert patch.isnan().sum() == 14 * 14 - 8 * 8


def test_a_reconstruction_stays_within_the_receptive_field(random_lenet5):
    images = torch.randint(256, (20, 32, 32), dtype=torch.uint8)
    exciting = visualize.most_exciting(random_lenet5, images, count=3)["conv2"]
    maps = torch.tensor([4, 9])
    cut, patches = visualize.exciting_patches(random_lenet5, "conv2", images, exciting, maps)
    assert cut.shape == patches.shape == (2, 3, 14, 14)
    inputs = random_lenet5.prepare(images[exciting.images[:, 9]])
    whole = visualize.deconvolve(random_lenet5, inputs, "conv2", torch.tensor([9, 9, 9]))
    torch.testing.assert_close(cut[1].nan_to_num().abs().sum((1, 2)), whole.abs().sum((1, 2, 3)))


# Invariance, occlusion, ablation, Gabor functions


def test_transformations_move_scale_and_turn():
    inputs = torch.rand(2, 1, 8, 8)
    down = visualize.transform(inputs, "vertical shift in pixels", 3)
    torch.testing.assert_close(down[:, :, 3:], inputs[:, :, :-3])
    assert down[:, :, :3].abs().max() < 1e-5, "black comes in"
    turned = visualize.transform(inputs, "rotation in degrees", 90)
    torch.testing.assert_close(turned, inputs.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    for kind, amount in (("scale", 1.0), ("rotation in degrees", 360.0)):
        torch.testing.assert_close(visualize.transform(inputs, kind, amount), inputs, atol=1e-5, rtol=0)
    centre = torch.zeros(1, 1, 8, 8)
    centre[:, :, 3:5, 3:5] = 1
    assert visualize.transform(centre, "scale", 2)[0, 0, 2:6, 2:6].min() > 0.5


def test_sensitivity_is_nothing_where_nothing_is_transformed(random_lenet5):
    inputs, labels = torch.rand(3, 1, 32, 32), torch.tensor([1, 2, 3])
    for kind, amounts in visualize.TRANSFORMATIONS.items():
        still = amounts.tolist().index(1 if kind == "scale" else 0)
        first, last, probability = visualize.sensitivity(random_lenet5, inputs, labels, kind)
        assert first.shape == last.shape == probability.shape == (len(amounts), 3)
        assert first[still].max() < 1e-3 > last[still].max()
        expected = random_lenet5.probabilities(inputs)[range(3), labels]
        torch.testing.assert_close(probability[still], expected, atol=1e-4, rtol=0)
        assert first[-2].min() > 0.1


def test_occluding_by_a_square_of_zero_area_changes_nothing(random_lenet5):
    inputs = torch.rand(1, 1, 32, 32)
    assert torch.equal(visualize.occluded(inputs, 0), inputs.expand(1024, 1, 32, 32))
    found = visualize.occlude(random_lenet5, inputs, 4, 0)
    probabilities = random_lenet5.probabilities(inputs)[0]
    torch.testing.assert_close(found.probability, probabilities[4].expand(32, 32))
    assert (found.predicted == probabilities.argmax()).all()


def test_the_square_hides_what_lies_about_its_centre(random_lenet5):
    inputs = torch.rand(1, 1, 28, 28)
    pictures = visualize.occluded(inputs, 4).view(28, 28, 28, 28)
    expected = inputs[0, 0].clone()
    expected[8:12, 18:22] = 0.5
    assert torch.equal(pictures[10, 20], expected)
    assert (pictures[0, 0] == 0.5).sum() == 4, "two by two pixels are left of it in the corner"
    found = visualize.occlude(LeNet5(28), inputs, 0, 100)
    assert found.probability.std() == pytest.approx(0, abs=1e-6), "all is gray wherever it stands"


def test_silencing_a_map_is_setting_it_to_zero(random_lenet5):
    model, images = random_lenet5, torch.randint(256, (60, 32, 32), dtype=torch.uint8)
    found = visualize.predict_without_maps(model, images, "fp32", batch_size=25)
    assert found["conv1"].shape == (32, 60)
    assert found["conv2"].shape == (64, 60)
    with torch.no_grad():
        maps, _ = visualize.maps_and_switches(model, model.prepare(images))
        assert torch.equal(found[None], model.fc2(model.hidden(maps["pool2"])).argmax(1))
        for k in (0, 7, 31):
            without = torch.where((torch.arange(32) == k).view(1, -1, 1, 1), 0.0, maps["pool1"])
            pool2 = F.max_pool2d(F.relu(model.conv2(without)), 2)
            assert torch.equal(found["conv1"][k], model.fc2(model.hidden(pool2)).argmax(1))
            without = torch.where((torch.arange(64) == k).view(1, -1, 1, 1), 0.0, maps["pool2"])
            assert torch.equal(found["conv2"][k], model.fc2(model.hidden(without)).argmax(1))
        constant = visualize.predict_without_layer(model, images, "fp32", "fc1")
    assert (constant == model.fc2.bias.argmax()).all()
    assert model.fc1.weight.abs().sum() > 0, "the model itself is left alone"


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


def test_noise_is_fitted_less_well_than_a_gabor_function_and_has_the_kernels_norm():
    even, _ = visualize.gabor_waves(5, *torch.tensor([0.0, 0, 1.5, 2, 0.2, 0.5])[:, None])
    kernels = even.view(1, 5, 5).repeat(8, 1, 1)
    fits = visualize.gabor_fits(kernels, 0.1 * torch.randn(8, 5, 5))
    assert list(fits) == ["trained", "untrained", "noise"]
    assert fits["trained"].r2.min() > 0.99 > 0.9 > fits["noise"].r2.median()
    assert fits["noise"].fitted.norm(dim=(1, 2)).max() < 1.01 * kernels[0].norm()


# Inside the recurrent networks


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_gradient_norms_agree_with_finite_differences(cell):
    """The top layer's state is nudged between two rows, and the loss watched."""
    torch.manual_seed(1)
    model, labels = RowReader(cell, 3, row_length=4).double(), torch.tensor([7])
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


def test_gradient_of_an_rnn_with_known_weights_vanishes_at_the_known_rate():
    """Without input and bias every state is zero and tanh has slope one: a step back multiplies by W_hh = 0.5 I."""
    model = RowReader("rnn", 4)
    with torch.no_grad():
        for name, parameter in model.recurrent.named_parameters():
            parameter.copy_(0.5 * torch.eye(4) if name == "weight_hh_l1" else torch.zeros_like(parameter))
    norms = visualize.gradient_norms(model, torch.zeros(2, 28, 28), torch.tensor([0, 1]))["hidden"]
    assert norms[-1] > 0
    torch.testing.assert_close(norms / norms[-1], 0.5 ** torch.arange(27.0, -1, -1))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_probabilities_by_row_are_those_of_an_image_that_ends_there(cell):
    model, inputs = RowReader(cell, 6), torch.randn(3, 28, 28)
    probabilities = visualize.probabilities_by_row(model, inputs)
    assert probabilities.shape == (3, 28, 10)
    for rows in (1, 13, 28):
        torch.testing.assert_close(probabilities[:, rows - 1], model.probabilities(inputs[:, :rows]))


# From a run's folder


def test_snapshots_and_the_untrained_network_are_those_of_the_run(cnn_run):
    run = visualize.FinishedRun(cnn_run[1])
    start, end = run.snapshot(0), run.snapshot(EPOCHS)
    for name in ("conv1", "conv2"):
        assert torch.equal(getattr(start, name).weight, getattr(run.untrained_model(), name).weight)
        assert torch.equal(getattr(end, name).weight, getattr(run.model, name).weight)
        assert not torch.equal(getattr(start, name).weight, getattr(end, name).weight)


def test_every_figure_of_a_recurrent_run_is_written(rnn_run, tmp_path, call):
    status, _, error = call(visualize, rnn_run[1], "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    names = {"curves", "confusion", "examples", "gradients", "reading"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert all(imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05 for name in names)
    with open(tmp_path / "gradients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 29))
    assert float(rows[0]["untrained"]) < 1e-4 * float(rows[-1]["untrained"]), "vanishing at initialisation"


def test_gabor_table_holds_the_kernels_and_both_null_models(cnn_run, tmp_path):
    run = visualize.FinishedRun(cnn_run[1])
    visualize.gabor(run, tmp_path)
    rows = visualize.read_gabor(tmp_path)
    assert [(row["kernels"], row["feature_map"]) for row in rows] == [
        (kernels, number) for kernels in ("trained", "untrained", "noise") for number in range(32)
    ]
    assert all(row["r2"] <= 1 and 0 <= row["cycles_per_pixel"] <= 0.5 for row in rows)
    fits = visualize.fit_gabor(run.model.conv1.weight.detach()[:, 0])
    assert np.corrcoef(fits.r2, [row["r2"] for row in rows[:32]])[0, 1] > 0.9


def test_several_runs_are_measured_and_compared(cnn_run, rnn_run, tmp_path, call):
    tables = [cnn_run[1] / "figures" / "gabor.csv", rnn_run[1] / "figures" / "gradients.csv"]
    status, output, _ = call(
        visualize, cnn_run[1], rnn_run[1], "--figures", "gabor", "gradients", "--output-dir", tmp_path
    )
    assert status == 0
    pictures = [tmp_path / "gabor.png", tmp_path / "gradients.png"]
    assert output.splitlines()[-4:] == [str(path) for pair in zip(tables, pictures, strict=True) for path in pair]
    assert all(imread(path)[..., :3].std() > 0.05 for path in pictures)
