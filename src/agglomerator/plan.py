"""What a run does, resolved once: its settings, where it begins, its classes and its split.

The command line completes flags from flags (`config/derived.py`), and `training/length.py`, called
here, the length of a training. All that needs a checkpoint or data is decided here.
"""

from dataclasses import dataclass
from functools import cached_property

from agglomerator.config import DESCRIBED, FIELDS, LOSS_SETTINGS, SPLIT_SETTINGS, Settings
from agglomerator.data import registry
from agglomerator.data.classes import ClassMap, map_classes
from agglomerator.runs.checkpoints import PUBLISHED_PARTS, UNSEEN, Checkpoint, fingerprint, read
from agglomerator.runs.folder import RunFolder
from agglomerator.training.length import complete_from_images
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

# Of a resumed training: what it takes from its checkpoint; what changes its course if it differs.
KEPT = "learning_rate", "lr_speed", "weight_decay", "monitor"
OF_TRAINING = ("seed", "val_share", "batch_size", "accumulate", "limit_train", "precision",
               "iters_spread", "difficulty", "objects", *LOSS_SETTINGS)  # fmt: skip
OF_CONFIGS = "iters", "consensus_temperature"  # of UNSEEN, what configs of other networks set


@dataclass(frozen=True)
class Plan:
    """How a run begins.

    Attributes:
        settings: in force, of its stage.
        start: the checkpoint that it begins from, or None.
        goes_on: it goes on with the training of that checkpoint, not just from its weights.
        class_map: `ClassMap` with the labels of the run; None for those of the data set.
        split_seed: decides which training images are held out.
        own_classifier: the checkpoint's classifier knows the classes of the run; if not, training
            begins with a new one, and freeze takes class means in its place.
    """

    settings: Settings
    split_seed: int
    start: Checkpoint | None = None
    goes_on: bool = False
    class_map: ClassMap | None = None
    own_classifier: bool = True

    @cached_property
    def folder(self):
        """The `RunFolder` of its files."""
        return RunFolder(self.settings)

    @property
    def is_done(self):
        """The training that it goes on with has come to its end."""
        return self.goes_on and self.start.epochs >= self.settings.max_epochs

    @property
    def goes_on_in_place(self):
        """It goes on with the training that left its files in this folder."""
        return (
            self.goes_on and self.folder.last.parent.resolve() == self.start.path.resolve().parent
        )

    @cached_property
    def began_from(self):
        """`fingerprint` of the weights that a new training begins from; None of random ones."""
        return None if self.start is None or self.goes_on else fingerprint(self.start.weights)


def resolve(settings, given, use):
    """The `Plan` of a run. Says in a line what the checkpoint decides against the flags.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.
        use: "train", "test", "freeze" or "islands".

    Raises:
        UserError: flags, data set and checkpoint contradict each other, or a checkpoint is missing.
    """
    start, settings = _find_start(settings, use), _without_flip(settings, use)
    settings = complete_from_images(settings, given, start, counts=use != "islands")
    settings = of_stage(settings) if use == "train" else _as_trained(settings, start, use)
    if start is None:
        settings = complete_from_data(settings, given)
        return Plan(settings, settings.seed)
    asked, settings = settings, complete_from_checkpoint(settings, given, start, use)
    _tell_data(settings, given, start, use)
    if use == "islands":
        settings = settings.replace(n_classes=start.settings["n_classes"])
        return Plan(settings, settings.seed, start)
    found, known = registry.classes_of(settings), start.settings["n_classes"]
    if "n_classes" in given and asked.n_classes not in (len(found), known):
        raise _wrong_n_classes(asked, len(found))
    goes_on = use == "train" and settings.resume_training and start.stage == settings.stage
    if settings.is_taught and start.settings.get("agreement_cue") != "islands":
        goes_on = False  # it is the teacher
    class_map = map_classes(settings, start, found, use, goes_on)
    own = class_map is not None
    settings = settings.replace(n_classes=known if own or use != "train" else len(found))
    settings, split_seed = _split(settings, asked, given, start, use)
    if goes_on and start.resumable and start.epochs < settings.max_epochs:
        settings = _keep_schedule(settings, start)
    elif goes_on and not start.resumable:
        raise UserError(
            f"--resume_training: {start.name} holds weights alone, nothing to go on with; without "
            "this flag training starts from them."
        )
    return Plan(settings, split_seed, start, goes_on, class_map, own)


