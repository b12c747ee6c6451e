"""Settings: pictures and logs."""

from dataclasses import dataclass

from agglomerator.config.setting import setting


@dataclass(frozen=True)
class PictureSettings:
    """Pictures and logs."""

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
        "set. Islands are scored if it holds test/<folder>/x.jpg and the masks parts/test/<folder>/"
        "x.png or objects/test/<folder>/x.png: one channel, 0 background, 1 to 254 the segments, "
        "255 counts nowhere.",
    )
    logger: str = setting(
        "pictures",
        "wandb",
        "Where metrics go besides the CSV file, which is always written. wandb without an account "
        "logs offline and says how to upload.",
        choices=("wandb", "tensorboard", "csv", "none"),
    )
