import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import slow

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.model.export import OUTPUTS, export, write_onnx


def small(**flags):
    torch.manual_seed(0)
    flags = {"patch_dim": 16, "contr_dim": 32, "iters": 2} | flags
    return Agglomerator(image_size=16, conv_image_size=4, n_channels=1, **flags)


def of_network(model, output, images):
    training = model.training
    model.eval()
    with torch.no_grad():
        found = getattr(model, OUTPUTS[output])(images)
    model.train(training)
    return found


@pytest.mark.parametrize("output", ["states", *map(slow, ("embedding", "logits"))])
def test_onnx_gives_the_same_numbers_for_any_batch(output, tmp_path):
    model = small()
    assert model.training
    write_onnx(model, tmp_path / "model.onnx", output)
    assert model.training and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [one.name for one in session.get_outputs()] == [output]
    for n_images in (1, 5):
        images = torch.randn(n_images, 1, 16, 16)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, of_network(model, output, images), atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        slow({"local_consensus_radius": 1.5, "levels": 3, "iters": 4, "consensus_self": True}),
        slow({"head": "grid", "consensus_temperature": 0.05, "column_norm": "plain"}),
        {"tokenizer": "residual", "iters": 0, "denoise_iter": 0},
    ],
)
@pytest.mark.parametrize("output", OUTPUTS)
def test_programs_of_torch_take_any_batch(flags, output, tmp_path):
    model = small(**flags)
    torch.export.save(export(model, output), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for n_images in (1, 2, 5):
        images = torch.randn(n_images, 1, 16, 16)
        torch.testing.assert_close(program(images), of_network(model, output, images))


@pytest.mark.slow
def test_a_network_that_comes_with_the_project_is_exported():
    model = load_checkpoint("pretrained:FashionMNIST")
    images = model.preprocess(
        np.random.default_rng(0).integers(256, size=(3, 28, 28, 1)).astype("u1")
    )
    program = export(model, "logits").module()
    torch.testing.assert_close(program(images), of_network(model, "logits", images))


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="logits, embedding, states"):
        export(small(), "classes")
