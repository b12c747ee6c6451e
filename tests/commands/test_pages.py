import numpy as np
import pytest
from conftest import SMALL, run_main
from PIL import Image

from agglomerator.commands.pages import OwnImages, TestImages, numbers_in, pages_of
from agglomerator.config import Settings
from agglomerator.data import registry
from agglomerator.data.masks import NOWHERE, masked_folder
from agglomerator.data.preprocessing import Preprocessing
from agglomerator.data.transforms import normalize
from agglomerator.plan import Plan
from agglomerator.util.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def root(tmp_path):
    """A folder of 2 images to train on and 12 to test; those of the second class have masks."""
    for split, n in (("train", 1), ("test", 6)):
        for name in ("other", "things"):
            for i in range(n):
                pixels = np.full((20, 24), 20 * i + 30, np.uint8)
                paths = [tmp_path / kind / split / name for kind in ("", "parts", "objects")]
                for path in paths if name == "things" and split == "test" else paths[:1]:
                    path.mkdir(parents=True, exist_ok=True)
                    values = pixels if path == paths[0] else np.tri(20, 24, dtype=np.uint8) + 1
                    Image.fromarray(values).save(path / f"{i}.png")
    return tmp_path


def settings(root, **changes):
    flags = dict(dataset="ImageFolder", data_dir=str(root), image_size=16, conv_image_size=4,
                 n_channels=1, n_classes=2, num_workers=0, mode="islands")  # fmt: skip
    return Settings(**flags | changes)


def test_test_images_by_their_numbers_have_their_true_segments(root):
    images = TestImages(Plan(settings(root, images="1,6-8"), 42), with_numbers=True)
    (page,) = pages_of(images)
    assert page.names == ["1 other", "6 things", "7 things", "8 things"]
    assert page.images.shape == (4, 1, 16, 16) and page.masks.keys() == {"parts", "objects"}
    assert (page.masks["parts"][0] == NOWHERE).all()
    assert set(np.unique(page.masks["parts"][1])) == {1, 2}


def test_the_first_images_of_each_class_are_drawn(root):
    images = TestImages(Plan(settings(root), 42), with_numbers=False)
    assert len(images) == 12 and images.drawn() == [0, 6]
    (page,) = pages_of(images)
    assert page.names == ["other", "things"]


def test_pages_of_a_folder_of_any_images(root, capfd):
    pages = list(pages_of(OwnImages(settings(root, images=str(root / "test")))))
    assert [len(page.images) for page in pages] == [8, 4]
    assert pages[0].names == [f"{i}.png" for i in (0, 1, 2, 3, 4, 5, 0, 1)]
    (page,) = pages_of(OwnImages(settings(root, images=str(root))))
    assert page.names == [f"{i}.png" for i in (0, 1, 3, 4, 0, 1, 3, 4)]
    assert "8 of the 12 images in test/ are drawn" in capfd.readouterr().out


def test_own_images_are_seen_as_test_images_are(tmp_path):
    """smallNORB's are resized to 1.5 times image_size, and their middle is cut out."""
    values = np.random.default_rng(0).integers(1, 6, (2, 96, 96)).astype(np.uint8)
    for folder, image in zip(("test", "parts/test"), (40 * values[0], values[1]), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / folder / "x.png")
    s = Settings(
        dataset="smallNORB", image_size=32, conv_image_size=8, n_channels=1, mode="islands",
        images=str(tmp_path), n_classes=5,
    )  # fmt: skip
    (page,) = pages_of(OwnImages(s))
    images, (shown,), names, masks = page
    path = tmp_path / "test/x.png"
    prepared = Preprocessing(s)([path])
    assert normalize(images, *registry.normalization_of(s)).equal(prepared)
    (person,) = Preprocessing(s).photographs([path])
    assert shown.equal(person) and names == ["x.png"]
    # Nearest neighbour to 48x48 takes every second pixel; the middle begins at pixel 16 of 96.
    rows = np.arange(16, 80, 2)
    assert any(
        (masks["parts"][0] == values[1][np.ix_(rows + dy, rows + dx)]).all()
        for dy in (0, 1)
        for dx in (0, 1)
    )


def test_a_list_of_numbers_may_be_longer_than_the_name_of_a_file():
    images = ",".join(["7"] * 200)
    assert numbers_in(images) == [range(7, 8)] * 200
    assert masked_folder(Settings(mode="islands", images=images)) is None


def test_own_images_that_cannot_be_drawn(stage_one_checkpoint, tmp_path):
    flags = *SMALL, f"--output_dir={tmp_path}", f"--load_checkpoint_dir={stage_one_checkpoint}"
    said = run_main(*flags, "--mode=islands", f"--images={tmp_path}", ok=False).stderr
    assert said == f"error: --images={tmp_path}: there is no image in it.\n"
    broken = tmp_path / "broken.png"
    broken.write_bytes(PNG)
    for path, words in {broken: "cannot be read", tmp_path / "none": "no such file"}.items():
        with pytest.raises(UserError, match=words) as error:
            list(pages_of(OwnImages(Settings(mode="islands", images=str(path)))))
        assert str(path) in str(error.value)
    skipping = Settings(mode="islands", images=str(broken), skip_unreadable=True)
    with pytest.raises(UserError, match="none of 1 files can be read"):
        list(pages_of(OwnImages(skipping)))
    with pytest.raises(UserError, match="only --mode=islands and --mode=explore"):
        Settings(mode="test", images=str(broken))
