"""The live view of islands: picture files, an animation, the logger, a window or a page."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback

from agglomerator.islands import window
from agglomerator.islands.album import DPI, Album
from agglomerator.islands.figures import animate
from agglomerator.islands.inspection import states_of
from agglomerator.islands.projection import load_arrays
from agglomerator.islands.reconstructions import draw_reconstructions
from agglomerator.util.files import written_whole
from agglomerator.util.terminal import say

SAMPLES = 6  # images in a picture
SECONDS = 20  # least time between two pictures
SHARE = 0.02  # greatest share of the time that pictures take
FIRST = 2  # seconds until the second picture; the wait doubles with every further early picture
EARLY = 3  # seconds that early pictures may take together, beyond SHARE
MOST_FRAMES = 60
ANSWER = 30  # seconds that a window has to answer


class IslandsView(Callback):
    """Draws the islands of the same sample images during training, validation and test.

    It draws one picture before training and one after it. In between it draws a few early ones, and
    then as many as fit into `SHARE` of the time. It writes each picture to the folder, makes an
    animation of them, and shows them in a window or on a page if there is one. The window never
    holds up the run.

    The colours should fit the trained network. If the folder has no projection yet, pictures get
    provisional colours, and all are drawn again at the end of training.

    Args:
        folder: for the pictures and the projection. Later runs into this folder use both.
        stage: name of the stage, for file names.
        threshold, loss: as for `segment`.
        kinds, dpi: of the pictures of a test. Live ones are PNG of `DPI`.
        album: other arguments of the `Album`.
    """

    def __init__(self, folder, stage, threshold, kinds=("png",), dpi=DPI, **album):
        self.album, self.stage = Album(folder, threshold, **album), stage
        self.of_test = kinds, dpi
        self.frames = folder / "frames" / stage
        self.samples = None
        self.provisional = False
        self.on = True

    def setup(self, trainer, module, stage):
        self.on = trainer.is_global_zero

    def on_train_start(self, trainer, module):
        self.spent = 0.0
        self._try(self._drop_frames, trainer.global_step)
        self._show(trainer, module)
        self.began, self.spent = self.drawn_at, 0.0

    def on_train_batch_end(self, trainer, module, *batch):
        if self._due():
            self._show(trainer, module)

    def on_validation_end(self, trainer, module):
        if self._due():
            self._show(trainer, module, log=True)

    def on_train_end(self, trainer, module):
        self._try(self._recolour, module)
        self._show(trainer, module, log=True)
        self._try(self._animate)

    def on_exception(self, trainer, module, exception):
        self._try(self._animate)

    def on_test_end(self, trainer, module):
        self._show(trainer, module, test=True, log=True)

    def _due(self):
        """Whether to draw now: early pictures at growing intervals, then what SHARE allows."""
        now = time.perf_counter()
        waited, cost = now - self.drawn_at, self.spent + self.last
        # Provisional pictures are drawn twice.
        allowed = SHARE * (now - self.began) / (2 if self.provisional else 1)
        early = waited >= max(FIRST, self.drawn_at - self.began) and cost <= EARLY
        return early or (waited >= SECONDS and cost <= allowed)

    def _show(self, trainer, module, test=False, log=False):
        began = time.perf_counter()
        self._try(self._draw, trainer, module, test, log)
        self.drawn_at = time.perf_counter()
        if not test:
            self.last = self.drawn_at - began
            self.spent += self.last

    def _try(self, function, *arguments):
        """Call a function if this process draws. A full disk ends the pictures, not the run."""
        try:
            if self.on:
                function(*arguments)
        except OSError as error:
            say(f"--plot_islands: {error.filename}: {error.strerror}; no more pictures.")
            self.on = False

    def _draw(self, trainer, module, test, log):
        images, names, states = self._look(module, test)
        if test:
            name, when = f"{self.stage}_test", "test images"
        else:
            name, step = self.stage, trainer.global_step
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs)
            when = f"{self.stage} training, epoch {epoch}, step {step}"
            when = when if step else "before training"
            if self.album.projection is None and not self.album.open(states):
                self.provisional = True
                self.album.fit(states[-1], keep=False)
        title = f"Islands of agreement, {module.settings.exp_name}\n{when}"
        note = "\nprovisional colours" if self.provisional else ""
        islands = self.album.islands(images, names, states)
        figure = islands.draw_levels(title=title + note)
        kept = self.of_test if test else ()
        paths = {"islands": self.album.write(name, figure, *kept)[0]}
        if not test:
            self._keep_frame(paths["islands"], trainer.global_step, states[-1], title)
        WINDOW.show(paths["islands"])
        if log:
            figure = islands.draw_iterations(title=title + note)
            paths["iterations"] = self.album.write(f"{name}_iterations", figure, *kept)[0]
            if module.stage == "masked":
                shown = f"Masked pre-training, {module.settings.exp_name}\n{when}"
                figure = self._reconstructions(module, names, shown)
                path = self.album.write(f"{name}_reconstructions", figure, *kept)[0]
                paths["reconstructions"] = path
            for logger in trainer.loggers:
                log_pictures(logger, paths, trainer.global_step)

    def _look(self, module, test=False):
        """The sample images (B, C, H, W), their names, and their states (T + 1, B, n, K, d)."""
        data = module.data
        if self.samples is None:
            subsets = [data.test] if test else [data.val, data.test, data.train]
            subset = next(subset for subset in subsets if len(subset))
            self.samples = samples(subset, len(data.classes))
        images, labels = self.samples
        states = states_of(module.model, data.view(images.to(module.device)))
        return data.crop(images), [data.classes[label] for label in labels], states

    def _reconstructions(self, module, names, title):
        """The figure of what the network predicts of the hidden patches of the sample images."""
        data, images = module.data, self.samples[0].to(module.device)
        training = module.training
        module.eval()
        with torch.no_grad():
            hidden, pixels, errors = module.reconstruction.show(data.view(images))
            pixels = (data.colours(pixels).clamp(0, 1) * 255).round().byte()
        module.train(training)
        arrays = (x.cpu() for x in (data.crop(images), hidden, pixels, errors))
        return draw_reconstructions(*arrays, names, title)

    def _recolour(self, module):
        """Fit the projection to the trained network, and draw all frames again in its colours."""
        if not self.provisional:
            return
        images, names, states = self._look(module)
        self.provisional = False
        self.album.fit(states[-1])
        for frame in self._frames():
            arrays = load_arrays(frame.with_suffix(".npz"), ("states", "title"))
            if arrays is not None:
                states = torch.from_numpy(arrays["states"]).float()[None]
                islands = self.album.islands(images, names, states)
                figure = islands.draw_levels(title=str(arrays["title"]))
                self.album.write(frame.relative_to(self.album.folder).with_suffix(""), figure)
                frame.with_suffix(".npz").unlink()

    def _frames(self):
        return sorted(self.frames.glob("[0-9]" * 10 + ".png"))

    def _drop_frames(self, step):
        """Delete the frames after a step: another training made them."""
        for frame in self._frames():
            if int(frame.stem) > step:
                self._drop_frame(frame)

    def _drop_frame(self, frame):
        frame.unlink()
        frame.with_suffix(".npz").unlink(missing_ok=True)

    def _keep_frame(self, picture, step, states, title):
        """Keep a picture as a frame of the animation. At most `MOST_FRAMES` are kept, evenly spaced
        over the training. In provisional colours, a frame is kept with its states, from which it
        can be drawn again."""
        self.frames.mkdir(parents=True, exist_ok=True)
        frame = self.frames / f"{step:010d}.png"
        shutil.copyfile(picture, frame)
        if self.provisional:
            with written_whole(frame.with_suffix(".npz"), "wb") as file:
                np.savez(file, states=states.half().numpy(), title=title)
        frames = self._frames()
        if len(frames) > MOST_FRAMES:
            steps = [int(frame.stem) for frame in frames]
            gaps = [after - before for before, after in zip(steps[:-2], steps[2:], strict=True)]
            self._drop_frame(frames[1 + gaps.index(min(gaps))])

    def _animate(self):
        frames = self._frames()
        if len(frames) > 1:
            animate(frames, self.album.folder / f"{self.stage}.gif")


def samples(subset, n_classes):
    """The images of `sample_rows`: (B, C, H, W) uint8, and their labels (B,)."""
    return subset.dataset[sample_rows(subset, n_classes)]


def sample_rows(subset, n_classes):
    """The first image of each of the first classes that have images, at most SAMPLES; of a single
    class the first so many.

    Returns:
        (B,), indices of the subset's data set.
    """
    dataset, indices = subset.dataset, torch.as_tensor(list(subset.indices))
    if n_classes == 1:
        return indices[:SAMPLES]
    of_class = ((dataset.labels[indices] == c).nonzero() for c in range(n_classes))
    first = islice((places[0] for places in of_class if len(places)), SAMPLES)
    return indices[torch.cat(list(first))]


def log_pictures(logger, paths, step):
    """Log pictures, a dictionary of names and paths of PNG files, if the logger takes pictures."""
    kind = type(logger).__name__
    for name, path in paths.items():
        if kind == "WandbLogger":
            logger.log_image(name, [str(path)], step=step)
        elif kind == "TensorBoardLogger":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")


class Window:
    """The window or page of a run, for all of its stages.

    It is a process of its own; matplotlib's backend decides whether it is a window or a page. With
    `wanted` it opens with the first picture. The user may close it at any time.
    """

    def __init__(self):
        self.wanted, self.process = False, None

    def show(self, path):
        """Show a picture file."""
        if self.wanted and self.process is None:
            self._open(path)
        else:
            self._tell(show=str(path.absolute()))

    def stay(self):
        """Leave the window to the user at the end of the run. If there is a page, and the run is in
        the foreground of a terminal, wait for Ctrl-C."""
        if self.process is not None:
            waits = is_in_foreground()
            with suppress(KeyboardInterrupt):
                self._tell(stay=waits)
                self.relay.join(None if waits else ANSWER)
            self.process.stdin.close()
            self.process = None

    def _open(self, path):
        program = Path(window.__file__)
        session = {"start_new_session": True} if os.name == "posix" else {}  # out of Ctrl-C's reach
        self.process = subprocess.Popen(
            [sys.executable, program, path.absolute()],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **session,
        )
        self.relay = Thread(target=self._relay, daemon=True)
        self.relay.start()

    def _relay(self):
        for line in self.process.stdout:
            say(line.decode(errors="replace").rstrip())

    def _tell(self, **message):
        if self.process is not None:
            with suppress(OSError):  # the user has closed the window
                self.process.stdin.write(json.dumps(message).encode() + b"\n")


WINDOW = Window()


def is_in_foreground():
    """Whether the run is in the foreground of a terminal, so that Ctrl-C ends it."""
    streams = sys.stdin, sys.stdout
    if not all(stream is not None and stream.isatty() for stream in streams):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except AttributeError:  # Windows
        return True
    except OSError:  # the terminal of another session
        return False
