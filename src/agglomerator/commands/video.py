"""`--mode=islands --video`: islands of clips, followed from frame to frame."""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from agglomerator.data import registry
from agglomerator.data.clips import FASTEST, read_frames, write_mp4
from agglomerator.data.limits import n_batches
from agglomerator.data.sets.moving import draw_clip
from agglomerator.data.sets.partwhole import PartWhole
from agglomerator.data.transforms import center_crop, normalize, to_channels
from agglomerator.islands.figures import animate, rule_of_islands
from agglomerator.islands.tracks import lives
from agglomerator.islands.video import best_possible, draw_frames, rows_of, score, watch
from agglomerator.runs.record import make_room
from agglomerator.training.trainer import build_trainer
from agglomerator.util.errors import UserError
from agglomerator.util.files import write_json
from agglomerator.util.terminal import aligned, say

CLIPS, FRAMES = 64, 16  # moving scenes that are scored, and frames of each
DRAWN, RATE = 4, 5.0  # how many of them are drawn, and frames a second
COLUMNS = {  # key of a row -> title and format
    "number": ("islands", ".1f"),
    "frames_of_columns": ("frames", ".1f"),
    "kept": ("kept", ".1%"),
    "path_of_columns": ("path", ".1f"),
    "parts_ari_of_frames": ("parts ARI, frame", ".3f"),
    "parts_ari": ("clip", ".3f"),
    "objects_ari_of_frames": ("objects ARI, frame", ".3f"),
    "objects_ari": ("clip", ".3f"),
}


def draw_video(plan, model):
    """Follow the islands of --images, or of moving scenes; writes an animation and the figures.

    Args:
        plan: of the run.
        model: its network; it stays on the device of the run.

    Raises:
        UserError: there are no clips.
    """
    settings, target = plan.settings, plan.folder.video
    paths = {kind: target.with_suffix(f".{kind}") for kind in ("json", "gif", "mp4")}
    device = build_trainer(settings, False, logs=False).strategy.root_device
    model = model.eval().to(device)
    found = _scenes(settings) if settings.images is None else _own(settings)
    images, shown, names, rate, masks = found  # (B, F, ...)
    normalization = registry.normalization_of(settings)
    rows, followed = [], {}
    for of, carry in (("carried on", True), ("each frame anew", False)):
        views = (normalize(frame.to(device), *normalization) for frame in images.unbind(1))
        followed[of], labels = watch(model, views, carry, **settings.found_by)
        of_levels = rows_of(followed[of], of)
        scores = score(followed[of], labels, masks) if masks else [{}] * len(of_levels)
        rows += [row | fit for row, fit in zip(of_levels, scores, strict=True)]
    if masks:
        rows.append(best_possible(masks, settings.grid_size))
    made = make_room(list(paths.values()), plan.folder.path, settings, plan.start)
    carried = followed["carried on"]
    record = {
        "checkpoint": plan.start.name,
        "clips": len(images),
        "frames": images.shape[1],
        "iters": settings.n_iters,
        **settings.found_by,
        "rows": rows,
    }
    if not masks:
        record["islands"] = _islands_of(carried[0])
    write_json(paths["json"], record | made)
    say("\n".join(_lines(record)))
    title = f"Islands from frame to frame, {settings.exp_name}"
    drawn = slice(DRAWN)
    masks = {kind: mask[drawn] for kind, mask in masks.items()}
    figures = draw_frames(shown[drawn], names, carried[drawn], title, _note(settings), masks)
    _animate(figures, paths, rate)
    say("Written: " + ", ".join(map(str, paths.values())))


def _own(settings):
    """The clip of --images: images and what is shown (1, F, C, H, W) uint8, its name,
    frames a second, and no masks."""
    s, margin = settings, registry.entry_of(settings).margin
    frames = read_frames(s.images, registry.side_of(s), s.n_channels)
    images = center_crop(frames.images, s.image_size)
    shown = center_crop(frames.shown, round(frames.shown.shape[-1] / margin))
    return images[None], shown[None], [Path(s.images).name], frames.rate, {}


def _scenes(settings):
    """Moving scenes of the test set, like `_own`, with the masks of parts and objects,
    (B, F, S, S).

    Raises:
        UserError: the data set has none.
    """
    s = settings
    if s.dataset != "PartWhole":
        raise UserError(
            f"--video: {s.dataset} has no clips; name one by --images, a GIF, an MP4 or "
            "a folder of frames, or use --dataset=PartWhole."
        )
    n = min(CLIPS, n_batches(s, "test", math.ceil(CLIPS / s.batch_size)) * s.batch_size)
    size = s.image_size, s.difficulty, s.objects
    try:
        clips = [draw_clip(0, PartWhole.TEST_START + i, FRAMES, *size) for i in range(n)]
    except ValueError as error:
        raise UserError(f"--dataset=PartWhole: {error}.") from None
    images, parts, objects = (
        torch.from_numpy(np.stack([getattr(clip, kind) for clip in clips]))
        for kind in ("images", "parts", "objects")
    )
    images = to_channels(images.flatten(0, 1), s.n_channels).unflatten(0, images.shape[:2])
    names = [PartWhole.classes[clip.label] for clip in clips[:DRAWN]]
    return images, images, names, RATE, {"parts": parts, "objects": objects}


def _islands_of(names):
    """The islands of a clip that are ever larger than a column, (K, F, S, S)."""
    return [
        {"level": level} | island
        for level, picture in enumerate(names)
        for island in lives(picture)
        if island["size"] > 1
    ]


def _lines(record):
    """The figures for the terminal."""
    rows = record["rows"]
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    table = [["", *(title for title, _ in columns.values())]]
    for row in rows:
        cells = [format(row[k], form) if k in row else "-" for k, (_, form) in columns.items()]
        table.append([row["of"], *cells])
    clips, several = record["clips"], record["clips"] > 1
    lines = [
        f"{f'{clips} clips' if several else 'a clip'} of {record['frames']} "
        f"frames, {record['iters']} iterations each",
        "frames: lifetime of the island of a column; kept: columns whose island was there in the "
        "frame before; path: distance that its centre travels, in columns",
    ]
    if several:
        lines.append("ARI: of each frame for itself, and of the whole clip, over space and time")
    return lines + aligned(table)


def _note(settings):
    s = settings
    islands = rule_of_islands(s.island_threshold, s.island_loss)
    return (
        f"The state is carried on, {s.n_iters} iterations a frame. Islands: {islands}; single: of "
        "one column. An island keeps its colour as long as it overlaps itself in the frame before; "
        "colours mean nothing else."
    )


def _animate(figures, paths, rate):
    """Write figures as a GIF and an MP4, at `rate` a second."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = [
            figure.write(Path(folder) / f"{number:06d}", ("png",), figure.get_dpi())[0]
            for number, figure in enumerate(figures)
        ]
        pause = 1 / min(rate, FASTEST)
        animate(pictures, paths["gif"], seconds=len(pictures) * pause, longest=pause)
        write_mp4(pictures, paths["mp4"], rate)
