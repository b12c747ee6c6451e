"""The folder of a run, and the names of its main files."""

import hashlib
from functools import cached_property
from pathlib import Path

from agglomerator.config.pictures import FIGURE_FORMATS

SPLITS = "train", "val", "test"
PREFIXES = {"contrastive": "", "masked": "masked_",
            "supervised": "supervised_", "finetuned": "finetuned_"}  # fmt: skip


class RunFolder:
    """The folder of a run and the files of one of its stages.

    Args:
        settings: of the run; they name the folder and the stage.

    Attributes:
        path: of the folder.
        stage: "contrastive", "masked", "supervised" or "finetuned".
        best, last: checkpoints: the best in validation, and the newest.
        flags: all settings of the training, a flagfile.
        record: what ran, by what and where, JSON.
        logs, metrics: folder of the loggers of a training, and its metrics as CSV.
        islands: folder of pictures.
        video: islands of a clip, animations and JSON, without the ending of the name.
        frozen_record, test_record: figures of freeze and of a test, JSON.
        confusion: confusion matrix of a test, without the ending of the name.
        predictions: the class and probability of each tested image, CSV.
        figure_kinds: endings of the files of a picture.
        figure_dpi: of pictures as PNG.
    """

    def __init__(self, settings):
        self.path, self.stage = Path(settings.output_dir) / settings.exp_name, settings.stage
        prefix = PREFIXES[self.stage]
        self.best = self.path / "checkpoints" / f"{prefix}best.ckpt"
        self.last = self.path / "checkpoints" / f"{prefix}last.ckpt"
        self.flags, self.record = self.path / f"{prefix}flags.cfg", self.path / f"{prefix}run.json"
        self.logs = self.path / "logs" / self.stage
        self.metrics = self.logs / "metrics.csv"
        self.islands = self.path / "islands"
        self.video = self.islands / "video"
        self.frozen_record = self.path / "embedding.json"
        self.test_record = self.path / f"test_{self.stage}.json"
        self.confusion = self.path / f"confusion_{self.stage}"
        self.predictions = self.path / f"predictions_{self.stage}.csv"
        self.figure_kinds, self.figure_dpi = settings.figure_kinds, settings.figure_dpi
        trains = settings.mode in ("train", "all")
        self._looked_at = None if trains else settings.load_checkpoint_dir

    @cached_property
    def projection(self):
        """Name of the file in `islands` that holds the colours of the pictures. A network that was
        not trained in this folder has a file of its own."""
        start = self._looked_at
        if start is None or Path(start).parent.resolve() == self.best.parent.resolve():
            return "projection.npz"
        if Path(start).is_file():
            with open(start, "rb") as file:
                told = hashlib.file_digest(file, "sha256")
        else:
            told = hashlib.sha256(start.encode())
        return f"projection_{told.hexdigest()[:8]}.npz"

    def features(self, split):
        """Paths of the embeddings, of the labels, and of what tells the images of a split."""
        names = f"features_{split}.npy", f"labels_{split}.npy", f"images_{split}.csv"
        return [self.path / name for name in names]

    def test_pictures(self, kinds=None):
        """Paths of the pictures of islands that a test draws, of `figure_kinds` or others."""
        names = [f"{self.stage}_test", f"{self.stage}_test_iterations"]
        names += [f"{self.stage}_test_reconstructions"] * (self.stage == "masked")
        kinds = self.figure_kinds if kinds is None else kinds
        return [self.islands / f"{name}.{kind}" for name in names for kind in kinds]

    def of_training(self):
        """All that a training leaves."""
        return [self.best, self.last, self.logs, self.flags, self.record]

    def of_test(self):
        """All that a test leaves, its record first."""
        confusion = [self.confusion.with_suffix(f".{end}") for end in ("csv", *FIGURE_FORMATS)]
        tables = self.test_record, self.predictions, *confusion
        return [*tables, *self.test_pictures(FIGURE_FORMATS)]

    def of_freeze(self):
        """All that freeze leaves, its record first."""
        arrays = [path for split in SPLITS for path in self.features(split)]
        names = "embedding", "dendrogram"
        figures = [self.path / f"{name}.{kind}" for name in names for kind in FIGURE_FORMATS]
        return [self.frozen_record, *arrays, *figures]
