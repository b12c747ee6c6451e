"""Checkpoints, this project's and the published ones, read without running what they carry.

A checkpoint of this project is Lightning's, written by `LastCheckpoint` and
`BestCheckpoint` in `checkpoint_callbacks.py`:

- `state_dict`: the weights, by the names that published checkpoints have;
- `hyper_parameters`: all settings, `stage`, and `class_names`, `split_seed`, `training_images`;
- `epoch`, `global_step`, `epochs_done`, `loops`, `optimizer_states`, `lr_schedulers`, `callbacks`:
  where the training stands;
- `epoch_so_far`: the sums of an interrupted epoch, for each process;
- `began_from`: `fingerprint` of the weights that the training began from, or None;
- `teacher`: weights of the network that teaches, with --agreement_cue=islands.

What is beyond Lightning's is added in `training/module.py` (`on_save_checkpoint`). A published one
(Lightning 1.5, torch 1.10) holds the same tensors by the same names, and beside them pickled
internals of its scheduler, which are passed over. A plain state dict tells what its shapes show.
"""

import dataclasses
import hashlib
from pathlib import Path

import torch

from agglomerator.config import DESCRIBED, FIELDS, SPLIT_SETTINGS
from agglomerator.config.derived import stride_of
from agglomerator.data import registry
from agglomerator.data.preprocessing import Preprocessing
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.model.shapes import DERIVED, same_mask, shapes_show
from agglomerator.runs.formats import check_numbers, load, weights_of
from agglomerator.util.errors import UserError
from agglomerator.util.machine import memory

# What leaves no trace in the weights.
UNSEEN = "iters", "denoise_iter", "dropout", "consensus_self", "consensus_temperature"
OF_STRIDE = "image_size", "conv_image_size"  # the stride leaves no trace in the weights, too
OF_CLASSES = "classification_head_from_contr.", "prototypes"  # weights for each class

# Networks that come with the project: `pretrained:NAME` is NAME.ckpt in this folder.
SHELF, ON_SHELF = Path(__file__).parents[1] / "pretrained", "pretrained:"

# A published checkpoint always brings its own, whatever a config for the same data says.
PUBLISHED_PARTS = ("head", "tokenizer", "tokenizer_width", "tokenizer_depth", "prototypes")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file tells.

    Attributes:
        name: as it was given.
        path: of the file.
        weights: state dict of the `Agglomerator`.
        settings: by name, as far as the file tells: all of them in this project's own format,
            those that shapes show in the published one.
        stage: that of `Settings`; None in the published format.
        epochs, step: epochs and optimizer steps done.
        resumable: it holds the state of a training, not only weights.
        began_from: `fingerprint` of the weights that its training began from, where it tells.
        class_names: of its classes in the order of labels, a tuple; None where it does not tell.
        split_seed: which of its training images were held out; None where it does not tell.
        training_images: what tells them from others; None where it does not tell.
    """

    name: str
    path: Path
    weights: dict
    settings: dict
    stage: str | None
    epochs: int
    step: int
    resumable: bool
    began_from: object
    class_names: tuple | None
    split_seed: int | None
    training_images: str | None


def read(path):
    """Read a checkpoint file safely.

    Args:
        path: of the file, or pretrained:NAME for a network that comes with the project.

    Raises:
        UserError: there is no such file, it is broken or of another kind, or it carries code.
    """
    name, where = str(path), f"--load_checkpoint_dir={path}"
    path = _from_shelf(name, where) if name.startswith(ON_SHELF) else Path(path)
    if path.is_dir():
        found = sorted(map(str, path.rglob("*.ckpt")))
        way_out = f"did you mean {found[0]}?" if found else "name the file itself."
        raise UserError(f"{where}: is a folder; {way_out}")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file.")
    content = load(path, where)
    weights = weights_of(content, where, path.stat().st_size)
    stored = content.get("hyper_parameters")
    stored = stored if isinstance(stored, dict) else {}
    settings = {name: value for name, value in stored.items() if name in FIELDS}
    if settings.get("normalization") is None and "dataset" in settings:
        settings["normalization"] = settings["dataset"]
    try:
        shown = shapes_show(weights)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError):
        raise UserError(f"{where}: holds a network, but not an Agglomerator.") from None
    if "head" not in shown | settings:
        raise UserError(f"{where}: holds a network with another head than an Agglomerator's.")
    check_numbers(weights, where)
    if "pytorch-lightning_version" in content:  # it leaves no buffer out: without a mask, no radius
        shown.setdefault("local_consensus_radius", 0)
    epoch, step = content.get("epoch"), content.get("global_step")
    epochs = content.get("epochs_done", epoch + 1 if isinstance(epoch, int) else 0)
    return Checkpoint(
        name=name,
        path=path,
        weights=weights,
        settings=shown | settings,
        stage=stored.get("stage") if isinstance(stored.get("stage"), str) else None,
        epochs=epochs if isinstance(epochs, int) else 0,
        step=step if isinstance(step, int) else 0,
        resumable=content.keys() >= {"optimizer_states", "lr_schedulers", "loops"},
        began_from=content.get("began_from"),
        **_data_of(stored, shown["n_classes"]),
    )


def _data_of(stored, n_classes):
    """What hyper parameters tell of the data; older checkpoints tell the name of the data set,
    which says it all but of a folder."""
    names, dataset = stored.get("class_names"), stored.get("dataset")
    seed, images = stored.get("split_seed", stored.get("seed")), stored.get("training_images")
    entry = registry.DATA_SETS.get(dataset) if isinstance(dataset, str) else None
    if entry is not None and entry.classes is not None:
        names = entry.classes if names is None else names
        images = dataset if images is None else images
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {
        "class_names": tuple(names) if named and len(set(names)) == n_classes else None,
        "split_seed": seed if type(seed) is int and 0 <= seed < 2**32 else None,
        "training_images": images if isinstance(images, str) else None,
    }


def fingerprint(weights):
    """A hash of a state dict: different for any other weights."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _from_shelf(name, where):
    path = SHELF / f"{name.removeprefix(ON_SHELF)}.ckpt"
    names = sorted(ON_SHELF + found.stem for found in SHELF.glob("*.ckpt"))
    if ON_SHELF + path.stem not in names:
        raise UserError(f"{where}: no such network comes with the project; {', '.join(names)} do.")
    return path


