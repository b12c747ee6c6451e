"""Which values of settings are allowed, alone and together."""

import math
import os
import re
from pathlib import Path
from types import NoneType

from agglomerator.util.errors import UserError

HIDDEN = 4  # side of the patches that masked pre-training hides, in pixels
WINDOW = 4  # side of the windows of the dissimilarity head, in columns
NO_LINE = re.compile("[\0\n\r]")


def check(settings):
    """Raises UserError if values do not fit together; the message names ones that do."""
    if settings.dropout == 1:
        raise UserError("--dropout=1.0: drops everything; use less, such as 0.3.")
    check_letters(settings)
    parts = Path(settings.exp_name).parts
    if not parts or ".." in parts or Path(settings.exp_name).anchor or parts[0].startswith("~"):
        flag = "exp_name" if settings.is_named else "dataset"
        raise UserError(
            f"--{flag}={settings.exp_name}: must be a name, or folders and a name, inside "
            "output_dir."
        )
    if settings.images is not None and settings.mode not in ("islands", "explore"):
        raise UserError(
            f"--images={settings.images}: only --mode=islands and --mode=explore draw your own "
            "images."
        )
    if settings.video and settings.mode != "islands":
        raise UserError("--video: only --mode=islands follows islands; add it, or leave it out.")
    check_agreement(settings)
    check_grid(settings)
    check_tokenizer(settings)
    check_state(settings)
    check_successors(settings)
    check_strategy(settings)


