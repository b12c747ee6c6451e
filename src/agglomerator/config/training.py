"""Settings: the training."""

from dataclasses import dataclass

from agglomerator.config.field import setting


@dataclass(frozen=True)
class TrainingSettings:
    """The training."""

    temperature: float = setting(0.07, "Temperature of the contrastive loss.", above=0)
    optimizer: str = setting(
        "adamw",
        "adamw (as published), or muon, which uses Muon for weight matrices and AdamW for all "
        "else. muon often learns more from the same number of batches; learning rates and weight "
        "decays have the same scale. It is slow with the large matrices of --head=flatten.",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(
        0.05,
        "Peak learning rate of the one-cycle schedule. For ImageFolder it follows from the batch "
        "unless you give it.",
        low=0,
    )
    agreement: float = setting(
        0.0,
        "Weight of the loss that asks for islands in stage one. 0: no such loss, as published.",
        low=0,
    )
    agreement_cue: str = setting(
        "colour",
        "What --agreement takes for parts and wholes. colour: below the top level patches of even "
        "colour, on the top level figures that differ from the background. composites: pieces of "
        "images, cut along the network's own islands (in the first third of lr_speed, blobs) and "
        "pasted elsewhere; below the top level small pieces, on the top level one figure on "
        "another ground. islands: a teacher, the network of load_checkpoint_dir, finds them in an "
        "image and its mirror image; the student sees crops.",
        choices=("colour", "composites", "islands"),
    )
    level_cosine: float = setting(
        0.0,
        "Weight of a second loss of --pretraining=masked. It asks that the bottom-up net agrees "
        "with the top level, and the top-down net with each level below: one minus the mean "
        "cosine, for each. It does not keep all vectors from becoming equal. 0: no such loss.",
        low=0,
    )
    iters_spread: int = setting(
        0,
        "Each batch draws its number of iterations, from iters - iters_spread to iters + "
        "iters_spread, where the network learns: not in stage two without --finetune. Then "
        "islands and classes change little within that range. With --compile each number takes a "
        "compilation of its own. 0: always iters, as published.",
        low=0,
        high=10000,
    )
    weight_decay: float = setting(5e-4, "Weight decay of the optimizer.", low=0)
    lr_speed: int = setting(
        2000,
        "Length of the one-cycle schedule, in epochs. If you do not give it, it is max_epochs, if "
        "you give that, or for ImageFolder. Afterwards the learning rate keeps its last value.",
        low=1,
    )
    max_epochs: int = setting(
        10000,
        "Number of epochs after which training ends. Unless you give it, that of ImageFolder "
        "follows from the number of images.",
        low=1,
    )
    supervised_epochs: int | None = setting(
        None,
        "Number of epochs of stage two, and the length of its schedule. None: as in stage one, for "
        "ImageFolder a fifth of it unless you give max_epochs.",
        low=1,
    )
    supervised_learning_rate: float | None = setting(
        None, "Peak learning rate of stage two. None: learning_rate.", low=0
    )
    classifier_start: str = setting(
        "class_means",
        "How the classifier of stage two is initialised, after stage one or for new classes. "
        "class_means: to predict the nearest class mean of the training images, with --prototypes "
        "the nearest prototype. weights: those of the checkpoint, random after stage one (as "
        "published) or for new classes; --head=mean always begins so.",
        choices=("class_means", "weights"),
    )
    accumulate: int = setting(
        1,
        "Number of batches whose gradients are added up before each step of the optimizer.",
        low=1,
    )
    compile: bool = setting(
        False, "Compile the network with TorchInductor. This needs a C++ compiler."
    )
    checkpoint_every: float = setting(
        10.0,
        "Minutes between two writes of last.ckpt within an epoch, for --resume_training. It is "
        "also written after every epoch, and when SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 stops the "
        "run (exit status 143, 130 or 138). Let a cluster send its signal early enough (SLURM: "
        "--signal).",
        low=0,
    )
    validate_every: int = setting(1, "Number of epochs between two validations.", low=1)
    monitor: str = setting(
        "val_acc",
        "Which validation figure chooses best.ckpt: the accuracy (highest) or the loss (lowest). "
        "Masked pre-training has only the loss.",
        choices=("val_acc", "val_loss"),
    )
