"""Images put together from pieces of others, whose segments are known because we made them.

What is cut out is what the network itself sees as one: all columns that agree with one drawn at
random. Where that is nearly nothing or nearly everything, and in the first third of a training, a
random blob is cut out instead. To paste what was cut elsewhere, and to ask the network to find it
again, is an old source of segments without labels (Remez, Huang, Brown, "Learning to segment via
cut-and-paste", ECCV 2018; Arandjelovic and Zisserman, "Object discovery with a copy-pasting GAN",
2019). That the pieces are the network's own islands is ours.

All draws come from a generator on the CPU.
"""

import torch
import torch.nn.functional as F

from agglomerator.data.crops import random_colours, random_crops, to_bytes
from agglomerator.data.transforms import send
from agglomerator.util.precision import in_float32

PASTED = 6  # pieces on an image
OF_ITSELF = 0.6  # share of pieces that come from the same image
SIZES = (0.01, 0.35), (0.04, 0.6)  # share of the image that a piece, a figure may take
AGREEMENT = 0.75  # least cosine with the column drawn
OWN_ISLANDS = 0.7  # share of figures that are cut along islands, where these have a fair size
CELLS = 6  # regions of a mosaic along a side
CENTRE = 0.4  # a figure is cut around a column from the middle of the image, so wide


@in_float32
def compose(colours, levels, generator, own=True):
    """Make two composites of each image: its figure on another ground; and, of half of the images,
    pieces pasted on it, of the others a mosaic.

    Args:
        colours: (B, C, H, W) from 0 to 1.
        levels: (K, B, d, S, S), of unit length, what the network sees in the images.
        generator: torch.Generator on the CPU.
        own: cut along the islands of these levels; False for blobs alone.

    Returns:
        (images, pieces): (2B, C, H, W) uint8, figures first, and (2B, H, W) int64, the number of
        the piece of each pixel. In figures 0 is the ground; elsewhere 0 is the image that pieces
        are pasted on, whose own segments are unknown.
    """
    half = len(colours) // 2
    if not own:
        levels = torch.ones_like(levels)  # all agree: an island of all becomes a blob
    figures = with_figures(colours, levels[-1], generator)
    pasted = with_pieces(colours[half:], levels[0, half:], generator)
    if not half:
        return tuple(map(torch.cat, zip(figures, pasted, strict=True)))
    mosaic, numbers = mosaics(colours[:half], generator)
    return tuple(map(torch.cat, zip(figures, (mosaic, 1 + numbers), pasted, strict=True)))