def check_value(settings, option, types):
    """Raises UserError if a value has another type, or is outside its limits."""
    value = getattr(settings, option.name)
    wanted = types
    if isinstance(value, int) and not isinstance(value, bool) and float in wanted:
        wanted += (int,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join("None" if w is NoneType else w.__name__ for w in wanted)
        raise UserError(f"--{option.name}={value!r}: must be {names}.")
    if value is None:
        return
    if isinstance(value, str) and NO_LINE.search(value):
        raise UserError(f"--{option.name}={value}: must be one line of text.")
    limits = "choices", "low", "high", "above"
    choices, low, high, above = (option.metadata[name] for name in limits)
    if choices and value not in choices:
        known = ", ".join(map(str, choices))
        raise UserError(f"--{option.name}={value}: must be one of {known}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{option.name}={value}: must be a finite number.")
    if high is None and isinstance(value, int):
        high = 2**32 - 1
    if above is not None and value <= above:
        usual = option.metadata["usual"]
        raise UserError(f"--{option.name}={value}: must be more than {above}, such as {usual}.")
    if low is not None and value < low:
        raise UserError(f"--{option.name}={value}: must be at least {low}.")
    if high is not None and value > high:
        raise UserError(f"--{option.name}={value}: must be at most {high}.")


def complete_path(settings, name):
    """Put the user's home folder in the place of ~ in a path. Refuse an empty one, which may be an
    unset variable of the shell."""
    path = getattr(settings, name)
    if path == "":
        raise UserError(f"--{name}=: is empty; name a path, or . for this folder.")
    if path is None or not path.startswith("~"):
        return
    if os.path.expanduser(path) == path:
        raise UserError(
            f"--{name}={path}: that user has no known home folder; for a folder of that name "
            f"write ./{path}."
        )
    object.__setattr__(settings, name, os.path.expanduser(path))


def check_letters(settings):
    """Refuse names that are not UTF-8 where the logger writes only UTF-8."""
    written = {"tensorboard": ("exp_name", "output_dir"), "wandb": vars(settings)}
    for name in written.get(settings.logger, ()):
        value = str(getattr(settings, name))
        if value != value.encode("utf-8", "replace").decode():
            raise UserError(
                f"--{name}={value}: {settings.logger} takes only names in UTF-8; choose another "
                "name, or --logger=csv."
            )


def check_agreement(settings):
    """--agreement_cue=islands needs a teacher, and --augmentation=views."""
    if not settings.is_taught:
        return
    trains = settings.mode in ("train", "all")
    if trains and settings.load_checkpoint_dir is None and not settings.resume_training:
        raise UserError(
            "--agreement_cue=islands: a trained network teaches; name its checkpoint by "
            "--load_checkpoint_dir, one of --agreement_cue=composites for example."
        )
    if settings.augmentation != "views":
        raise UserError(
            f"--augmentation={settings.augmentation}: with --agreement_cue=islands only "
            "--augmentation=views carries the islands of an image to its crops."
        )


def check_grid(settings):
    """The tokenizer makes the grid, and patches divide it into more than one column."""
    sides = {math.ceil(settings.image_size / stride): stride for stride in (4, 2, 1)}
    if settings.conv_image_size not in sides:
        raise UserError(
            f"--conv_image_size={settings.conv_image_size}: the tokenizer cannot make this grid "
            f"from --image_size={settings.image_size}; use one of {', '.join(map(str, sides))}."
        )
    if settings.patch_size not in patch_sizes(settings):
        fault = (
            "does not divide"
            if settings.conv_image_size % settings.patch_size
            else "makes one column of"
        )
        raise UserError(
            f"--patch_size={settings.patch_size}: {fault} the grid of "
            f"--conv_image_size={settings.conv_image_size}; use one of "
            f"{_join(patch_sizes(settings))}."
        )


def check_tokenizer(settings):
    """The tokenizer has an even number of channels."""
    cells = settings.patch_size**2
    if settings.patch_dim % (2 * cells):
        smaller = [p for p in patch_sizes(settings) if settings.patch_dim % (2 * p * p) == 0]
        nearest = max(1, round(settings.patch_dim / (2 * cells))) * 2 * cells
        way_out = f"use a multiple of {2 * cells}, such as --patch_dim={nearest}"
        if smaller:
            way_out += f", or --patch_size of {_join(smaller)}"
        raise UserError(
            f"--patch_dim={settings.patch_dim}: leaves the tokenizer {settings.patch_dim}/"
            f"{settings.patch_size}^2 channels, which must be an even number; {way_out}."
        )


def check_state(settings):
    """There is a state of that number."""
    n_states = settings.n_iters + 1
    if not -n_states <= settings.denoise_iter < n_states:
        raise UserError(
            f"--denoise_iter={settings.denoise_iter}: {settings.n_iters} iterations make the "
            f"states 0 to {settings.n_iters}; use one of these, or -1 to -{n_states} counted from "
            "the end."
        )


def check_spread(settings):
    """Raises UserError if in some steps of a training the image does not reach what is trained."""
    s = settings
    if not s.iters_spread or s.stage == "supervised":
        return
    masked = s.stage == "masked"
    if s.denoise_iter >= 0 and not masked:
        raise UserError(
            f"--denoise_iter={s.denoise_iter}: with --iters_spread steps have different numbers of "
            "states; use --denoise_iter=-1, the last."
        )
    needed = 1 if masked else s.levels - 1 - s.denoise_iter
    if s.n_iters - s.iters_spread < needed:
        raise UserError(
            f"--iters_spread={s.iters_spread}: from --iters={s.n_iters} some steps would have "
            f"fewer iterations than the {needed} in which the image reaches what is trained; use "
            f"at most --iters_spread={max(s.n_iters - needed, 0)}, or more iterations."
        )


def check_successors(settings):
    """What the successors of the published model added fits the other settings."""
    s, masked = settings, settings.pretraining == "masked"
    if s.head == "dissimilarity" and s.grid_size % WINDOW:
        raise UserError(
            f"--head=dissimilarity: divides the grid into windows of {WINDOW}x{WINDOW} columns, "
            f"but has {s.grid_size}x{s.grid_size}; set --patch_size and --conv_image_size so that "
            f"{WINDOW} divides the side, or use --head=grid."
        )
    if masked and s.head != "mean":
        raise UserError(
            f"--head={s.head}: --pretraining=masked trains no head, and its embedding is the mean "
            "of the columns; use --head=mean."
        )
    if masked and s.image_size % HIDDEN:
        raise UserError(
            f"--image_size={s.image_size}: --pretraining=masked hides patches of {HIDDEN}x{HIDDEN} "
            f"pixels; use a multiple of {HIDDEN}, such as "
            f"--image_size={s.image_size // HIDDEN * HIDDEN}."
        )
    if masked and s.n_iters == 0:
        raise UserError(
            "--iters=0: with --pretraining=masked level 0 learns of the image in the first "
            "iteration; use at least --iters=1."
        )
    if masked and s.agreement:
        raise UserError(
            f"--agreement={s.agreement}: this loss joins the contrastive one; with "
            "--pretraining=masked use --agreement=0."
        )
    if masked and s.prototypes:
        raise UserError(
            "--prototypes: joins the contrastive loss; use --noprototypes with "
            "--pretraining=masked."
        )
    if s.level_cosine and not masked:
        raise UserError(
            f"--level_cosine={s.level_cosine}: this loss joins that of hidden patches; use "
            "--pretraining=masked, or --level_cosine=0."
        )


def check_strategy(settings):
    """The strategy can divide the network."""
    if "fsdp" in settings.strategy.lower():
        raise UserError(
            f"--strategy={settings.strategy}: FSDP cannot divide scalars, and the four weights of "
            "the contributions are scalars; use --strategy=ddp."
        )


def patch_sizes(settings):
    """The patch sizes that make more than one column: the norm over a single one is 0."""
    side = settings.conv_image_size
    return [size for size in range(1, side) if side % size == 0]


def _join(numbers):
    return ", ".join(map(str, numbers))
