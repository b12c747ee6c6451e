"""Settings: the network."""

from dataclasses import dataclass

from agglomerator.config.field import setting


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    patch_size: int = setting(
        1,
        "Side of the square of tokenizer cells that becomes one column. A divisor of "
        "conv_image_size.",
        low=1,
    )
    patch_dim: int = setting(
        128, "Width of a level: the length of one vector. A multiple of 2 * patch_size^2.", low=2
    )
    levels: int = setting(
        2,
        "Number of levels of a column: parts at the bottom, the whole object at the top.",
        low=2,
        high=1000,
    )
    iters: int | None = setting(
        None, "Number of iterations of the column loop. None: twice the levels.", low=0, high=10000
    )
    conv_image_size: int = setting(
        8,
        "Side of the tokenizer's output grid: image_size / 4 (the default), / 2 or / 1, rounded "
        "up. image_size gives a column to every pixel: use it with "
        "--head=grid and a small batch. Attention grows with the square of the number of columns, "
        "unless local_consensus_radius limits it.",
        low=1,
    )
    tokenizer: str = setting(
        "convmlp",
        "Kind of tokenizer. convmlp (as published): convolutions, then pooling. residual: two "
        "convolutions, pooling, residual blocks. vgg: convolutions on the grid of the image, then "
        "on half and on a quarter of it. pyramid: two convolutions, then coarser and coarser grids "
        "and back, so that each cell sees all of the image.",
        choices=("convmlp", "residual", "vgg", "pyramid"),
    )
    tokenizer_width: int | None = setting(
        None,
        "Channels of the tokenizer. convmlp: of all convolutions but the last. residual: of the "
        "first convolution; the residual blocks have twice as many. vgg: of the first convolution; "
        "later ones have two and four times as many. pyramid: of the "
        "finest grid. None: half of the output channels, patch_dim "
        "/ patch_size^2.",
        low=1,
    )
    tokenizer_depth: int = setting(
        3,
        "Depth of the tokenizer. convmlp: number of convolutions, 3 as published. residual: number "
        "of residual blocks. vgg: number of convolutions of the greatest width. pyramid: number of "
        "coarser grids.",
        low=2,
    )
    head: str = setting(
        "flatten",
        "How the columns of the top level become one vector. flatten (as published): all columns "
        "in a row; its weights grow with the square of columns * patch_dim. grid: means over a "
        "coarser grid, then flattened; its weights do not grow with the number of columns. "
        "dissimilarity: sums over windows of 4x4 columns, in which columns unlike the others weigh "
        "most, then as flatten. mean: the mean of all columns, and a linear classifier; default "
        "with --pretraining=masked.",
        choices=("flatten", "grid", "dissimilarity", "mean"),
    )
    head_side: int = setting(4, "Side of the coarser grid of --head=grid.", low=1, high=4096)
    denoise_iter: int = setting(
        -1, "Number of the state that feeds the head: 0 is the initial state, -1 the last."
    )
    dropout: float = setting(0.3, "Dropout rate in the head; --head=mean has none.", low=0, high=1)
    contr_dim: int = setting(
        512,
        "Length of the embedding of an image. With --head=mean it is patch_dim, whatever this is.",
        low=1,
    )
    consensus_self: bool = setting(False, "Let a column attend to itself as to any other column.")
    local_consensus_radius: int | float = setting(
        0,
        "Columns attend to each other only up to this distance on the grid; 1.5 takes the eight "
        "neighbours. 0: every column attends to all others.",
        low=0,
    )
    consensus: str = setting(
        "published",
        "How columns of a level agree. published: by attention. agreement: in each iteration a "
        "level also receives a fifth contribution: attention to like columns within distance 3, "
        "and to unlike ones by the published sign (Zeng et al. 2025), which attracts them. "
        "agreement_repel: the same with the other sign, which repels unlike columns.",
        choices=("published", "agreement", "agreement_repel"),
    )
    pretraining: str = setting(
        "contrastive",
        "What stage one learns. contrastive (as published): to tell classes apart. masked: to "
        "predict hidden patches of 4x4 pixels from level 0. It needs no classes: all images in "
        "train/ will do. Then learn classes by --supervise --finetune. --plot_islands also draws "
        "its predictions.",
        choices=("contrastive", "masked"),
    )
    prototypes: bool = setting(
        False,
        "Stage one also learns one vector per class, its prototype, and compares views with those "
        "of all classes. So one view of each image is enough. Helps most where a batch has few "
        "images of each class. The classifier of stage two begins from them.",
    )
    column_norm: str = setting(
        "places",
        "The norms over columns. places (as published): each place of the grid has a scale and a "
        "shift of its own, which write the place into every vector. plain: without them.",
        choices=("places", "plain"),
    )
    recompute: bool = setting(
        False,
        "Gradient checkpointing: compute every iteration again in the backward pass instead of "
        "storing its activations. This takes less memory and more time.",
    )
    consensus_temperature: float | None = setting(
        None,
        "Temperature of the attention between columns, whose scores are then cosines of vectors. "
        "With a small value, such as 0.05, a column attends almost only to columns like itself. "
        "None: the scores grow with the length of the vectors, as published.",
        above=0,
        usual=0.05,
    )