@in_float32
def with_pieces(colours, vectors, generator):
    """Paste pieces on images, moved and mirrored.

    Args:
        colours: (B, C, H, W) from 0 to 1.
        vectors: (B, d, S, S), of unit length, the lowest level of the columns.
        generator: torch.Generator on the CPU.

    Returns:
        (images, pieces): (B, C, H, W) uint8, and (B, H, W) int64: 0 where nothing was pasted, else
        the number of the piece.
    """
    n, size, device = len(colours), colours.shape[-1], colours.device
    made = random_colours(colours, generator)
    pieces = torch.zeros(n, *colours.shape[-2:], dtype=torch.int64, device=device)
    own = torch.arange(n)
    for number in range(1, PASTED + 1):
        others = torch.randint(n, (n,), generator=generator)
        source = torch.where(torch.rand(n, generator=generator) < OF_ITSELF, own, others)
        source = send(source, device)
        cut = island_or_blob(vectors[source], size, generator, SIZES[0])
        piece = random_colours(colours[source], generator, 0.7)
        move = torch.randint(-(size // 3), size // 3 + 1, (2,), generator=generator).tolist()
        cut, piece = (x.roll(move, (-2, -1)) for x in (cut, piece))
        mirror = send(torch.rand(n, 1, 1, generator=generator) < 0.5, device)
        cut = torch.where(mirror, cut.flip(-1), cut)
        piece = torch.where(mirror[:, None], piece.flip(-1), piece)
        made = torch.where(cut[:, None], piece, made)
        pieces = pieces.masked_fill(cut, number)
    return to_bytes(random_colours(made, generator, 0.5)), pieces


@in_float32
def with_figures(colours, vectors, generator):
    """Put the figure of each image on a part of another image.

    Args:
        colours: (B, C, H, W) from 0 to 1.
        vectors: (B, d, S, S), of unit length, the top level of the columns.
        generator: torch.Generator on the CPU.

    Returns:
        (images, figures): (B, C, H, W) uint8, and (B, H, W) int64: 1 on the figure, else 0.
    """
    n, size = len(colours), colours.shape[-1]
    figures = island_or_blob(vectors, size, generator, SIZES[1], CENTRE, OWN_ISLANDS)
    order = send(torch.randperm(n, generator=generator), colours.device)
    ground = random_crops(colours[order], generator, (0.35, 0.9), 0.5)
    soft = F.avg_pool2d(F.pad(figures[:, None].float(), (1,) * 4, mode="replicate"), 3, 1)
    ground, front = random_colours(ground, generator), random_colours(colours, generator)
    made = front * soft + ground * (1 - soft)
    return to_bytes(random_colours(made, generator, 0.5)), figures.long()


def island_or_blob(vectors, size, generator, sizes, centre=1.0, share=1.0):
    """What agrees with a column drawn at random, or a random blob.

    Args:
        vectors: (B, d, S, S), of unit length.
        size: side of the images in pixels.
        generator: torch.Generator on the CPU.
        sizes: least and greatest share of the image for an island; others become blobs.
        centre: side of the part of the image, around its middle, where the column is drawn.
        share: of islands; blobs besides.

    Returns:
        (B, size, size) bool.
    """
    n, side = len(vectors), vectors.shape[-1]
    low = int((0.5 - centre / 2) * side)
    high = max(int((0.5 + centre / 2) * side), low + 1)
    place = send(torch.randint(low, high, (2, n), generator=generator), vectors.device)
    wanted = torch.rand(n, generator=generator) < share
    drawn = vectors[torch.arange(n, device=vectors.device), :, place[0], place[1]]  # (B, d)
    cosines = (vectors * drawn[:, :, None, None]).sum(1, keepdim=True)
    cosines = F.interpolate(cosines, size=(size, size), mode="bilinear", align_corners=False)
    island = cosines[:, 0] > AGREEMENT
    area = island.float().mean((1, 2))
    fair = (area > sizes[0]) & (area < sizes[1]) & send(wanted, vectors.device)
    blob = send(blobs(n, size, generator), vectors.device)
    return torch.where(fair[:, None, None], island, blob)


def blobs(n, size, generator):
    """Ellipses near the middle of the image with uneven borders: (n, size, size) bool."""
    draws = torch.rand(4, n, 1, 1, generator=generator)
    across = torch.linspace(-1, 1, size)
    x, y = (0.3 * (2 * draws[i] - 1) for i in (0, 1))
    width, height = 0.25 + 0.45 * draws[2], 0.35 + 0.6 * draws[3]
    inside = 1 - ((across - x) / width).square() - ((across[:, None] - y) / height).square()
    for strength, cell in ((0.35, 16), (0.175, 8)):
        inside = inside + strength * noise(n, 1, size, cell, generator)[:, 0]
    return inside > 0


@in_float32
def mosaics(colours, generator, sources=5):
    """Divide each image into uneven regions and fill them from crops of several images.

    Args:
        colours: (B, C, H, W) from 0 to 1.
        generator: torch.Generator on the CPU.
        sources: crops that fill an image; OF_ITSELF of them are of the image itself.

    Returns:
        (images, pieces): (B, C, H, W) uint8, and (B, H, W) int64, the number of the crop.
    """
    n, size, device = len(colours), colours.shape[-1], colours.device
    cell, count = max(size // CELLS, 2), CELLS**2 // 2
    fields = noise(n, count, size, cell, generator)
    fields += 0.35 * noise(n, count, size, max(cell // 2, 2), generator)
    fields += 0.3 * torch.randn(n, count, 1, 1, generator=generator)
    region = fields.argmax(1)
    crop_of = torch.randint(sources, (n, count), generator=generator)
    pieces = send(crop_of.gather(1, region.flatten(1)).view_as(region), device)
    own, made = torch.arange(n), None
    for number in range(sources):
        others = torch.randint(n, (n,), generator=generator)
        source = torch.where(torch.rand(n, generator=generator) < OF_ITSELF, own, others)
        crop = random_crops(colours[send(source, device)], generator, (0.25, 0.9), 0.6)
        crop = random_colours(crop, generator, 0.7)
        made = crop if made is None else torch.where((pieces == number)[:, None], crop, made)
    return to_bytes(random_colours(made, generator, 0.5)), pieces


def noise(n, channels, size, cell, generator):
    """Smooth random fields (n, channels, size, size), whose hills are about `cell` wide."""
    coarse = torch.randn(n, channels, *(max(2, size // cell + 1),) * 2, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
