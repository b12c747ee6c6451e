"""Settings: the data, their split, and their augmentation."""

from dataclasses import dataclass

from agglomerator.config.field import setting


@dataclass(frozen=True)
class DataSettings:
    """The data, their split, and their augmentation."""

    dataset: str = setting(
        "CIFAR10",
        "Name of the data set: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, smallNORB, "
        "IMAGENET, PartWhole (drawn scenes) or ImageFolder (your own images).",
    )
    data_dir: str = setting(
        "data",
        "Folder that holds the data sets. Downloads go there. The usual archives (.gz, .tar.gz) "
        "are found and unpacked there. IMAGENET and ImageFolder read train/<class>/* and "
        "test/<class>/*. Images in val/ are for validation, or for the test if there is no test/.",
    )
    image_size: int = setting(
        32,
        "Side of the input images, in pixels. Unless you give it: 16 for digits, 28 for MNIST and "
        "FashionMNIST, 256 for IMAGENET.",
        low=8,
        high=4096,
    )
    n_channels: int = setting(
        3,
        "Channels that the network sees: 1 (colour images are made gray) or 3 (gray images are "
        "repeated). Unless you give it: 1 for digits, FashionMNIST and smallNORB.",
        choices=(1, 3),
    )
    n_classes: int = setting(
        10, "Number of classes. It is read from the data set; another number is refused.", low=1
    )
    batch_size: int = setting(
        1024,
        "Images per batch in each process. Contrastive training makes two views of each image, "
        "with --prototypes one. Unless you give it, that of ImageFolder follows from the number of "
        "images.",
        low=1,
    )
    num_workers: int = setting(
        8,
        "Number of processes that read and decode image files, at most one per CPU core. Data sets "
        "that lie in memory need none.",
        low=0,
    )
    skip_unreadable: bool = setting(
        False,
        "Leave out image files that cannot be read, and say how many. Without this flag such a "
        "file ends the run.",
    )
    difficulty: int = setting(
        1,
        "Only for PartWhole. 0: upright objects on a plain background. 1: rotated objects and some "
        "clutter. 2: more of both, and something in front of an object.",
        low=0,
        high=2,
    )
    objects: int = setting(
        1, "Only for PartWhole. The largest number of objects in a scene.", low=1, high=9
    )
    hierarchy: str | None = setting(
        None,
        "File that puts the classes into super-classes. Each line names a super-class and its "
        "classes, for example animals/birds: duck, swan. None: the known hierarchy of the data set "
        "or of its class names, if there is one.",
    )
    normalization: str | None = setting(
        None,
        "Data set whose mean and standard deviation normalise the images. None: the data set that "
        "the checkpoint was trained on, or else --dataset.",
    )
    augmentation: str = setting(
        "randaugment",
        "How training images are changed. randaugment: as published. crop: shifted by up to an "
        "eighth of the side. flip: shifted like that, and half of them mirrored. mirror: half of "
        "them mirrored. affine: shifted, turned and resized, for writing. views: like that and "
        "mirrored, in other colours, for photographs. "
        "CIFAR100 adds Random Erasing to each of them, but not where --agreement_cue=islands.",
        choices=("randaugment", "crop", "flip", "mirror", "affine", "views"),
    )
    val_share: float = setting(
        0.2,
        "Share of the training images that is held out for validation. A folder with val/ uses "
        "that instead. smallNORB holds out whole toys.",
        low=0.0,
        high=0.9,
    )
    limit_train: int | float = setting(
        1.0,
        "Share (0.1) or number (10) of training batches per epoch. Seed and epoch choose the "
        "images among all of the training set.",
        above=0,
    )
    limit_val: int | float = setting(
        1.0,
        "Share (0.1) or number (10) of validation batches. The seed chooses the images among all "
        "of them.",
        low=0,
    )
    limit_test: int | float = setting(
        1.0,
        "Share (0.1) or number (10) of test batches. The seed chooses the images among all of "
        "them.",
        above=0,
    )
    test_time_flip: bool = setting(
        False, "In a test, average the logits of an image and its mirror image."
    )
