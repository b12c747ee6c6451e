"""Settings: what to do, and where."""

from dataclasses import dataclass

from agglomerator.config.field import setting


@dataclass(frozen=True)
class RunSettings:
    """What to do, and where."""

    mode: str = setting(
        "train",
        "train; test (metrics on the test set); freeze (embeddings of all images as .npy files, "
        "drawn and scored); islands (pictures of the islands of a trained network, and scores "
        "where masks lie beside a folder of images); explore (the same live: point at a column, in "
        "a window, or on a page where there is no desktop or MPLBACKEND=webagg); all (stage one, "
        "then stage two, then test); runs (all runs in output_dir in one table, with means over "
        "seeds, also as .csv files). test and freeze take a checkpoint of either stage.",
        choices=("train", "test", "freeze", "islands", "explore", "all", "runs"),
    )
    supervise: bool = setting(
        False,
        "Train stage two, a classifier on the frozen embedding. Without this flag: stage one, "
        "the pre-training that --pretraining names.",
    )
    finetune: bool = setting(
        False, "Train the whole network in stage two, not only the classifier."
    )
    load_checkpoint_dir: str | None = setting(
        None,
        "Checkpoint to start from: one of this project, a published one, a plain state dict "
        "(torch.save or .safetensors), or pretrained:NAME, a network that comes with the project. "
        "It sets the flags of the model and the input that you do not give, and decides the "
        "held-out images and the names and order of the classes. Published files do not store "
        "iters, denoise_iter and consensus_self: give them if they are not the defaults.",
    )
    resume_training: bool = setting(
        False,
        "Continue from a checkpoint of the same stage, with its optimizer, schedule and place in "
        "the epoch; one of another stage gives only its weights. Without --load_checkpoint_dir: "
        "from the last checkpoint of the run itself, in whichever stage --mode=all has reached, or "
        "from the beginning if there is none. A finished run ends at once, with status 0; "
        "--mode=all tests it again.",
    )
    exp_name: str | None = setting(
        None,
        "Name of the run. Its files go to output_dir/exp_name. None: the name of the data set.",
    )
    output_dir: str = setting("output", "Folder that holds the output folders of all runs.")
    seed: int = setting(
        42,
        "Seed of weights, split, order of images, augmentation and the subsets of --limit_train, "
        "--limit_val and --limit_test.",
        low=0,
        high=2**32 - 1,
    )