def _find_start(settings, use):
    """The checkpoint that a run begins from, or None."""
    folder = RunFolder(settings)
    if settings.load_checkpoint_dir is not None:
        return read(settings.load_checkpoint_dir)
    if use != "train":
        raise UserError(
            f"--mode={settings.mode}: needs a checkpoint; name it by --load_checkpoint_dir, as "
            f"--load_checkpoint_dir={folder.path / 'checkpoints' / 'best.ckpt'}."
        )
    if settings.resume_training:
        if folder.last.is_file():
            return read(folder.last)
        if settings.is_taught:
            raise UserError(
                f"--agreement_cue=islands: there is no {folder.last} to go on from; name the "
                "network that teaches by --load_checkpoint_dir."
            )
        say(f"--resume_training: there is no {folder.last} yet; begins from the start.")
    if settings.stage == "supervised":
        raise UserError(
            "--supervise: trains a classifier on a trained network; name its checkpoint by "
            f"--load_checkpoint_dir, as {folder.path / 'checkpoints' / 'best.ckpt'}, or let "
            "everything learn by --finetune."
        )
    return None


def of_stage(settings):
    """The settings of a training: in stage two its own length and learning rate."""
    s = settings
    if not s.classifies:
        return s
    length, rate = s.supervised_epochs, s.supervised_learning_rate
    return s.replace(
        lr_speed=length or s.lr_speed,
        max_epochs=length or s.max_epochs,
        learning_rate=s.learning_rate if rate is None else rate,
    )


def stage_one(settings):
    """The settings of `--mode=all` for stage one."""
    return settings.replace(supervise=False, finetune=False)


def stage_two(settings, best):
    """The settings of `--mode=all` for stage two: from the best checkpoint of stage one, or from
    where --resume_training finds it interrupted."""
    two = settings.replace(supervise=True)
    last = RunFolder(two).last
    resume = settings.resume_training and last.is_file() and _began_from(last, best)
    start = last if resume else best
    return two.replace(resume_training=resume, load_checkpoint_dir=str(start))


def _began_from(path, start):
    """Whether the training of one checkpoint began from the weights of another."""
    weights = read(start).weights
    try:
        return read(path).began_from == fingerprint(weights)
    except UserError:
        if path.is_file():
            raise
        return False  # another process has found so, and moved it


def _as_trained(settings, start, use):
    """The settings with the stage of the checkpoint, where it names it."""
    if use == "islands":
        return settings
    if start.stage is None:
        if not settings.supervise:
            say(f"{start.name} names no stage: taken as stage one (--supervise: stage two).")
        return settings
    return settings.replace(
        supervise=start.stage in ("supervised", "finetuned"), finetune=start.stage == "finetuned"
    )


def _without_flip(settings, use):
    """The settings without --test_time_flip where it has no effect; says so."""
    if use in ("train", "test") or not settings.test_time_flip:
        return settings
    say("--test_time_flip: does nothing here; only a test takes mirror images.")
    return settings.replace(test_time_flip=False)


def complete_from_data(settings, given):
    """The settings with n_classes as the data set has it; `given` names what the user gave.

    Raises:
        UserError: the user gave another n_classes, or there is no such data set.
    """
    n_classes = len(registry.classes_of(settings))
    if "n_classes" in given and settings.n_classes != n_classes:
        raise _wrong_n_classes(settings, n_classes)
    return settings.replace(n_classes=n_classes)


def complete_from_checkpoint(settings, given, checkpoint, use=None):
    """The settings, completed from the checkpoint: what describes its network, its input and its
    islands, and the seed, for a test its loss too, unless `given` names it. A published network
    keeps its head and tokenizer; if the flags name others, they are a config of another network,
    and its attention and iterations are the published ones, or those of the command line.

    Raises:
        UserError: they do not fit each other.
    """
    wanted = {*DESCRIBED, "seed", *(LOSS_SETTINGS if use == "test" else ())}
    wanted -= {"island_loss"} if "island_threshold" in given else set()
    published = checkpoint.stage is None
    taken = {
        name: value
        for name, value in checkpoint.settings.items()
        if name in wanted and (name not in given or (published and name in PUBLISHED_PARTS))
    }
    if published and "conv_image_size" in given:
        taken.pop("image_size", None)
    parts = [name for name in ("head", "tokenizer") if name in given and published]
    if any(taken[name] != getattr(settings, name) for name in parts):
        for name in OF_CONFIGS:
            value, usual = getattr(settings, name), FIELDS[name].default
            typed = name in getattr(given, "typed", ())
            if value != usual and not typed and name not in checkpoint.settings:
                taken[name] = usual
                say(
                    f"--{name}={value}: not used, since the flagfile is of another network than "
                    f"{checkpoint.name}; to use it, write it after the flagfile."
                )
    try:
        return settings.replace(**taken)
    except UserError as error:
        raise UserError(f"--load_checkpoint_dir={checkpoint.name}: {error}") from None