def shelve(source, target):
    """Write a small checkpoint to ship: weights, with matrices in float16, and the settings of the
    network, its input and its split.

    Args:
        source: checkpoint of this project.
        target: file to write, a fifth of its size or less.
    """
    content = torch.load(source, map_location="cpu", weights_only=True)
    described = (*DESCRIBED, *SPLIT_SETTINGS, "stage")
    described += ("class_names", "split_seed", "training_images")
    stored = content["hyper_parameters"]
    weights = {
        name: value.half() if value.is_floating_point() and value.dim() > 1 else value
        for name, value in content["state_dict"].items()
    }
    kept = {name: content[name] for name in ("epoch", "global_step", "pytorch-lightning_version")}
    stored = {name: stored[name] for name in described if name in stored}
    torch.save(kept | {"state_dict": weights, "hyper_parameters": stored}, target)


def check_size(settings):
    """Raises UserError if the weights of the network would not fit into the memory."""
    try:
        with torch.device("meta"):  # takes no memory, whatever the settings ask for
            model = Agglomerator(**dataclasses.asdict(settings))
        n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    except RuntimeError:  # beyond the range of integers
        n_bytes = float("inf")
    if n_bytes > memory():
        s = settings
        raise UserError(
            f"--patch_dim={s.patch_dim} --contr_dim={s.contr_dim} --levels={s.levels}: a network "
            f"of {n_bytes / 2**30:.0f} GB on {s.n_columns} columns, more than the memory; use less."
        )


