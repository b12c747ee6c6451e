"""The network as one graph, for programs without this one: `torch.export` and ONNX.

The number of images stays open, all other shapes are fixed. What comes in is normalised already, as
by `model.preprocess`.

    model = load_checkpoint("pretrained:CIFAR10")
    torch.export.save(export(model, "logits"), "logits.pt2")
    write_onnx(model, "states.onnx", "states")       # needs the packages onnx and onnxscript

    session = onnxruntime.InferenceSession("states.onnx")
    (states,) = session.run(None, {"images": model.preprocess(["shoe.jpg", "coat.png"]).numpy()})
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from agglomerator.util.errors import UserError
from agglomerator.util.files import written_whole

OUTPUTS = {"logits": "classify", "embedding": "forward", "states": "states"}  # -> method


class _Output(nn.Module):
    """A network whose only method is one of the `Agglomerator`'s."""

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images):
        return getattr(self.model, self.method)(images)


def export(model, output="logits"):
    """The graph of a network in evaluation mode, from images to one of its outputs.

    Args:
        model: `Agglomerator`; it stays as it is.
        output: "logits" (B, n_classes), "embedding" (B, contr_dim) or "states"
            (iters + 1, B, n, K, d).

    Returns:
        A `torch.export.ExportedProgram` of images (B, n_channels, image_size, image_size), float32,
        for any B from 1; `.module()` calls it.

    Raises:
        ValueError: there is no such output.

    Example:
        >>> from agglomerator import Agglomerator
        >>> small = {"image_size": 16, "conv_image_size": 4, "patch_dim": 8, "contr_dim": 8}
        >>> program = export(Agglomerator(**small), "embedding")
        >>> program.module()(torch.rand(3, 3, 16, 16)).shape
        torch.Size([3, 8])
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is not one of {', '.join(OUTPUTS)}")
    s, training = model.settings, model.training
    # Two images: of one, torch would take the number for fixed.
    images = model.wl.new_zeros(2, s.n_channels, s.image_size, s.image_size)
    whole = _Output(model, OUTPUTS[output]).eval()
    try:
        with torch.no_grad():
            batch = {"images": {0: torch.export.Dim("batch")}}
            return torch.export.export(whole, (images,), dynamic_shapes=batch)
    finally:
        model.train(training)


def write_onnx(model, path, output="logits"):
    """Write the graph of `export` as an ONNX file with its weights, whole or not at all.

    Its input is called `images`, its output by the name of the output. A network with
    local_consensus_radius takes a minute: its tiles make a large graph.

    Args:
        model, output: as for `export`.
        path: of the file.

    Raises:
        UserError: a package is missing.
        ValueError: there is no such output.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX: needs the packages; pip install {' '.join(missing)}.")
    program = export(model, output)
    names = {"input_names": ["images"], "output_names": [output]}
    graph = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    with written_whole(Path(path), "wb") as file:
        file.write(graph.model_proto.SerializeToString())
