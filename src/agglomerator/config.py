"""Every setting of a run: its name, type, default, help and limits, and what they allow together.

The command line makes one flag of each; `Agglomerator(...)` and `load_checkpoint(...)` take them
as keywords. This module imports neither absl nor PyTorch, so that reading flags is quick.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_LINE = 1000
PATHS = ("load_checkpoint_dir", "output_dir", "data_dir", "hierarchy", "images")


class UserError(Exception):
    """Something that the user can put right. The message is one line: what, and the way out."""

    def __str__(self):
        line = super().__str__()  # names and values in it are as the user, or a file, has them
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        line = "".join(shown)
        return line if len(line) < LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


class SharedError(UserError):
    """A `UserError` that all processes of a training raise at the same place: one line says it."""


def setting(group, default, help, choices=None, low=None, high=None):
    """A field of `Settings` with what the command line needs to know of it."""
    metadata = {"group": group, "help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked as far as they can be without looking at data or files.

    A path may begin with ~, the home of the user. The name of the run, where none is given, is
    that of the data set, also after `replace`.

    Raises:
        UserError: a value is outside its limits, or values do not fit each other; the message
            names the setting, its value, and values that would work.
    """

    # What to do
    mode: str = setting(
        "run",
        "train",
        "train; test (figures on the test set); freeze (embeddings of all images as .npy files); "
        "islands (pictures of the islands of a trained network); all (stage one, stage two, test, "
        "one after the other).",
        choices=("train", "test", "freeze", "islands", "all"),
    )
    supervise: bool = setting(
        "run",
        False,
        "Stage two, a classifier on the frozen embedding, instead of stage one, contrastive "
        "pre-training.",
    )
    finetune: bool = setting(
        "run", False, "Let the whole network learn in stage two, not the classifier alone."
    )
    load_checkpoint_dir: str | None = setting(
        "run",
        None,
        "Checkpoint to start from: path of this project's or of a published one, of a state dict "
        "(torch.save, safetensors), or pretrained:NAME, a network that comes with the project.",
    )
    resume_training: bool = setting(
        "run",
        False,
        "Go on from a checkpoint of the same stage with its optimizer, schedule and epoch; one of "
        "another stage gives its weights only.",
    )
    exp_name: str | None = setting(
        "run",
        None,
        "Name of the run and of its output folder; None: that of the data set.",
    )
    output_dir: str = setting("run", "output", "Folder that holds the output folders of all runs.")
    seed: int = setting(
        "run", 42, "Seed of weights, split, order and augmentation.", low=0, high=2**32 - 1
    )

    # Data
    dataset: str = setting("data", "CIFAR10", "Name of the data set.")
    data_dir: str = setting(
        "data", "data", "Folder that holds the data sets; downloads go there too."
    )
    image_size: int = setting("data", 32, "Side of the input images, in pixels.", low=8, high=4096)
    n_channels: int = setting(
        "data",
        3,
        "Channels fed to the network: 1 (colour images are made gray) or 3 (gray ones are "
        "repeated).",
        choices=(1, 3),
    )
    n_classes: int = setting("data", 10, "Number of classes.", low=2)
    batch_size: int = setting(
        "data", 1024, "Images in a batch of one process; stage one makes two views of each.", low=1
    )
    num_workers: int = setting(
        "data",
        8,
        "Processes that read and decode image files, at most one a CPU core; data sets that lie "
        "in memory need none.",
        low=0,
    )
    skip_unreadable: bool = setting(
        "data", False, "Leave out image files that cannot be read, with a count, instead of ending."
    )
    difficulty: int = setting(
        "data",
        1,
        "PartWhole: 0 upright on a plain ground, 1 turned and some clutter, 2 much of both, and "
        "something in front.",
        low=0,
        high=2,
    )
    objects: int = setting(
        "data", 1, "PartWhole: the greatest number of objects in a scene.", low=1, high=9
    )
    hierarchy: str | None = setting(
        "data",
        None,
        "File that puts the classes into super-classes, a line for each, as animals/birds: duck, "
        "swan; None: the known one of the data set or of its class names, if there is one.",
    )
    normalization: str | None = setting(
        "data",
        None,
        "Data set whose mean and standard deviation normalise the images; None: the one that the "
        "checkpoint was trained on, or else --dataset.",
    )
    augmentation: str = setting(
        "data",
        "randaugment",
        "How training images are changed: randaugment (as published), crop (shifted by up to an "
        "eighth of their side), flip (shifted so and mirrored), mirror (mirrored alone).",
        choices=("randaugment", "crop", "flip", "mirror"),
    )
    val_share: float = setting(
        "data",
        0.2,
        "Share of the training images held out for validation, where the data set has no such part "
        "of its own.",
        low=0.0,
        high=0.9,
    )
    limit_train: int | float = setting(
        "data", 1.0, "Share (1.0, 0.1) or number (1, 10) of training batches an epoch.", low=0
    )
    limit_val: int | float = setting(
        "data", 1.0, "Share (1.0, 0.1) or number (1, 10) of validation batches.", low=0
    )
    limit_test: int | float = setting(
        "data", 1.0, "Share (1.0, 0.1) or number (1, 10) of test batches.", low=0
    )
    test_time_flip: bool = setting(
        "data",
        False,
        "In a test, tell the class by the mean of the logits of an image and its mirror image.",
    )

    # Model
    patch_size: int = setting(
        "model", 1, "Side of the square of tokenizer cells that becomes one column.", low=1
    )
    patch_dim: int = setting("model", 128, "Width of a level: numbers in one embedding.", low=2)
    levels: int = setting(
        "model", 2, "Levels of a column, parts lowest, whole on top.", low=2, high=1000
    )
    iters: int | None = setting(
        "model",
        None,
        "Iterations of the column loop; None means twice the levels.",
        low=0,
        high=10000,
    )
    conv_image_size: int = setting(
        "model",
        8,
        "Side of the tokenizer's output grid: image_size, or its half or quarter, rounded up.",
        low=1,
    )
    tokenizer: str = setting(
        "model",
        "convmlp",
        "convmlp (as published): convolutions, then pooling; residual: pooling earlier, then "
        "residual blocks of twice the width; vgg: from the full grid of the image, twice as wide "
        "after each pooling.",
        choices=("convmlp", "residual", "vgg"),
    )
    tokenizer_width: int | None = setting(
        "model",
        None,
        "Channels of the tokenizer's convolutions but the last, of residual and vgg those of the "
        "first; None: half those of the last.",
        low=1,
    )
    tokenizer_depth: int = setting(
        "model",
        3,
        "Convolutions of the tokenizer; of residual its blocks, of vgg those of greatest width.",
        low=2,
    )
    head: str = setting(
        "model",
        "flatten",
        "How the columns of the top level become one vector: flatten (as published; its weights "
        "grow with the square of columns times patch_dim) or grid (means over a coarser grid, "
        "flattened; its weights do not grow with the columns).",
        choices=("flatten", "grid"),
    )
    head_side: int = setting(
        "model", 4, "Side of the coarser grid of --head=grid.", low=1, high=4096
    )
    denoise_iter: int = setting(
        "model", -1, "State that feeds the head: 0 is the initial one, -1 the last."
    )
    dropout: float = setting("model", 0.3, "Dropout in the contrastive head.", low=0, high=1)
    contr_dim: int = setting("model", 512, "Width of the embedding of an image.", low=1)
    consensus_self: bool = setting(
        "model", False, "Let a column attend to itself like to any other."
    )
    local_consensus_radius: int | float = setting(
        "model",
        0,
        "Columns farther apart than this do not attend, as 1.5, which takes the eight neighbours; "
        "0: all attend.",
        low=0,
    )
    recompute: bool = setting(
        "model",
        False,
        "Compute every iteration a second time in the backward pass instead of keeping what is "
        "within it: less memory, more time.",
    )
    consensus_temperature: float | None = setting(
        "model",
        None,
        "Columns attend by the cosine of their vectors over this number, the smaller the more to "
        "like ones alone, as 0.05; None: by a product that grows with their length, as published.",
    )

    # Training
    temperature: float = setting("training", 0.07, "Temperature of the contrastive loss.")
    optimizer: str = setting(
        "training",
        "adamw",
        "adamw (as published), or muon for weight matrices and AdamW for all else, which learns "
        "more of a batch; rates and decay are of the same size. A step of muon takes long on the "
        "large matrices of --head=flatten.",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(
        "training", 0.05, "Peak learning rate of the one-cycle schedule.", low=0
    )
    agreement: float = setting(
        "training",
        0.0,
        "Weight of the loss that asks for islands in stage one: of even colour on the levels below "
        "the top, of figures before their ground on the top; 0 as published.",
        low=0,
    )
    weight_decay: float = setting("training", 5e-4, "Weight decay of the optimizer.", low=0)
    lr_speed: int = setting("training", 2000, "Length of the one-cycle schedule, in epochs.", low=1)
    max_epochs: int = setting("training", 10000, "Training ends after so many epochs.", low=1)
    supervised_epochs: int | None = setting(
        "training",
        None,
        "Epochs of stage two, and the length of its schedule; None: as lr_speed and max_epochs say",
        low=1,
    )
    supervised_learning_rate: float | None = setting(
        "training",
        None,
        "Peak learning rate of stage two; None: learning_rate.",
        low=0,
    )
    accumulate: int = setting(
        "training", 1, "Batches whose gradients are added up before one step.", low=1
    )
    compile: bool = setting(
        "training", False, "Compile the network by TorchInductor, which needs a C++ compiler."
    )
    checkpoint_every: float = setting(
        "training",
        10.0,
        "Minutes between two writes of last.ckpt within an epoch, from which --resume_training "
        "goes on; it is also written after every epoch.",
        low=0,
    )
    validate_every: int = setting("training", 1, "Epochs between two validations.", low=1)
    monitor: str = setting(
        "training",
        "val_acc",
        "What of validation makes a checkpoint the best: accuracy, or the loss.",
        choices=("val_acc", "val_loss"),
    )

    # Islands and logs
    plot_islands: bool = setting(
        "pictures", False, "Show the islands of sample images while the run goes on."
    )
    island_threshold: float = setting(
        "pictures",
        0.8,
        "Neighbouring columns are of one island if the cosine of their vectors is at least this.",
        low=-1.0,
        high=1.0,
    )
    images: str | None = setting(
        "pictures",
        None,
        "Image file, or folder of them, of which --mode=islands draws the islands; None: some "
        "images of the test set.",
    )
    logger: str = setting(
        "pictures",
        "wandb",
        "Where metrics go beside the CSV file, which is always written.",
        choices=("wandb", "tensorboard", "csv", "none"),
    )

    # Machine
    num_gpus: int = setting("machine", 1, "GPUs of this machine to use, where it has any.", low=1)
    num_nodes: int = setting("machine", 1, "Machines that train together.", low=1)
    accelerator: str = setting(
        "machine", "auto", "Lightning's word for the hardware: auto, cpu, cuda, mps, ..."
    )
    devices: str | None = setting(
        "machine",
        None,
        "Lightning's word for the devices (auto, 2, '0,3'); overrides num_gpus.",
    )
    strategy: str = setting("machine", "auto", "Lightning's word for the strategy: auto, ddp, ...")
    precision: str = setting(
        "machine", "32-true", "Lightning's word for the arithmetic: 32-true, bf16-mixed, ..."
    )

    def __post_init__(self):
        for option in dataclasses.fields(self):
            self._check_value(option)
        for name in PATHS:
            self._expand_home(name)
        for name, usual in (("temperature", 0.07), ("limit_train", 1.0), ("limit_test", 1.0)):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name}={getattr(self, name)}: must be more than 0, as {usual}.")
        if self.dropout == 1:
            raise UserError("--dropout=1.0: drops everything; use less, as 0.3.")
        if self.consensus_temperature is not None and not self.consensus_temperature > 0:
            raise UserError(
                f"--consensus_temperature={self.consensus_temperature}: must be more than 0, as "
                "0.05."
            )
        self._check_letters()
        parts = Path(self.exp_name).parts
        if not parts or ".." in parts or Path(self.exp_name).anchor or parts[0].startswith("~"):
            flag = "exp_name" if self.is_named else "dataset"
            raise UserError(
                f"--{flag}={self.exp_name}: must be a name, or folders and a name, in output_dir."
            )
        if self.images is not None and self.mode != "islands":
            raise UserError(
                f"--images={self.images}: only --mode=islands draws files of one's own."
            )
        self._check_grid()
        self._check_tokenizer()
        self._check_state()
        self._check_strategy()

    def _check_value(self, option):
        value = getattr(self, option.name)
        wanted = value_types(option.name)
        if isinstance(value, int) and not isinstance(value, bool) and float in wanted:
            wanted += (int,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join("None" if w is types.NoneType else w.__name__ for w in wanted)
            raise UserError(f"--{option.name}={value!r}: must be {names}.")
        if value is None:
            return
        if isinstance(value, str) and _NO_LINE.search(value):
            raise UserError(f"--{option.name}={value}: must be text of one line.")
        choices, low, high = (option.metadata[key] for key in ("choices", "low", "high"))
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise UserError(f"--{option.name}={value}: must be one of {known}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{option.name}={value}: must be a finite number.")
        if high is None and isinstance(value, int):
            high = 2**32 - 1
        if low is not None and value < low:
            raise UserError(f"--{option.name}={value}: must be at least {low}.")
        if high is not None and value > high:
            raise UserError(f"--{option.name}={value}: must be at most {high}.")

    def _expand_home(self, name):
        path = getattr(self, name)
        if path is None or not path.startswith("~"):
            return
        if os.path.expanduser(path) == path:
            raise UserError(f"--{name}={path}: no home is known of that user; write ./{path}.")
        object.__setattr__(self, name, os.path.expanduser(path))

    def _check_letters(self):
        """Loggers that write UTF-8 only take no names of folders and files that are none."""
        written = {"tensorboard": ("exp_name", "output_dir"), "wandb": FIELDS}
        for name in written.get(self.logger, ()):
            value = str(getattr(self, name))
            if value != value.encode("utf-8", "replace").decode():
                raise UserError(
                    f"--{name}={value}: {self.logger} takes no bytes that are not UTF-8; choose "
                    "another name, or --logger=csv."
                )

    def _check_grid(self):
        sides = {math.ceil(self.image_size / stride): stride for stride in (4, 2, 1)}
        if self.conv_image_size not in sides:
            raise UserError(
                f"--conv_image_size={self.conv_image_size}: the tokenizer makes no such grid of "
                f"--image_size={self.image_size}; use one of {', '.join(map(str, sides))}."
            )
        if self.patch_size not in self._patch_sizes:
            fault = (
                "does not divide"
                if self.conv_image_size % self.patch_size
                else "makes one column of"
            )
            raise UserError(
                f"--patch_size={self.patch_size}: {fault} the grid of "
                f"--conv_image_size={self.conv_image_size}; use one of {_join(self._patch_sizes)}."
            )

    def _check_tokenizer(self):
        cells = self.patch_size**2
        if self.patch_dim % (2 * cells):
            smaller = [p for p in self._patch_sizes if self.patch_dim % (2 * p * p) == 0]
            nearest = max(1, round(self.patch_dim / (2 * cells))) * 2 * cells
            way_out = f"use a multiple of {2 * cells}, as --patch_dim={nearest}"
            if smaller:
                way_out += f", or --patch_size of {_join(smaller)}"
            raise UserError(
                f"--patch_dim={self.patch_dim}: leaves the tokenizer {self.patch_dim}/"
                f"{self.patch_size}^2 channels, which must be an even number; {way_out}."
            )

    def _check_state(self):
        n_states = self.n_iters + 1
        if not -n_states <= self.denoise_iter < n_states:
            raise UserError(
                f"--denoise_iter={self.denoise_iter}: {self.n_iters} iterations make the states "
                f"0 to {self.n_iters}; use one of these, or -1 to -{n_states} counted from the end."
            )

    def _check_strategy(self):
        if "fsdp" in self.strategy:
            raise UserError(
                f"--strategy={self.strategy}: FSDP does not divide scalars, as the four weights of "
                "the contributions are; use --strategy=ddp."
            )

    @property
    def is_named(self):
        """Whether the run was given a name."""
        return vars(self)["exp_name"] is not None

    @property
    def _patch_sizes(self):
        """Those that make more than one column: a norm over the only one would leave nothing."""
        return divisors(self.conv_image_size)[:-1]

    @property
    def stage(self):
        """Name of the stage of training: "contrastive", "supervised" or "finetuned"."""
        if self.finetune:
            return "finetuned"
        return "supervised" if self.supervise else "contrastive"

    @property
    def n_iters(self):
        """Iterations T of the column loop."""
        return 2 * self.levels if self.iters is None else self.iters

    @property
    def blind(self):
        """Whether the embedding does not depend on the image: what the tokens send to level 0
        takes an iteration to climb each level."""
        return self.denoise_iter % (self.n_iters + 1) < self.levels

    @property
    def grid_size(self):
        """Columns on a side, S."""
        return self.conv_image_size // self.patch_size

    @property
    def n_columns(self):
        """Columns of an image, n = S * S."""
        return self.grid_size**2

    @property
    def token_channels(self):
        """Channels E of the tokenizer's output."""
        return self.patch_dim // self.patch_size**2

    @property
    def tokenizer_stride(self):
        """Pixels of the image to a cell of the grid, along a side: 1, 2 or 4."""
        return next(s for s in (4, 2, 1) if math.ceil(self.image_size / s) == self.conv_image_size)

    def replace(self, **changes):
        """A copy with some settings changed, checked anew."""
        return Settings(**vars(self) | changes)


# Here, for within the class it would be the default. `vars` has what was given.
Settings.exp_name = property(
    lambda self: vars(self)["exp_name"] if self.is_named else self.dataset,
    lambda self, name: vars(self).update(exp_name=name),
    doc="Name of the run: the one given, or that of the data set.",
)

FIELDS = {option.name: option for option in dataclasses.fields(Settings)}

# What a checkpoint says about the network and its input, used where the user says nothing else.
MODEL_SETTINGS = tuple(
    name for name, option in FIELDS.items() if option.metadata["group"] == "model"
)
INPUT_SETTINGS = ("dataset", "image_size", "n_channels", "n_classes", "difficulty", "objects")
SPLIT_SETTINGS = ("seed", "val_share")


def value_types(name):
    """The types that a setting takes, as a tuple: (int,), (int, float), (str, NoneType), ..."""
    hint = _HINTS[name]
    return typing.get_args(hint) or (hint,)


def divisors(number):
    """All divisors of a positive integer, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _join(numbers):
    return ", ".join(map(str, numbers))


_HINTS = typing.get_type_hints(Settings)
_NO_LINE = re.compile("[\0\n\r]")