def build(checkpoint, new_classes=None, **flags):
    """The network of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: what `read` returned.
        new_classes: how many classes a new classifier tells; None for the checkpoint's own.
        **flags: settings that win over those of the checkpoint.

    Raises:
        UserError: the weights do not fit the settings; the message names the flags to set.
    """
    where = f"--load_checkpoint_dir={checkpoint.name}"
    settings = checkpoint.settings | flags
    if checkpoint.stage is None:
        settings |= {name: checkpoint.settings[name] for name in PUBLISHED_PARTS}
    if "conv_image_size" in flags and "image_size" not in flags | checkpoint.settings:
        settings["image_size"] = 4 * flags["conv_image_size"]
    shown = shapes_show(checkpoint.weights)
    if settings["tokenizer_width"] == shown["patch_dim"] // shown["patch_size"] ** 2 // 2:
        settings["tokenizer_width"] = None  # says the same
    wrong = _misfits(checkpoint, settings, shown)
    if wrong:
        told = checkpoint.settings
        wrong |= {n: told[n] for n in UNSEEN if n in told and told[n] != settings[n]}
        fit = " ".join(f"--{name}={value}" for name, value in wrong.items())
        have = ", ".join(f"{name}={settings[name]}" for name in wrong)
        raise UserError(f"{where}: its weights do not fit {have}; use {fit}")
    try:
        with torch.device("meta"):  # takes no memory, whatever the settings ask for
            expected = Agglomerator(**settings).state_dict()
    except (UserError, RuntimeError) as error:
        raise UserError(f"{where}: {error}") from None
    names = {name for name in (*expected, *checkpoint.weights) if not name.endswith(DERIVED)}
    problems = [f"{name} is missing" for name in names - checkpoint.weights.keys()]
    problems += [f"{name} is unknown" for name in names - expected.keys()]
    problems += [
        f"{name} is {tuple(checkpoint.weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in checkpoint.weights and checkpoint.weights[name].shape != value.shape
    ]
    if problems:
        raise UserError(f"{where}: its weights do not fit the network: {sorted(problems)[0]}.")
    weights = checkpoint.weights
    if new_classes is not None:
        settings |= {"n_classes": new_classes}
        weights = {name: w for name, w in weights.items() if not name.startswith(OF_CLASSES)}
    model = Agglomerator(**settings)
    model.load_state_dict(weights, strict=False)  # DERIVED may differ
    return model.eval()


def _misfits(checkpoint, settings, shown):
    """What a checkpoint shows that settings, a dictionary, say otherwise; `shown` by its shapes."""
    shown.pop("image_size", None)
    side = shown.get("conv_image_size", settings["conv_image_size"]) // shown["patch_size"]
    if settings["head"] not in ("flatten", "grid", "dissimilarity", "mean"):  # somebody's own
        shown = {name: value for name, value in shown.items() if not name.startswith("head")}
    elif settings["head"] == "grid" and settings.get("head_side") == side:
        shown.pop("head")  # the weights of both kinds may have the same shapes then
        shown["head_side"] = side
    if checkpoint.stage is not None and _stride(settings) != _stride(checkpoint.settings):
        shown |= {name: checkpoint.settings[name] for name in OF_STRIDE}
    radius = "local_consensus_radius"
    given = settings.get(radius, 0)
    if same_mask(given, shown.setdefault(radius, checkpoint.settings.get(radius, given)), side):
        shown.pop(radius)
    return {name: value for name, value in shown.items() if settings[name] != value}


def _stride(settings):
    """The tokenizer's stride; None where the settings do not tell."""
    if not settings.keys() >= {*OF_STRIDE}:
        return None
    return stride_of(*(settings[name] for name in OF_STRIDE))


def load_checkpoint(path, **flags):
    """Load a network from a checkpoint of this project or of the published code.

    It brings what it was trained on: `preprocess`, a `Preprocessing`, which makes its input of
    images, and `class_names`, a list in the order of its logits. Either is None where the
    checkpoint does not tell: give `dataset`. Images that are plainly not normalised are warned of.

    Args:
        path: of the file, or pretrained:NAME.
        **flags: settings by the names of the flags; those given win over stored ones.

    Returns:
        The `Agglomerator`, on the CPU, in evaluation mode.

    Raises:
        UserError: the file cannot be read, carries code, or does not fit the flags.
    """
    checkpoint = read(path)
    if "island_threshold" in flags:
        flags = {"island_loss": None} | flags
    with torch.random.fork_rng(devices=()):  # weights are drawn, and then replaced
        model = build(checkpoint, **flags)
    model.preprocess, names = None, checkpoint.class_names
    known = checkpoint.settings | flags
    if known.get("normalization", known.get("dataset")) in registry.DATA_SETS:
        model.preprocess = Preprocessing(model.settings)
        model.image_to_tokens.register_forward_pre_hook(model.preprocess.warn)
    if names is None and "dataset" in flags:
        names = registry.entry_of(model.settings).classes or ()
        names = names if len(names) == model.settings.n_classes else None
    model.class_names = None if names is None else list(names)
    return model
