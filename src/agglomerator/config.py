"""Every setting of a run: name, type, default, help and limits, and which values fit together.

The command line has a flag for each setting; `Agglomerator(...)` and `load_checkpoint(...)` take
them as keywords. This module imports neither absl nor PyTorch, so that flags are read quickly.
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
    """An error that the user can fix. The message is one line: what is wrong, and how to fix it."""

    def __str__(self):
        line = super().__str__()  # it may hold any characters of the user's names and files
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        line = "".join(shown)
        return line if len(line) < LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


class SharedError(UserError):
    """A `UserError` that all processes of a training raise at the same place. One prints it."""


def setting(group, default, help, choices=None, low=None, high=None):
    """A field of `Settings`, with its group, help and limits for the command line."""
    metadata = {"group": group, "help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked as far as possible without data or files.

    A path may begin with ~, the user's home folder. A run without a name has the name of its data
    set, also after `replace`.

    Raises:
        UserError: a value is outside its limits, or two values do not fit together. The message
            names the setting, its value, and values that work.
    """

    # What to do
    mode: str = setting(
        "run",
        "train",
        "train; test (figures on the test set); freeze (embeddings of all images as .npy files, "
        "drawn and scored); islands (pictures of the islands of a trained network); all (stage "
        "one, then stage two, then test). test and freeze take a checkpoint of either stage.",
        choices=("train", "test", "freeze", "islands", "all"),
    )
    supervise: bool = setting(
        "run",
        False,
        "Train stage two, a classifier on the frozen embedding. Without this flag: stage one, "
        "contrastive pre-training.",
    )
    finetune: bool = setting(
        "run", False, "Train the whole network in stage two, not only the classifier."
    )
    load_checkpoint_dir: str | None = setting(
        "run",
        None,
        "Checkpoint to start from: one of this project, a published one, a plain state dict "
        "(torch.save or .safetensors), or pretrained:NAME, a network that comes with the project. "
        "It sets the flags of the model and the input that you do not give, and decides the "
        "held-out images and the names and order of the classes. Published files do not store "
        "iters, denoise_iter and consensus_self: give them if they are not the defaults.",
    )
    resume_training: bool = setting(
        "run",
        False,
        "Continue from a checkpoint of the same stage, with its optimizer, schedule and place in "
        "the epoch; one of another stage gives only its weights. Without --load_checkpoint_dir: "
        "from the last checkpoint of the run itself, in whichever stage --mode=all has reached, or "
        "from the beginning if there is none. If the run has finished already, it ends at once "
        "with status 0.",
    )
    exp_name: str | None = setting(
        "run",
        None,
        "Name of the run. Its files go to output_dir/exp_name. None: the name of the data set.",
    )
    output_dir: str = setting("run", "output", "Folder that holds the output folders of all runs.")
    seed: int = setting(
        "run",
        42,
        "Seed of weights, split, order of images, augmentation and the subsets of --limit_train, "
        "--limit_val and --limit_test.",
        low=0,
        high=2**32 - 1,
    )

    # Data
    dataset: str = setting(
        "data",
        "CIFAR10",
        "Name of the data set: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, smallNORB, "
        "IMAGENET, PartWhole (drawn scenes) or ImageFolder (your own images).",
    )
    data_dir: str = setting(
        "data",
        "data",
        "Folder that holds the data sets. Downloads go there. The usual archives (.gz, .tar.gz) "
        "are found and unpacked there. IMAGENET and ImageFolder read train/<class>/* and "
        "test/<class>/*. Images in val/ are for validation, or for the test if there is no test/.",
    )
    image_size: int = setting(
        "data",
        32,
        "Side of the input images, in pixels. Unless you give it: 16 for digits, 28 for MNIST and "
        "FashionMNIST, 256 for IMAGENET.",
        low=8,
        high=4096,
    )
    n_channels: int = setting(
        "data",
        3,
        "Channels that the network sees: 1 (colour images are made gray) or 3 (gray images are "
        "repeated). Unless you give it: 1 for digits, FashionMNIST and smallNORB.",
        choices=(1, 3),
    )
    n_classes: int = setting(
        "data",
        10,
        "Number of classes. It is read from the data set; another number is refused.",
        low=2,
    )
    batch_size: int = setting(
        "data",
        1024,
        "Images per batch in each process. Stage one makes two views of each image.",
        low=1,
    )
    num_workers: int = setting(
        "data",
        8,
        "Number of processes that read and decode image files, at most one per CPU core. Data sets "
        "that lie in memory need none.",
        low=0,
    )
    skip_unreadable: bool = setting(
        "data",
        False,
        "Leave out image files that cannot be read, and say how many. Without this flag such a "
        "file ends the run.",
    )
    difficulty: int = setting(
        "data",
        1,
        "Only for PartWhole. 0: upright objects on a plain background. 1: rotated objects and some "
        "clutter. 2: more of both, and something in front of an object.",
        low=0,
        high=2,
    )
    objects: int = setting(
        "data", 1, "Only for PartWhole. The largest number of objects in a scene.", low=1, high=9
    )
    hierarchy: str | None = setting(
        "data",
        None,
        "File that puts the classes into super-classes. Each line names a super-class and its "
        "classes, for example animals/birds: duck, swan. None: the known hierarchy of the data set "
        "or of its class names, if there is one.",
    )
    normalization: str | None = setting(
        "data",
        None,
        "Data set whose mean and standard deviation normalise the images. None: the data set that "
        "the checkpoint was trained on, or else --dataset.",
    )
    augmentation: str = setting(
        "data",
        "randaugment",
        "How training images are changed. randaugment: as published. crop: shifted by up to an "
        "eighth of the side. flip: shifted like that, and half of them mirrored. mirror: half of "
        "them mirrored.",
        choices=("randaugment", "crop", "flip", "mirror"),
    )
    val_share: float = setting(
        "data",
        0.2,
        "Share of the training images that is held out for validation. A folder with val/ uses "
        "that instead. smallNORB holds out whole toys.",
        low=0.0,
        high=0.9,
    )
    limit_train: int | float = setting(
        "data",
        1.0,
        "Share (0.1) or number (10) of training batches per epoch. Seed and epoch choose the "
        "images among all of the training set.",
        low=0,
    )
    limit_val: int | float = setting(
        "data",
        1.0,
        "Share (0.1) or number (10) of validation batches. The seed chooses the images among all "
        "of them.",
        low=0,
    )
    limit_test: int | float = setting(
        "data",
        1.0,
        "Share (0.1) or number (10) of test batches. The seed chooses the images among all of "
        "them.",
        low=0,
    )
    test_time_flip: bool = setting(
        "data",
        False,
        "In a test, average the logits of an image and its mirror image.",
    )

    # Model
    patch_size: int = setting(
        "model",
        1,
        "Side of the square of tokenizer cells that becomes one column. A divisor of "
        "conv_image_size.",
        low=1,
    )
    patch_dim: int = setting(
        "model",
        128,
        "Width of a level: the length of one vector. A multiple of 2 * patch_size^2.",
        low=2,
    )
    levels: int = setting(
        "model",
        2,
        "Number of levels of a column: parts at the bottom, the whole object at the top.",
        low=2,
        high=1000,
    )
    iters: int | None = setting(
        "model",
        None,
        "Number of iterations of the column loop. None: twice the levels.",
        low=0,
        high=10000,
    )
    conv_image_size: int = setting(
        "model",
        8,
        "Side of the tokenizer's output grid: a quarter of image_size unless you give it, or its "
        "half or all of it, rounded up. image_size gives a column to every pixel: use it with "
        "--head=grid and a small batch. Attention grows with the square of the number of columns, "
        "unless local_consensus_radius limits it.",
        low=1,
    )
    tokenizer: str = setting(
        "model",
        "convmlp",
        "Kind of tokenizer. convmlp (as published): convolutions, then pooling. residual: two "
        "convolutions, pooling, residual blocks. vgg: convolutions on the grid of the image, then "
        "on half and on a quarter of it.",
        choices=("convmlp", "residual", "vgg"),
    )
    tokenizer_width: int | None = setting(
        "model",
        None,
        "Channels of the tokenizer. convmlp: of all convolutions but the last. residual: of the "
        "first convolution; the residual blocks have twice as many. vgg: of the first convolution; "
        "later ones have two and four times as many. None: half of the output channels, patch_dim "
        "/ patch_size^2.",
        low=1,
    )
    tokenizer_depth: int = setting(
        "model",
        3,
        "Depth of the tokenizer. convmlp: number of convolutions, 3 as published. residual: number "
        "of residual blocks. vgg: number of convolutions of the greatest width.",
        low=2,
    )
    head: str = setting(
        "model",
        "flatten",
        "How the columns of the top level become one vector. flatten (as published): all columns "
        "in a row; its weights grow with the square of columns * patch_dim. grid: means over a "
        "coarser grid, then flattened; its weights do not grow with the number of columns.",
        choices=("flatten", "grid"),
    )
    head_side: int = setting(
        "model", 4, "Side of the coarser grid of --head=grid.", low=1, high=4096
    )
    denoise_iter: int = setting(
        "model", -1, "Number of the state that feeds the head: 0 is the initial state, -1 the last."
    )
    dropout: float = setting("model", 0.3, "Dropout rate in the contrastive head.", low=0, high=1)
    contr_dim: int = setting("model", 512, "Length of the embedding of an image.", low=1)
    consensus_self: bool = setting(
        "model", False, "Let a column attend to itself as to any other column."
    )
    local_consensus_radius: int | float = setting(
        "model",
        0,
        "Columns attend to each other only up to this distance on the grid; 1.5 takes the eight "
        "neighbours. 0: every column attends to all others.",
        low=0,
    )
    recompute: bool = setting(
        "model",
        False,
        "Compute every iteration a second time in the backward pass instead of storing its inner "
        "results. This takes less memory and more time.",
    )
    consensus_temperature: float | None = setting(
        "model",
        None,
        "Temperature of the attention between columns, whose scores are then cosines of vectors. "
        "With a small value, such as 0.05, a column attends almost only to columns like itself. "
        "None: the scores grow with the length of the vectors, as published.",
    )

    # Training
    temperature: float = setting("training", 0.07, "Temperature of the contrastive loss.")
    optimizer: str = setting(
        "training",
        "adamw",
        "adamw (as published), or muon, which uses Muon for weight matrices and AdamW for all "
        "else. muon often learns more from the same number of batches; learning rates and weight "
        "decays have the same scale. It is slow with the large matrices of --head=flatten.",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(
        "training", 0.05, "Peak learning rate of the one-cycle schedule.", low=0
    )
    agreement: float = setting(
        "training",
        0.0,
        "Weight of the loss that asks for islands in stage one. Below the top level it asks for "
        "islands of even colour, on the top level for figures that differ from the background. 0: "
        "no such loss, as published.",
        low=0,
    )
    weight_decay: float = setting("training", 5e-4, "Weight decay of the optimizer.", low=0)
    lr_speed: int = setting(
        "training",
        2000,
        "Length of the one-cycle schedule, in epochs; if you give only max_epochs, it is "
        "max_epochs. Afterwards the learning rate keeps its last value.",
        low=1,
    )
    max_epochs: int = setting(
        "training", 10000, "Number of epochs after which training ends.", low=1
    )
    supervised_epochs: int | None = setting(
        "training",
        None,
        "Number of epochs of stage two, and the length of its schedule. None: as in stage one.",
        low=1,
    )
    supervised_learning_rate: float | None = setting(
        "training",
        None,
        "Peak learning rate of stage two. None: learning_rate.",
        low=0,
    )
    accumulate: int = setting(
        "training",
        1,
        "Number of batches whose gradients are added up before each step of the optimizer.",
        low=1,
    )
    compile: bool = setting(
        "training", False, "Compile the network with TorchInductor. This needs a C++ compiler."
    )
    checkpoint_every: float = setting(
        "training",
        10.0,
        "Minutes between two writes of last.ckpt within an epoch, for --resume_training. It is "
        "also written after every epoch, and when SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 stops the "
        "run (exit status 143, 130 or 138). Let a cluster send its signal early enough (SLURM: "
        "--signal).",
        low=0,
    )
    validate_every: int = setting("training", 1, "Number of epochs between two validations.", low=1)
    monitor: str = setting(
        "training",
        "val_acc",
        "Which validation figure chooses best.ckpt: the accuracy (highest) or the loss (lowest).",
        choices=("val_acc", "val_loss"),
    )

    # Islands and logs
    plot_islands: bool = setting(
        "pictures",
        False,
        "Show the islands of six sample images during the run: in a window, which stays until you "
        "close it, or on a web page with the environment variable MPLBACKEND=webagg, which in a "
        "terminal stays until Ctrl-C. Without a display the pictures are written as files.",
    )
    island_threshold: float = setting(
        "pictures",
        0.8,
        "Two neighbouring columns belong to one island if the cosine of their vectors is at least "
        "this number.",
        low=-1.0,
        high=1.0,
    )
    images: str | None = setting(
        "pictures",
        None,
        "Your own image file, or a folder of images, for --mode=islands. None: images of the test "
        "set.",
    )
    logger: str = setting(
        "pictures",
        "wandb",
        "Where metrics go besides the CSV file, which is always written. wandb without an account "
        "logs offline and says how to upload.",
        choices=("wandb", "tensorboard", "csv", "none"),
    )

    # Machine
    num_gpus: int = setting(
        "machine",
        1,
        "Number of GPUs of this machine to use. Without a GPU, training runs on the CPU.",
        low=1,
    )
    num_nodes: int = setting("machine", 1, "Number of machines that train together.", low=1)
    accelerator: str = setting(
        "machine", "auto", "Kind of device, by Lightning's names: auto, cpu, cuda, mps, ..."
    )
    devices: str | None = setting(
        "machine",
        None,
        "Number or list of devices, as Lightning takes them (auto, 2, '0,3'). It overrides "
        "num_gpus. Test and freeze use one device.",
    )
    strategy: str = setting(
        "machine",
        "auto",
        "How several processes share the training, by Lightning's names: auto, ddp, ...",
    )
    precision: str = setting(
        "machine",
        "32-true",
        "Number format of the computation, by Lightning's names: 32-true, bf16-mixed, ... "
        "bf16-mixed is faster where the hardware supports it.",
    )

    def __post_init__(self):
        for option in dataclasses.fields(self):
            self._check_value(option)
        for name in PATHS:
            self._expand_home(name)
        for name, usual in (("temperature", 0.07), ("limit_train", 1.0), ("limit_test", 1.0)):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"--{name}={getattr(self, name)}: must be more than 0, such as {usual}."
                )
        if self.dropout == 1:
            raise UserError("--dropout=1.0: drops everything; use less, such as 0.3.")
        if self.consensus_temperature is not None and not self.consensus_temperature > 0:
            raise UserError(
                f"--consensus_temperature={self.consensus_temperature}: must be more than 0, such "
                "as 0.05."
            )
        self._check_letters()
        parts = Path(self.exp_name).parts
        if not parts or ".." in parts or Path(self.exp_name).anchor or parts[0].startswith("~"):
            flag = "exp_name" if self.is_named else "dataset"
            raise UserError(
                f"--{flag}={self.exp_name}: must be a name, or folders and a name, inside "
                "output_dir."
            )
        if self.images is not None and self.mode != "islands":
            raise UserError(f"--images={self.images}: only --mode=islands draws your own images.")
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
            raise UserError(f"--{option.name}={value}: must be one line of text.")
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
            raise UserError(
                f"--{name}={path}: that user has no known home folder; for a folder of that name "
                f"write ./{path}."
            )
        object.__setattr__(self, name, os.path.expanduser(path))

    def _check_letters(self):
        """Refuse names that are not UTF-8 where the logger writes only UTF-8."""
        written = {"tensorboard": ("exp_name", "output_dir"), "wandb": FIELDS}
        for name in written.get(self.logger, ()):
            value = str(getattr(self, name))
            if value != value.encode("utf-8", "replace").decode():
                raise UserError(
                    f"--{name}={value}: {self.logger} takes only names in UTF-8; choose another "
                    "name, or --logger=csv."
                )

    def _check_grid(self):
        sides = {math.ceil(self.image_size / stride): stride for stride in (4, 2, 1)}
        if self.conv_image_size not in sides:
            raise UserError(
                f"--conv_image_size={self.conv_image_size}: the tokenizer cannot make this grid "
                f"from --image_size={self.image_size}; use one of {', '.join(map(str, sides))}."
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
            way_out = f"use a multiple of {2 * cells}, such as --patch_dim={nearest}"
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
                f"--strategy={self.strategy}: FSDP cannot divide scalars, and the four weights of "
                "the contributions are scalars; use --strategy=ddp."
            )

    @property
    def is_named(self):
        """Whether the run was given a name."""
        return vars(self)["exp_name"] is not None

    @property
    def _patch_sizes(self):
        """The patch sizes that make more than one column: the norm over a single one is 0."""
        return divisors(self.conv_image_size)[:-1]

    @property
    def stage(self):
        """Name of the training stage: "contrastive", "supervised" or "finetuned"."""
        if self.finetune:
            return "finetuned"
        return "supervised" if self.supervise else "contrastive"

    @property
    def n_iters(self):
        """Iterations T of the column loop."""
        return 2 * self.levels if self.iters is None else self.iters

    @property
    def blind(self):
        """Whether the embedding cannot depend on the image: the tokens reach level 0 in the first
        iteration and climb one level in each further one."""
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
        """Pixels of the image per cell of the grid, along a side: 1, 2 or 4."""
        return next(s for s in (4, 2, 1) if math.ceil(self.image_size / s) == self.conv_image_size)

    def replace(self, **changes):
        """A copy with some settings changed. It is checked again."""
        return Settings(**vars(self) | changes)


# Outside the class, where it would be taken for the default. `vars` holds the name as given.
Settings.exp_name = property(
    lambda self: vars(self)["exp_name"] if self.is_named else self.dataset,
    lambda self, name: vars(self).update(exp_name=name),
    doc="Name of the run: the one given, or that of the data set.",
)

FIELDS = {option.name: option for option in dataclasses.fields(Settings)}

# What a checkpoint says about the network and its input. Flags that the user gives come first.
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
