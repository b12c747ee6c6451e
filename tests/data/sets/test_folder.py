import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import run_main
from PIL import Image

from agglomerator.config import Settings
from agglomerator.data import module, registry
from agglomerator.data.decode import UnreadableImage, read_image
from agglomerator.data.images import ImageFiles, ImageSet
from agglomerator.data.module import ImageDataModule
from agglomerator.data.sets import folder
from agglomerator.plan import complete_from_data
from agglomerator.util.errors import UserError

TINY = (
    "--dataset=ImageFolder",
    "--image_size=8",
    "--conv_image_size=2",
    "--patch_dim=8",
    "--contr_dim=8",
    "--batch_size=4",
    "--max_epochs=1",
    "--learning_rate=0.002",
    "--logger=none",
)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def root(tmp_path):
    """cat and dog, 10 images of each to train on and 4 to test, 8x8, all values of an image alike:
    10 * its number, 100 more for dogs."""
    for split, n in (("train", 10), ("test", 4)):
        for name, first in (("cat", 0), ("dog", 100)):
            for i in range(n):
                save(
                    tmp_path / split / name / f"{i}.png", Image.new("RGB", (8, 8), (first + i,) * 3)
                )
    return tmp_path


def settings(root, **changes):
    s = Settings(dataset="ImageFolder", data_dir=str(root), image_size=8, conv_image_size=2)
    return s.replace(**({"n_classes": 2, "num_workers": 0} | changes))


def test_order_labels_and_classes(root):
    for split, n in (("train", 10), ("test", 4)):
        found = registry.read_split(settings(root), split)
        assert isinstance(found, ImageSet) and found.classes == ["cat", "dog"]
        assert found.images.shape == (2 * n, 3, 8, 8) and found.images.dtype == torch.uint8
        expected = [*range(n), *range(100, 100 + n)]
        assert found.images.float().mean((1, 2, 3)).tolist() == expected
        assert found.labels.tolist() == [0] * n + [1] * n
    assert registry.read_split(settings(root), "val") is None


def test_gray_when_asked(root):
    assert registry.read_split(settings(root, n_channels=1), "test").images.shape == (8, 1, 8, 8)


def test_val_folder_is_the_validation_set(root):
    for name, value in (("cat", 50), ("dog", 60)):
        save(root / "val" / name / "0.png", Image.new("L", (8, 8), value))
    data = ImageDataModule(settings(root))
    data.setup()
    assert (len(data.train), len(data.val), len(data.test)) == (20, 2, 8)
    assert data.val[1][0].unique().tolist() == [60]


def test_val_folder_is_the_test_set_where_there_is_no_other(root):
    (root / "test").rename(root / "val")
    data = ImageDataModule(settings(root))
    data.setup()
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 8)


def test_files_and_memory_give_the_same(root, monkeypatch):
    kept = registry.read_split(settings(root, num_workers=1), "train")
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    files = folder.read_folder(settings(root), "train", 8)
    assert isinstance(files, ImageFiles)
    images, labels = files[torch.arange(20)]
    assert torch.equal(images, kept.images) and torch.equal(labels, kept.labels)
    assert torch.equal(files[3][0], kept.images[3])


