"""Settings: pictures and logs."""

from dataclasses import dataclass

from agglomerator.config.field import setting

FIGURE_FORMATS = "png", "pdf", "svg"


@dataclass(frozen=True)
class PictureSettings:
    """Pictures and logs."""

    plot_islands: bool = setting(
        False,
        "Show the islands of six sample images during the run: in a window, which stays until you "
        "close it, or on a web page with the environment variable MPLBACKEND=webagg, which in a "
        "terminal stays until Ctrl-C. The pictures are always written as files, too.",
    )
    island_threshold: float = setting(
        0.8,
        "Two neighbouring columns belong to one island if the cosine of their vectors is at least "
        "this number.",
        low=-1.0,
        high=1.0,
    )
    island_loss: float | None = setting(
        None,
        "Find islands by merging (Ward's criterion): islands that touch merge while this is cheap. "
        "A merge may add at most island_loss * number of columns to the sum of squared distances "
        "of unit vectors from their island's mean. Each lower level allows a quarter of that. "
        "None: find islands by island_threshold.",
        above=0,
        usual=0.03,
    )
    images: str | None = setting(
        None,
        "For --mode=islands and explore: your own image file, a folder of images, or numbers of "
        "test images, from 0, as 3,10-12. None: the first test image of each of six classes, or in "
        "explore the whole test set. Islands are scored if a folder holds test/<folder>/x.jpg and "
        "the masks parts/test/<folder>/x.png or objects/test/<folder>/x.png: one channel, 0 "
        "background, 1 to 254 the segments, 255 is ignored.",
    )
    video: bool = setting(
        False,
        "For --mode=islands: --images is a clip (GIF, MP4, or a folder of frames in the "
        "order of their names). The state is carried on from frame to frame, --iters iterations "
        "each, and islands keep their colours. Without --images, with --dataset=PartWhole: moving "
        "scenes, whose islands are scored over space and time.",
    )
    figure_format: str = setting(
        "png",
        "Second format of pictures, pdf or svg for papers, written beside the PNG files.",
        choices=FIGURE_FORMATS,
    )
    figure_dpi: int = setting(
        150,
        "Resolution of PNG pictures, in dots per inch. The live view has its own.",
        low=10,
        high=1200,
    )
    logger: str = setting(
        "wandb",
        "Where metrics go besides the CSV file, which is always written; csv and none: nowhere "
        "else. wandb without an account logs offline and says how to upload.",
        choices=("wandb", "tensorboard", "csv", "none"),
    )
