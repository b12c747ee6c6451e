"""`--mode=islands`: pictures of the islands of a trained network."""

import torch
from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.build import build_data, build_network
from agglomerator.commands.evaluate import score_folder
from agglomerator.commands.report import tell_blindness
from agglomerator.data import registry
from agglomerator.data.sets.folder import pages_of_files
from agglomerator.data.transforms import normalize
from agglomerator.islands.figures import IslandFigures
from agglomerator.islands.live_view import samples
from agglomerator.plan import resolve
from agglomerator.runs.record import lock_run_folder, make_room
from agglomerator.util.files import write_json
from agglomerator.util.terminal import say


@rank_zero_only
def islands(settings, given):
    """Draw the islands of a checkpoint's network, of test images or of the user's own; score them
    where masks lie beside a folder's images."""
    plan = resolve(settings, given, "islands")
    settings, model = plan.settings, build_network(plan)
    lock_run_folder(plan.folder.path, "islands")
    tell_blindness(settings)
    drawn = IslandFigures(plan.folder.islands, settings.island_threshold)
    if settings.images is None:
        data = build_data(plan)
        images, labels = samples(data.test, len(data.classes))
        of_test = data.crop(images), [data.classes[label] for label in labels]
        pages, kind, subject = [of_test], "test", f"{settings.dataset}, test images"
    else:
        pages, kind, subject = pages_of_files(settings), "images", "own images"
    record = plan.folder.islands / f"{kind}.json"
    pictures = sorted(plan.folder.islands.glob(f"{kind}*.png"))
    for number, (images, names) in enumerate(pages, 1):
        if number == 1:  # there is one
            made = make_room([record, *pictures], plan.folder.path, settings, plan.start)
        name = kind if number == 1 else f"{kind}_{number}"
        title = f"Islands of agreement, {settings.exp_name}\n{subject}"
        with torch.no_grad():
            states = model.states(normalize(images, *registry.normalization_of(settings))).float()
        levels, iterations = drawn.figures(images, names, states, title)
        paths = drawn.write(name, levels), drawn.write(f"{name}_iterations", iterations)
        say("Written: " + ", ".join(map(str, paths)))
    write_json(record, {"checkpoint": plan.start.name} | made)
    score_folder(plan, model)