def test_files_are_read_by_workers(root, monkeypatch):
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    data = ImageDataModule(settings(root, num_workers=2, batch_size=3))
    monkeypatch.setattr(registry, "_READ", {})
    data.setup()
    assert isinstance(data.test.dataset, ImageFiles)
    loader = data._loader(data.test)
    assert loader.persistent_workers and loader.pin_memory == torch.cuda.is_available()
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [0] * 4 + [1] * 4
    (root / "test" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage) as error:
        list(loader)
    assert str(error.value).startswith(str(root / "test" / "cat" / "2.png"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [dict(devices="2"), {}], ids=["flag", "torchrun"])
def test_processes_of_this_machine_share_its_memory(root, monkeypatch, flags):
    one = 20 * 3 * 8 * 8 + 8 * 3 * 8 * 8
    monkeypatch.setattr(folder, "memory", lambda: 1.5 * one / folder.MEMORY_SHARE)
    alone = settings(root, accelerator="cpu", num_gpus=4)
    assert isinstance(folder.read_folder(alone, "train", 8), ImageSet)
    if not flags:
        said = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
        for name, value in said.items():
            monkeypatch.setenv(name, value)
    shared = settings(root, accelerator="cpu", **flags)
    assert isinstance(folder.read_folder(shared, "train", 8), ImageFiles)


RED = (255, 0, 0)


@pytest.mark.parametrize(
    "mode, colour, options, expected",
    [
        ("RGB", RED, {}, RED),
        ("L", 7, {}, (7, 7, 7)),
        ("1", 1, {}, (255, 255, 255)),
        ("P", 0, {}, RED),
        ("P", 0, {"transparency": 0}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), {}, RED),
        ("RGBA", (255, 0, 0, 51), {}, (255, 204, 204)),
        ("LA", (0, 51), {}, (204, 204, 204)),
        ("RGB", RED, {"transparency": RED}, (255, 255, 255)),
        ("I;16", 256 * 9 + 200, {}, (156, 156, 156)),  # 12 bits
    ],
)
def test_modes(tmp_path, mode, colour, options, expected):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([*RED, 0, 0, 255])
    image.save(tmp_path / "x.png", **options)
    found = read_image(tmp_path / "x.png", 8, 3)
    assert found.shape == (3, 8, 8) and found.flatten(1).unique(dim=1).flatten().tolist() == [
        *expected
    ]