def _wrong_n_classes(settings, n_classes):
    return UserError(
        f"--n_classes={settings.n_classes}: {settings.dataset} has {n_classes} classes; use "
        f"--n_classes={n_classes}."
    )


def _tell_data(settings, given, start, use):
    """Say so if the user asks for other data, or another normalisation, than in the training."""
    before = start.settings.get("dataset", settings.dataset)
    if use == "test" and "dataset" in given and before != settings.dataset:
        say(f"{start.name} was trained on {before}, not on {settings.dataset}.")
    before = start.settings.get("normalization")
    if "normalization" in given and before is not None and settings.normalization != before:
        wanted = settings.normalization
        say(f"--normalization={wanted}: {start.name} was trained with that of {before}.")
    taken = [name for name in UNSEEN if name not in given and name not in start.settings]
    if taken and start.stage is None:
        values = {name: getattr(settings, name) for name in taken} | {"iters": settings.n_iters}
        values = " ".join(f"--{name}={values[name]}" for name in taken)
        say(f"{start.name} does not tell some settings: taken as {values}.")
    for name in (*UNSEEN, "image_size", *(LOSS_SETTINGS if use == "test" else ())):
        before, wanted = start.settings.get(name), getattr(settings, name)
        if name == "iters" and before is None:
            before = 2 * start.settings["levels"]
        known = name == "iters" or (start.stage is not None and name in start.settings)
        if name in given and known and wanted not in (None, before):
            say(f"--{name}={wanted}: {start.name} was trained with {before}.")


def _split(settings, asked, given, start, use):
    """(settings, split_seed): the images held out follow the checkpoint if it is of the same
    training images."""
    if use == "test" and settings.classifies:
        return settings, settings.seed
    if start.split_seed is None:
        if use == "train":
            say(
                f"{start.name} does not tell which images it learned from: the images held out may "
                "be among them, and their figures too good."
            )
        return settings, settings.seed
    there, dataset = start.training_images, start.settings.get("dataset")
    if (
        dataset != settings.dataset
        if there is None
        else there != registry.training_images(settings)
    ):
        say(
            f"{start.name} learned from other images than the training images of "
            f"{settings.dataset} ({settings.data_dir}): --seed and --val_share of this run divide "
            "them, and some that are held out may be among those it learned from."
        )
        return settings, settings.seed
    share = start.settings.get("val_share", settings.val_share)
    before = {"seed": start.split_seed, "val_share": share}
    for name in SPLIT_SETTINGS:
        if name in given and getattr(asked, name) != before[name]:
            say(
                f"--{name}={getattr(asked, name)}: the images held out stay those of {start.name}, "
                f"by --{name}={before[name]}."
            )
    return settings.replace(val_share=share), start.split_seed


def _keep_schedule(settings, start):
    """The settings of a resumed training, with the rates that it keeps; says what differs."""
    before = start.settings.get("optimizer", "adamw")
    if before != settings.optimizer:
        raise UserError(
            f"--optimizer={settings.optimizer}: {start.name} was trained by {before}; go on by "
            f"--optimizer={before}."
        )
    kept = {}
    for name in KEPT:
        before = start.settings.get(name)
        if before is not None and before != getattr(settings, name):
            kept[name] = kept[settings.flag_of(name)] = before
            say(f"--{settings.flag_of(name)}: the resumed run keeps {before}.")
    for name in OF_TRAINING:
        before = start.settings.get(name)
        if before is not None and before != getattr(settings, name):
            say(f"--{name}: was {before}; this run will differ from an uninterrupted one.")
    kept_length = kept.get("lr_speed", settings.lr_speed)
    if kept_length < settings.max_epochs:
        say(f"The schedule ends after {kept_length} epochs; then the learning rate is close to 0.")
    return settings.replace(**kept)
