"""All settings of a run.

The command line has a flag for each setting; `Agglomerator(...)` and `load_checkpoint(...)` take
them as keywords. Nothing here imports absl or PyTorch, so that flags are read quickly.
"""

import dataclasses
import typing
from dataclasses import dataclass

from agglomerator.config import checks
from agglomerator.config.data import DataSettings
from agglomerator.config.derived import stride_of
from agglomerator.config.machine import MachineSettings
from agglomerator.config.model import ModelSettings
from agglomerator.config.pictures import PictureSettings
from agglomerator.config.run import RunSettings
from agglomerator.config.training import TrainingSettings

PATHS = ("load_checkpoint_dir", "output_dir", "data_dir", "hierarchy", "images")


@dataclass(frozen=True)
class Settings(
    MachineSettings, PictureSettings, TrainingSettings, ModelSettings, DataSettings, RunSettings
):
    """All settings of a run, checked as far as possible without data or files.

    A path may begin with ~, the user's home folder. A run without a name has the name of its data
    set, also after `replace`.

    Raises:
        UserError: a value is outside its limits, or two values do not fit together. The message
            names the setting, its value, and values that work.
    """

    def __post_init__(self):
        for option in dataclasses.fields(self):
            checks.check_value(self, option, value_types(option.name))
        for name in PATHS:
            checks.complete_path(self, name)
        checks.check(self)

    @property
    def is_named(self):
        """Whether the run was given a name."""
        return vars(self)["exp_name"] is not None

    @property
    def stage(self):
        """Name of the training stage: "contrastive", "masked", "supervised" or "finetuned"."""
        if self.finetune:
            return "finetuned"
        return "supervised" if self.supervise else self.pretraining

    @property
    def classifies(self):
        """Whether it is stage two, which has a classifier."""
        return self.supervise or self.finetune

    @property
    def chosen_by(self):
        """The validation figure that chooses the best checkpoint."""
        return "val_loss" if self.stage == "masked" else self.monitor

    @property
    def embedding_dim(self):
        """Length of the embedding of an image."""
        return self.patch_dim if self.head == "mean" else self.contr_dim

    @property
    def found_by(self):
        """How islands are found, the arguments of `islands.segments.segment`."""
        return {"threshold": self.island_threshold, "loss": self.island_loss}

    @property
    def figure_kinds(self):
        """Endings of the files of a picture."""
        return tuple(dict.fromkeys(("png", self.figure_format)))

    @property
    def n_views(self):
        """Views that stage one makes of each image. With prototypes every view has a positive, so
        that one is enough; with composites, the composite is the second."""
        return 1 if self.prototypes and not self.composes else 2

    def flag_of(self, name):
        """The flag that a setting of a training comes from: stage two has some of its own."""
        own = f"supervised_{name.removeprefix('max_')}"
        return own if self.classifies and getattr(self, own, None) is not None else name

    @property
    def composes(self):
        """Whether the network learns the pieces of composites."""
        return self.agreement > 0 and self.agreement_cue == "composites"

    @property
    def is_taught(self):
        """Whether the network learns the islands that a `Teacher` sees."""
        asks = self.agreement > 0 and self.stage == "contrastive"
        return asks and self.agreement_cue == "islands"

    @property
    def n_iters(self):
        """Iterations T of the column loop."""
        return 2 * self.levels if self.iters is None else self.iters

    @property
    def blind(self):
        """Whether the embedding cannot depend on the image: the tokens reach level 0 in the first
        iteration and climb one level in each further one."""
        embeds = self.stage != "masked"
        return embeds and self.denoise_iter % (self.n_iters + 1) < self.levels

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
        return stride_of(self.image_size, self.conv_image_size)

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
GROUPS = {
    group: tuple(option.name for option in dataclasses.fields(part))
    for group, part in {
        "What to do": RunSettings,
        "Data": DataSettings,
        "Model": ModelSettings,
        "Training": TrainingSettings,
        "Pictures and logs": PictureSettings,
        "Machine": MachineSettings,
    }.items()
}

# What a checkpoint says about the network and its input. Flags that the user gives come first.
MODEL_SETTINGS = GROUPS["Model"]
INPUT_SETTINGS = ("dataset", "image_size", "n_channels", "n_classes", "difficulty", "objects")
SPLIT_SETTINGS = ("seed", "val_share")
# What a checkpoint stores of the network, its input and its islands.
DESCRIBED = (
    *MODEL_SETTINGS, *INPUT_SETTINGS, "island_threshold", "island_loss", "normalization",
)  # fmt: skip
# What the loss of stage one depends on besides.
LOSS_SETTINGS = "temperature", "augmentation", "agreement", "agreement_cue", "level_cosine"


def value_types(name):
    """The types that a setting takes, as a tuple: (int,), (int, float), (str, NoneType), ..."""
    hint = _HINTS[name]
    return typing.get_args(hint) or (hint,)


_HINTS = typing.get_type_hints(Settings)
