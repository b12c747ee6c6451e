"""The folder of a run, and the names of all files in it."""

from pathlib import Path

SPLITS = "train", "val", "test"
PREFIXES = {"contrastive": "", "supervised": "supervised_", "finetuned": "finetuned_"}


class RunFolder:
    """The folder of a run and the files of one of its stages.

    Args:
        settings: of the run; they name the folder and the stage.

    Attributes:
        path: of the folder.
        stage: "contrastive", "supervised" or "finetuned".
        best, last: checkpoints: the best in validation, and that of the last epoch.
        flags: all settings of the training, a flagfile.
        record: what ran, by what and where, JSON.
        logs, metrics: folder of the loggers of a training, and its metrics as CSV.
        islands: folder of pictures.
        frozen_record, test_record: figures of freeze and of a test, JSON.
        confusion: confusion matrix of a test, without the ending of the name.
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
        self.frozen_record = self.path / "embedding.json"
        self.test_record = self.path / f"test_{self.stage}.json"
        self.confusion = self.path / f"confusion_{self.stage}"

    def features(self, split):
        """Paths of the embeddings, of the labels, and of what tells the images of a split."""
        names = f"features_{split}.npy", f"labels_{split}.npy", f"images_{split}.csv"
        return [self.path / name for name in names]

    def figure(self, name, kind):
        """Path of a picture of the embedding: "embedding" or "dendrogram", png or pdf."""
        return self.path / f"{name}.{kind}"

    def test_pictures(self):
        """Paths of the pictures of islands that a test draws."""
        ends = "", "_iterations"
        return [self.islands / f"{self.stage}_test{end}.png" for end in ends]

    def of_training(self):
        """All that a training leaves."""
        return [self.best, self.last, self.logs, self.flags, self.record]

    def of_test(self):
        """All that a test leaves, its record first."""
        confusion = [self.confusion.with_suffix(end) for end in (".csv", ".png")]
        return [self.test_record, *confusion, *self.test_pictures()]

    def of_freeze(self):
        """All that freeze leaves, its record first."""
        arrays = [path for split in SPLITS for path in self.features(split)]
        names = "embedding", "dendrogram"
        figures = [self.figure(name, kind) for name in names for kind in ("png", "pdf")]
        return [self.frozen_record, *arrays, *figures]
