"""`--mode=islands`: pictures of the islands of a trained network."""

from itertools import chain

from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.build import build_network
from agglomerator.commands.evaluate import score_masked
from agglomerator.commands.pages import images_of, pages_of
from agglomerator.commands.report import tell_blindness
from agglomerator.commands.video import draw_video
from agglomerator.config.pictures import FIGURE_FORMATS
from agglomerator.data.masks import of_folder
from agglomerator.islands.album import Album
from agglomerator.islands.figures import evenly_spaced
from agglomerator.islands.inspection import joined
from agglomerator.plan import resolve
from agglomerator.runs.record import clear, lock_run_folder, make_room
from agglomerator.util.files import write_json
from agglomerator.util.terminal import say

GRID = 8  # most pages in a grid


@rank_zero_only
def islands(settings, given):
    """Draw the islands of a checkpoint's network, of test images or of the user's own; score them
    where masks lie beside a folder's images."""
    plan = resolve(settings, given, "islands")
    model = build_network(plan)
    lock_run_folder(plan.folder.path, "islands")
    if plan.settings.video:
        draw_video(plan, model)
    else:
        tell_blindness(plan.settings)
        truth = of_folder(plan.settings)
        draw_islands(plan, model)
        if truth is not None:
            score_masked(plan, model, truth)


def draw_islands(plan, model):
    """Draw what a network sees in the images of a run.

    Args:
        plan: of the run.
        model: its network.
    """
    settings, folder = plan.settings, plan.folder.islands
    images = images_of(plan)
    record = folder / f"{images.name}.json"
    earlier = [path for end in FIGURE_FORMATS for path in folder.glob(f"{images.name}*.{end}")]
    pages = pages_of(images)
    first = next(pages)  # if none can be read, all stays as it is
    made = make_room([record, *earlier], plan.folder.path, settings, plan.start)
    pictures = Pictures(plan, images)
    for page in chain([first], pages):
        pictures.add(page, page.states(model, settings))
    pictures.end()
    clear(set(earlier) - pictures.written, plan.folder.path, images.name)
    write_json(record, {"checkpoint": plan.start.name} | made)


class Pictures:
    """Writes the pictures of each page, and for each level a grid of the images of GRID pages.

    Args:
        plan: of the run.
        images: of which the pages are.

    Attributes:
        written: paths of all pictures, a set.
    """

    def __init__(self, plan, images):
        self.settings, self.name = plan.settings, images.name
        found_by, projection = self.settings.found_by, plan.folder.projection
        self.album = Album(plan.folder.islands, **found_by, projection=projection)
        self.title = f"Islands of agreement, {self.settings.exp_name}\n{images.subject}"
        self.pages, self.waiting, self.written = 0, [], set()

    def add(self, page, states):
        """Write the pictures of the next page, whose states are (T + 1, B, n, K, d)."""
        self.pages += 1
        seen = self.album.islands(page.shown, page.names, states, page.masks)
        end = f"_{self.pages}" if self.pages > 1 else ""
        figures = {
            end: seen.draw_levels(title=self.title),
            f"{end}_iterations": seen.draw_iterations(title=self.title),
        }
        self._write(figures)
        self.waiting.append(seen)
        if len(self.waiting) == GRID:
            self.end()

    def end(self):
        """Write the grids of the pages that are not in one yet."""
        if not self.waiting:
            return
        seen, self.waiting = joined(self.waiting), []
        end = f"_{-(-self.pages // GRID)}" if self.pages > GRID else ""
        levels = evenly_spaced(seen.states.shape[3])
        self._write({f"_level{k}{end}": seen.draw_grid(k, title=self.title) for k in levels})

    def _write(self, figures):
        """Write figures by the ends of their names, and say so."""
        kinds, dpi = self.settings.figure_kinds, self.settings.figure_dpi
        paths = [
            path
            for end, figure in figures.items()
            for path in self.album.write(self.name + end, figure, kinds, dpi)
        ]
        say("Written: " + ", ".join(map(str, paths)))
        self.written.update(paths)
