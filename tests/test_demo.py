"""The demo: what ships, and what shrinking it shows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink import demo


@pytest.fixture(scope="module")
def result() -> demo.DemoResult:
    return demo.run()


def test_model_and_samples_together_stay_under_a_megabyte():
    files = [demo.model_path(), demo.model_path().with_name("digits.npz")]
    assert sum(file.stat().st_size for file in files) < 1_000_000


def test_samples_are_normalised_images_with_labels():
    images, labels = demo.samples()
    assert images.shape == (450, 1, 8, 8)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.shape == (450,)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(10))


def test_model_is_valid_and_takes_any_batch():
    model = onnx.load(demo.model_path())
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("trace", [b"/home", b"/tmp", b"/root", b"site-packages", b".py"])
def test_model_names_no_path_of_the_machine_that_made_it(trace: bytes):
    assert trace not in demo.model_path().read_bytes()


def dead_rows(weights: dict[str, np.ndarray], layer: str) -> np.ndarray:
    return ~weights[f"{layer}.weight"].any(axis=tuple(range(1, weights[f"{layer}.weight"].ndim)))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(demo.model_path()).graph.initializer}


@pytest.mark.parametrize("layer", ["stem.conv", "widen.conv", "block.first.conv", "block.second.conv", "expand.conv"])
def test_dead_channels_of_these_layers_are_zero(weights: dict[str, np.ndarray], layer: str):
    dead = dead_rows(weights, layer)
    assert 0.35 < dead.mean() < 0.7
    assert not weights[f"{layer}.weight_bias"][dead].any()


@pytest.mark.parametrize(
    ("layer", "bias"),
    [
        ("depthwise.conv", "depthwise.conv.weight_bias"),
        ("hidden", "hidden.bias"),
    ],
)
def test_dead_channels_of_these_layers_are_constants(weights: dict[str, np.ndarray], layer: str, bias: str):
    dead = dead_rows(weights, layer)
    assert dead.mean() > 0.25
    # what the Relu behind each of these layers lets through
    assert (weights[bias][dead] > 0).any()


def test_residual_branches_do_not_agree_on_what_is_dead(weights: dict[str, np.ndarray]):
    stream, branch = dead_rows(weights, "widen.conv"), dead_rows(weights, "block.second.conv")
    assert (stream & branch).any()
    assert (stream ^ branch).any()


def test_shipped_model_is_accurate(result: demo.DemoResult):
    assert result.before.accuracy >= 0.97


def test_shrinking_changes_no_prediction(result: demo.DemoResult):
    assert result.samples == 450
    assert result.predictions_identical
    assert result.smallest.accuracy == result.fastest.accuracy == result.before.accuracy
    # logits of about 10, so a few units in the last place of float32
    assert result.largest_difference < 1e-4


def test_shrinking_makes_the_model_smaller(result: demo.DemoResult):
    assert result.smallest.parameters < 0.5 * result.before.parameters
    assert result.smallest.bytes < 0.5 * result.before.bytes


def test_the_fastest_form_is_at_most_a_tenth_larger_or_the_input(result: demo.DemoResult):
    fastest = result.fastest.parameters
    assert result.smallest.parameters <= fastest
    assert fastest <= 1.1 * result.smallest.parameters or fastest == result.before.parameters


def test_latencies_are_measured(result: demo.DemoResult):
    assert min(figures.latency for figures in (result.before, result.smallest, result.fastest)) > 0


def test_main_prints_the_figures(capsys: pytest.CaptureFixture[str]):
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for part in ("parameters", "bytes", "accuracy", "latency", "identical", "largest difference"):
        assert part in printed