@pytest.mark.parametrize("ending", ["jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_formats(tmp_path, ending):
    image = Image.new("RGB", (40, 30), (0, 0, 255))
    image.save(tmp_path / f"x.{ending}")
    found = read_image(tmp_path / f"x.{ending}", 8, 3)
    assert (found.float().mean((1, 2)) - torch.tensor([0.0, 0, 255])).abs().max() < 3


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (40, 20), (4, 2), (9, 31)])
def test_middle_square_of_any_size(tmp_path, size):
    """Black at both ends of the longer side, white in the middle square."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : height - top, left : width - left] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", 8, 1)
    assert found.shape == (1, 8, 8)
    assert found[0, 2:6, 2:6].min() == 255 and found.min() > 127  # edges blend


def test_upright_as_exif_says(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255  # left half; turned a quarter clockwise: upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = read_image(tmp_path / "x.png", 8, 1)[0]
    assert found[:4].min() == 255 and found[4:].max() == 0


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_unreadable(tmp_path, content):
    path = tmp_path / "x.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(UnreadableImage, match="x.png") as error:
        read_image(path, 8, 3)
    assert "\n" not in str(error.value)


def test_files_that_are_no_images_are_passed_over(root):
    for name in ("train/cat/Thumbs.db", "train/notes.txt", "train/dog/.hidden.png"):
        (root / name).write_text("text")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert len(registry.read_split(settings(root), "train")) == 20


def test_images_in_deeper_folders(root):
    save(root / "train" / "cat" / "more" / "x.PNG", Image.new("L", (8, 8)))
    assert len(registry.read_split(settings(root), "train")) == 21


@pytest.mark.parametrize(
    "place", [".ipynb_checkpoints", "more/.cache", "__MACOSX/cat", "@eaDir", "$RECYCLE.BIN"]
)
def test_hidden_folders_are_passed_over(root, place):
    for where in ("cat", "dog", "."):
        if where != "." or not place.startswith("more"):
            save(root / "train" / where / place / "x.png", Image.new("L", (8, 8)))
    found = registry.read_split(settings(root), "train")
    assert len(found) == 20 and found.classes == ["cat", "dog"]


def test_a_folder_within_a_hidden_one_is_read(root):
    (root / ".hidden").mkdir()
    for name in ("train", "test"):
        (root / name).rename(root / ".hidden" / name)
    assert len(registry.read_split(settings(root / ".hidden"), "train")) == 20


@pytest.mark.parametrize(
    "link, target",
    [
        ("train/cat/all", "."),
        ("train/cat/up", ".."),
        ("train/cat/far", "../../.."),
        ("train/cat/other", "../dog"),
        ("train/all", "."),
        ("train/mouse", "cat"),
        ("pool/up", "."),
        ("pool/in/up", ".."),
        ("train/cat/twice", "../../pool/in"),
        ("pool/back", "../train"),
    ],
)
def test_links_that_lead_back_are_passed_over(root, link, target):
    """The images of cats lie elsewhere in part, in a folder with another in it."""
    for name in ("pool/x.png", "pool/in/y.png"):
        save(root / name, Image.new("L", (8, 8)))
    (root / "train" / "cat" / "elsewhere").symlink_to(root / "pool")
    (root / "train" / "bird").symlink_to(root / "pool")
    (root / link).symlink_to(target)
    found = registry.read_split(settings(root), "train")
    assert found.classes == ["bird", "cat", "dog"]
    assert found.labels.bincount().tolist() == [2, 12, 10]


def test_files_that_cannot_be_read_here_are_counted(root, capfd):
    names = (
        "train/cat/a.HEIC",
        "train/cat/b.heic",
        "train/dog/in/c.npy",
        "train/dog/d",
        "test/x.png",
    )
    for name in (*names, "train/cat/.e.heic", "train/dog/Thumbs.db"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    for _ in range(2):
        for split in ("train", "test"):
            registry.read_split(settings(root, val_share=0.1), split)
    train, test = capfd.readouterr().out.splitlines()
    assert train.startswith(f"{root / 'train'}: left out") and "convert" in train
    assert "2 .heic, 1 .npy, 1 without an ending;" in train
    assert test == f"{root / 'test'}: left out images that lie in no folder of a class: 1."


def test_own_images_that_cannot_be_read_here_are_counted(tmp_path, capfd):
    own = settings(tmp_path, mode="islands", images=str(tmp_path))
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(UserError, match="no image in it, since .*: 1 .heic; convert"):
        folder.files_of_images(own, 8)
    save(tmp_path / "b.png", Image.new("L", (8, 8)))
    assert folder.files_of_images(own, 8).paths.tolist() == [bytes(tmp_path / "b.png")]
    assert "1 .heic; convert" in capfd.readouterr().out


def break_image(root):
    (root / "train" / "cat" / "3.png").write_bytes(b"no image")


def empty_class(root):
    (root / "train" / "bird").mkdir()


def class_of_no_images(root):
    empty_class(root)
    (root / "train" / "bird" / "0.heic").write_bytes(b"")


def broken_link(root):
    (root / "train" / "bird").symlink_to(root / "nowhere")


def one_class(root):
    (root / "train" / "dog").rename(root / "elsewhere")


def no_class(root):
    one_class(root)
    (root / "train" / "cat").rename(root / "nowhere")


def unknown_class(root):
    save(root / "test" / "bird" / "0.png", Image.new("L", (8, 8)))


def loose_test(root):
    for path in list((root / "test").rglob("*.png")):
        path.rename(root / "test" / f"{path.parent.name}{path.name}")
    for path in (root / "test" / "cat", root / "test" / "dog"):
        path.rmdir()


def no_train(root):
    (root / "train").rename(root / "training")


def no_test(root):
    (root / "test").rename(root / "testing")


FAULTS = [
    (break_image, "train/cat/3.png: cannot be read"),
    (empty_class, "train/bird: an empty class"),
    (class_of_no_images, "train/bird: an empty class: no image in it, since"),
    (class_of_no_images, "1 .heic; convert"),
    (broken_link, "train/bird: a link that leads nowhere"),
    (one_class, "one class only, cat"),
    (no_class, "no folders of classes"),
    (unknown_class, "test/bird: no such class"),
    (no_train, "has no train/ folder"),
    (no_test, "has no test/ folder"),
    (loose_test, "/test: holds no folder of a class"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
def test_faults(root, fault, words):
    fault(root)
    with pytest.raises(UserError) as error:
        data = ImageDataModule(settings(root))
        data.setup()
        data.check_batch_size(1)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(root) in str(error.value)


def test_a_test_does_not_wait_for_the_training_images(root):
    break_image(root)
    data = ImageDataModule(settings(root))
    data.setup()
    assert len(data.test) == 8
    with pytest.raises(UserError, match="cat/3.png"):
        len(data.train)


def test_skip_unreadable(root, capfd):
    break_image(root)
    found = registry.read_split(settings(root, skip_unreadable=True), "train")
    assert len(found) == 19 and len(found.labels) == 19 and found.labels.sum() == 10
    said = capfd.readouterr().out
    assert "1 of 20 images cannot be read" in said and "cat/3.png" in said


def test_a_file_that_cannot_be_read_changes_nothing_for_the_others(root):
    def held_out():
        registry._READ.clear()
        s = settings(root, skip_unreadable=True)
        return {
            path
            for each in module.split(registry.read_split(s, "train"), 0.5, seed=1)[1:]
            for path in each.dataset.paths[each.indices]
        }

    before = held_out()
    assert len(before) == 10
    break_image(root)
    assert held_out() == before - {os.fsencode(root / "train" / "cat" / "3.png")}


def test_n_classes_follows(root):
    save(root / "train" / "owl" / "0.png", Image.new("L", (8, 8)))
    s = settings(root, n_classes=10)
    assert complete_from_data(s, given=set()).n_classes == 3
    with pytest.raises(UserError, match="--n_classes=10.*3 classes"):
        complete_from_data(s, given={"n_classes"})


def test_command_line(root, tmp_path):
    flags = *TINY, f"--data_dir={root}", f"--output_dir={tmp_path / 'out'}", "--exp_name=mine"
    run_main(*flags, "--mode=all", "--supervised_epochs=1")
    table = (tmp_path / "out" / "mine" / "confusion_supervised.csv").read_text()
    assert table.splitlines()[0].endswith("cat,dog")


@pytest.mark.parametrize(
    "fault, words, flags",
    [
        (break_image, "train/cat/3.png", []),
        (None, "--n_classes=3", ["--n_classes=3"]),
    ],
)
def test_command_line_faults(root, tmp_path, fault, words, flags):
    if fault:
        fault(root)
    flags = *TINY, f"--data_dir={root}", f"--output_dir={tmp_path / 'out'}", *flags
    said = run_main(*flags, ok=False).stderr
    assert words in said and said.startswith("error: ") and said.count("\n") == 1


class Records(pl.LightningModule):
    """Learns nothing; notes the first pixel of every image of a batch, and saves itself once."""

    def __init__(self, checkpoint, save_at=None):
        super().__init__()
        self.checkpoint, self.save_at, self.seen = checkpoint, save_at, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(images[:, 0, 0, 0].tolist())
        return self.weight.sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.save_at:
            self.trainer.save_checkpoint(self.checkpoint)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_next_batch_and_reads_no_other(
    root, monkeypatch, num_workers
):
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    read = []  # of this process
    read_one = ImageFiles._read
    monkeypatch.setattr(ImageFiles, "_read", lambda self, i: read.append(i) or read_one(self, i))

    def fit(records, ckpt_path=None):
        monkeypatch.setattr(registry, "_READ", {})
        data, module = (
            ImageDataModule(settings(root, num_workers=num_workers, batch_size=3)),
            Records(*records),
        )
        trainer = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        read.clear()
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module.seen

    checkpoint = root / "middle.ckpt"
    whole = fit((checkpoint, (1, 2)))  # 16 images to train on: 5 batches an epoch
    assert len(whole) == 15
    assert sorted(sum(whole[:5], [])) != sum(whole[:5], []) != sum(whole[5:10], [])
    assert fit((checkpoint,), checkpoint) == whole[8:]
    if num_workers == 0:
        assert len(read) == 3 * len(whole[8:])
