"""Pictures of the embedding: the test images in two dimensions, the tree of the classes."""

import io

import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from torchvision.transforms.v2.functional import resize

from agglomerator.hierarchy.marks import GRAY, Marks
from agglomerator.hierarchy.points import Points
from agglomerator.hierarchy.scores import ClassTree
from agglomerator.util.figure import Figure
from agglomerator.util.files import write_json
from agglomerator.util.terminal import escaped

THUMBNAIL = 64  # pixels, greatest side
WIDTH = 8.3  # inches: at 100 pixels an inch, the width of a README


def draw_embedding(points, marks, classes, title):
    """Draw test images in two dimensions: on the principal axes, and by t-SNE.

    Args:
        points: `Points`.
        marks: `Marks` of the classes.
        classes: names.
        title: of the figure.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np
        >>> embedding = np.random.default_rng(0).normal(size=(20, 4))
        >>> points = Points.of(embedding, np.arange(20) % 2)
        >>> classes = ["cat", "dog"]
        >>> figure = draw_embedding(points, Marks.of(classes, None, [0, 1]), classes, "Title")
        >>> [ax.get_title() for ax in figure.axes]
        ['PCA', 't-SNE']
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = [("PCA", points.pca)] + [("t-SNE", points.tsne)] * (points.tsne is not None)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = to_rgba_array(marks.colours)[points.labels]
    shapes = np.array(marks.shapes)[points.labels]
    order = np.random.default_rng(0).permutation(len(points.labels))
    for ax, (name, xy) in zip(axes, panels, strict=True):
        for batch in np.array_split(order, 10):  # in one go, the last shape would hide the others
            for shape in np.unique(shapes):
                rows = batch[shapes[batch] == shape]
                ax.scatter(*xy[rows].T, s=9, c=colours[rows], marker=shape, linewidths=0, alpha=0.8)
        ax.set_title(name, fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.margins(0.03)
        if len(classes) <= 10:
            _name_classes(ax, xy, points.labels, classes)
    for i, axis in enumerate((axes[0].xaxis, axes[0].yaxis)):
        axis.set_label_text(f"axis {i + 1} ({points.shares[i]:.0%} of the variance)", fontsize=9)
    _add_legend(figure, marks.legend, "outside right center")
    return figure


def _name_classes(ax, xy, labels, classes):
    """Write the names of classes at their places, unless one would hide another. The legend has
    all names."""
    size = np.maximum(np.ptp(xy, axis=0), 1e-12)
    written = []  # places
    for label in np.unique(labels):
        middle = np.median(xy[labels == label], axis=0)
        if all((abs(middle - place) / size > (0.22, 0.045)).any() for place in written):
            outline = [withStroke(linewidth=2.5, foreground="white")]
            options = {"ha": "center", "va": "center", "fontsize": 8, "path_effects": outline}
            ax.text(*middle, classes[label], **options)
            written.append(middle)


def _add_legend(figure, rows, loc, **options):
    if not rows:
        return
    handles = [
        Line2D(
            [], [], linestyle="", marker=shape, markersize=6, label=text,
            color=colour or "black", markerfacecolor=colour or "none",
        )
        for text, colour, shape in rows
    ]  # fmt: skip
    options |= {"fontsize": 8, "frameon": False, "handletextpad": 0.2}
    legend = figure.legend(handles=handles, loc=loc, **options)
    for text, (_, colour, _) in zip(legend.get_texts(), rows, strict=True):
        if colour is None:
            text.set_fontweight("bold")


def draw_tree(tree, marks, classes, hierarchy, title):
    """Draw the class tree. A branch that joins only classes of one super-class is thick.

    Args:
        tree: `ClassTree`.
        marks: `Marks` of the classes.
        classes: names.
        hierarchy: `Hierarchy` of the classes, or None.
        title: of the figure.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np
        >>> classes, tree = ["cat", "dog"], ClassTree(np.arange(2), np.array([[0.0, 1, 0.3, 2]]))
        >>> figure = draw_tree(tree, Marks.of(classes, None, [0, 1]), classes, None, "Title")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['cat', 'dog']
    """
    m = len(tree.present)
    small = m > 30
    figure = Figure(figsize=(WIDTH, min(1.2 + (0.13 if small else 0.25) * m, 80)))
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    tops = np.arange(len(classes)) if hierarchy is None else hierarchy.super_labels
    greatest = _draw_branches(ax, tree, tops, marks.branches)
    for place, leaf in enumerate(tree.order):
        label = tree.present[leaf]
        ax.plot(
            0, place, color=marks.colours[label], marker=marks.shapes[label],
            markersize=4.5 if small else 8, clip_on=False, zorder=3,
        )  # fmt: skip
    names = [classes[tree.present[leaf]] for leaf in tree.order]
    ax.set_yticks(range(m), names, fontsize=7 if small else 9)
    ax.tick_params("y", length=0, pad=8)
    ax.yaxis.tick_right()
    ax.set_xlim(greatest * 1.02 or 1, 0)
    ax.set_ylim(m - 0.4, -0.6)
    ax.spines[["top", "left", "right"]].set_visible(False)
    note = "" if hierarchy is None else "; thick: within one super-class"
    ax.set_xlabel(f"cosine distance of class means (average linkage){note}", fontsize=9)
    ax.tick_params("x", labelsize=8)
    figure.suptitle(title, fontsize=11)
    columns = min(len(marks.super_legend), 3 if small else 6) or 1
    _add_legend(figure, marks.super_legend, "outside lower center", ncols=columns)
    return figure


def _draw_branches(ax, tree, tops, colours):
    """Draw the branches of a class tree; returns the height of the root.

    Args:
        tops: (n_classes,) super-class of each class.
        colours: of the super-classes, or None.
    """
    m = len(tree.present)
    places, heights = np.zeros(2 * m - 1), np.zeros(2 * m - 1)
    places[tree.order] = np.arange(m)
    under = [{tops[label]} for label in tree.present]  # the super-classes below each node
    for i, (left, right, height, _) in enumerate(tree.linkage):
        pair = [int(left), int(right)]
        heights[m + i], places[m + i] = height, places[pair].mean()
        under.append(under[pair[0]] | under[pair[1]])
        pure = len(under[-1]) == 1
        colour = colours[min(under[-1])] if pure and colours else "black"
        ax.plot(
            heights[[pair[0], m + i, m + i, pair[1]]],
            places[[pair[0], pair[0], pair[1], pair[1]]],
            color=colour if pure else GRAY,
            linewidth=2.2 if pure else 1.2,
            solid_capstyle="round",
        )
    return heights.max()


def draw(embedding, labels, scored, settings, data):
    """Draw the pictures of a test set.

    Args:
        embedding: (N, contr_dim).
        labels: (N,).
        scored: what `scores` returns.
        settings, data: of the run.

    Returns:
        (points, figures): the `Points` drawn, and a dictionary of figures: `embedding` and, if at
        least two classes have images, `dendrogram`.
    """
    name, classes, hierarchy = settings.exp_name, data.classes, data.hierarchy
    points = Points.of(embedding, labels, settings.seed)
    tree = ClassTree.of(embedding, labels) if len(np.unique(labels)) > 1 else None
    order = [] if tree is None else tree.present[tree.order]
    marks = Marks.of(classes, hierarchy, order)
    shown, whole = len(points.rows), len(data.whole("test"))
    n_images = f"{shown} of {whole}" if shown < whole else "the"
    title = f"{name}: embedding of {n_images} test images{marks.note}"
    figures = {"embedding": draw_embedding(points, marks, classes, title)}
    if tree is not None:
        title = f"{name}: tree of the class means"
        score = scored.get("cophenetic_correlation")
        if score:
            title += f", cophenetic correlation {score['value']:.2f} (p = {score['p']:.3f})"
        figures["dendrogram"] = draw_tree(tree, marks, classes, hierarchy, title)
    return points, figures


def write(folder, record, figures):
    """Write a record, and each figure as .png, .pdf and what --figure_format says, into a
    `RunFolder`; returns the paths."""
    paths = [folder.frozen_record]
    write_json(paths[0], record)
    for name, figure in figures.items():
        kinds = tuple(dict.fromkeys(("png", "pdf", *folder.figure_kinds)))
        paths += figure.write(folder.path / name, kinds, folder.figure_dpi)
    return paths


def log(loggers, points, figures, embedding, predicted, data):
    """Log the pictures and the points, to TensorBoard's projector or a table of Weights & Biases.
    Each point has its image, class and prediction.

    Args:
        loggers: of the run; those of other kinds get nothing.
        points, figures: what `draw` returns.
        embedding, predicted: of all test images, (N, contr_dim) and (N,).
        data: of the run.
    """
    if not loggers:
        return
    thumbnails = _thumbnails(data, points.rows, len(embedding))
    classes, hierarchy = data.classes, data.hierarchy
    names = {"class": [classes[label] for label in points.labels]}
    if hierarchy is not None:
        tops = hierarchy.super_labels[points.labels]
        names["super-class"] = [hierarchy.super_classes[top] for top in tops]
    names["predicted"] = [classes[label] for label in predicted[points.rows]]
    names = {column: list(map(escaped, of)) for column, of in names.items()}
    for logger in loggers:
        kind = type(logger).__name__
        if kind == "TensorBoardLogger":
            for name, figure in figures.items():
                logger.experiment.add_figure(name, figure, close=False)
            logger.experiment.add_embedding(
                embedding[points.rows],
                metadata=list(zip(*names.values(), strict=True)),
                metadata_header=list(names),
                label_img=None if thumbnails is None else thumbnails / 255,
                tag="embedding",
            )
            logger.experiment.flush()
        elif kind == "WandbLogger":
            _log_to_wandb(logger.experiment, points, figures, names, thumbnails)


def _thumbnails(data, rows, n_images):
    """Images of the test set for people to look at, (P, C, S, S) uint8, S at most 64: TensorBoard
    puts all of them into one image, which must not grow too large. None if some images could not be
    read: rows and images do not match then."""
    if n_images < len(data.test):
        return None
    images, _ = data.test.dataset[np.asarray(data.test.indices)[rows].tolist()]
    images = data.crop(images)
    side = images.shape[-1]
    return images if side <= THUMBNAIL else resize(images, [THUMBNAIL, THUMBNAIL])


def _log_to_wandb(run, points, figures, names, thumbnails):
    import wandb

    columns = dict(names)
    if thumbnails is not None:
        pixels = thumbnails.permute(0, 2, 3, 1).squeeze(-1).numpy()
        columns = {"image": [wandb.Image(image) for image in pixels]} | columns
    for name, xy in (("PCA", points.pca), ("t-SNE", points.tsne)):
        if xy is not None:
            columns |= {f"{name} {i + 1}": xy[:, i].tolist() for i in range(2)}
    rows = list(zip(*columns.values(), strict=True))
    table = wandb.Table(columns=list(columns), data=rows)
    pictures = {name: wandb.Image(_rendered(figure)) for name, figure in figures.items()}
    run.log({"points": table} | pictures)


def _rendered(figure):
    """The figure as a Pillow image: wandb takes no subclass of matplotlib's Figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return Image.open(file)
