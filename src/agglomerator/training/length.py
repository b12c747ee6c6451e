"""How long a training lasts, and how large its batches and steps are, where the user does not say:
from the number of training images, for data sets of any size (`DataSetEntry.of_any_size`)."""

import math

from agglomerator.data import registry
from agglomerator.data.sets.folder import n_training_images
from agglomerator.util.machine import devices_of, processes_here

SMALLEST, LARGEST = 16, 256  # batches
RATES = {"muon": 0.012, "adamw": 0.002}  # peaks of stage one, for a batch of 128
LENGTH = "batch_size", "max_epochs", "lr_speed", "supervised_epochs", "learning_rate"


def length_for(n_images, processes=1, optimizer="adamw", batch=None, accumulate=1):
    """Batch, epochs and learning rate for a number of training images.

    The batch grows with the square root of the number of images, from 16 to 256 in powers of two,
    divided among the processes; an epoch has at least four of them. The images seen in stage one
    grow with the power 0.6: 100 images are seen 158 times, 10000 25 times, a million 4 times. Stage
    two takes a fifth of these epochs, at least 2. The learning rate grows with the square root of
    the batch, for the noise of a gradient falls so.

    Args:
        n_images: to learn from, without those held out.
        processes: that train together.
        optimizer: a key of `RATES`.
        batch: images of a batch in each process, if they are decided.
        accumulate: batches to a step.

    Returns:
        A dictionary of the settings `LENGTH`.

    Example:
        >>> length_for(10000)["batch_size"], length_for(10000)["max_epochs"]
        (128, 25)
    """
    whole = 2 ** round(math.log2(max(n_images, 1)) / 2)
    whole = min(max(SMALLEST, min(whole, LARGEST)), max(n_images // 4, 1))
    batch = max(1, whole // processes) if batch is None else batch
    rate = RATES[optimizer] * (batch * processes * accumulate / 128) ** 0.5
    epochs = max(1, round(1000 * max(n_images, 1) ** -0.4))
    return {
        "batch_size": batch,
        "max_epochs": epochs,
        "lr_speed": epochs,
        "supervised_epochs": max(2, round(epochs / 5)),
        "learning_rate": float(f"{rate:.2g}"),
    }


def derived_of(settings, given):
    """Names of the settings `LENGTH` that follow from the number of images, as a list: those that
    the user did not give. Who gives --max_epochs decides on both stages."""
    if not registry.entry_of(settings).of_any_size:
        return []
    decided = set(LENGTH[1:4]) if "max_epochs" in given else set()
    return [name for name in LENGTH if name not in given | decided]


def complete_from_images(settings, given, start=None, counts=True):
    """The settings with batch and length from the number of training images, where the user did not
    give them. What a checkpoint of the same training images was trained with comes first.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.
        start: the `Checkpoint` that the run begins from, or None.
        counts: whether the run needs the training images; if not, only the checkpoint counts.

    Raises:
        UserError: the folder of images is missing or wrong.
    """
    s = of = settings
    if start is not None:
        told = (start.settings.keys() & {"dataset", "pretraining", "head"}) - set(given)
        of = settings.replace(**{name: start.settings[name] for name in told})
    names = derived_of(of, given)
    if not names:
        return settings
    kept, of_ours = {}, start is not None and start.stage is not None
    if of_ours and (not counts or start.training_images == registry.training_images(of)):
        goes_on = settings.resume_training and start.stage == of.stage
        keeps = LENGTH if goes_on else ("batch_size", "supervised_epochs")
        kept = {name: start.settings.get(name) for name in (*keeps, "val_share")}
        kept = {name: value for name, value in kept.items() if value is not None}
    found = kept
    if counts:
        n_images = n_training_images(of.replace(val_share=kept.get("val_share", of.val_share)))
        processes = processes_here(settings) * devices_of(settings)[1]
        batch = settings.batch_size if "batch_size" in given else kept.get("batch_size")
        found = length_for(n_images, processes, s.optimizer, batch, s.accumulate) | kept
    return settings.replace(**{name: found[name] for name in names if name in found})


def tell_length(settings, given, n_images):
    """The line that says what was derived for this stage, or None."""
    names = derived_of(settings, given)
    one = "batch_size", "max_epochs", "learning_rate"
    wanted = ("batch_size", "supervised_epochs") if settings.classifies else one
    said = [f"--{name}={getattr(settings, name)}" for name in wanted if name in names]
    if not said:
        return None
    return f"Chosen for {n_images} training images: {' '.join(said)}; give these flags to override."
