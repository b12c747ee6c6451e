from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

from agglomerator.data.sets import smallnorb
from agglomerator.hierarchy.classes import hierarchy_of
from agglomerator.util.errors import UserError

ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
VEHICLES = ["airplane", "automobile", "ship", "truck"]
EXAMPLE = """\
# of the description of the format
animals: fish
animals/mammals: cat, dog

vehicles: car, ship
"""
CLASSES = ["car", "cat", "dog", "fish", "ship"]

# What is wrong with a file, and what the one line must say of it.
WRONG = {
    "no colon": ("animals: cat, dog\nship\n", "line 2: 'ship'"),
    "a class that is called as a group": ("fish: cat, dog\n: fish\n", "fish is a group here"),
    "no class": ("animals:\n", "line 1"),
    "nothing between commas": ("\n# note\nanimals: cat,, dog\n", "line 3"),
    "nothing between slashes": ("animals//mammals: cat\n", "line 1"),
    "a class twice": (EXAMPLE + "pets: cat\n", "line 6: cat stands in line 3"),
    "a class misspelt": (EXAMPLE.replace("ship", "shipp"), "'ship' (line 5 has 'shipp'"),
    "classes missing": ("animals: cat\n", "'car' and 3 more of 5"),
    "no division": ("all: car, cat, dog, fish, ship\n", "equally far apart"),
    "each class by itself": ("".join(f"{c}s: {c}\n" for c in CLASSES), "equally far apart"),
    "empty": ("", "'car'"),
}


def of(classes, dataset="ImageFolder", hierarchy=None):
    return hierarchy_of(SimpleNamespace(hierarchy=hierarchy, dataset=dataset), classes)


def write(folder, text):
    path = folder / "classes.txt"
    path.write_text(text)
    return str(path)


def test_example(tmp_path):
    found = of(CLASSES, hierarchy=write(tmp_path, EXAMPLE))
    assert found.super_classes == ["animals", "vehicles"]
    assert found.super_labels.tolist() == [1, 0, 0, 0, 1]
    # From the top three steps lead down to the cat, two to the car: 3 between the two.
    expected = [
        [0, 3, 3, 3, 1],
        [3, 0, 1, 2, 3],
        [3, 1, 0, 2, 3],
        [3, 2, 2, 0, 3],
        [1, 3, 3, 3, 0],
    ]
    np.testing.assert_array_equal(found.distances(), expected)


def test_what_all_classes_have_in_common_does_not_count(tmp_path):
    lines = [f"things/{line}" if ":" in line else line for line in EXAMPLE.splitlines()]
    found = of(CLASSES, hierarchy=write(tmp_path, "\n".join(lines)))
    plain = of(CLASSES, hierarchy=write(tmp_path, EXAMPLE))
    assert found.super_classes == plain.super_classes
    np.testing.assert_array_equal(found.distances(), plain.distances())


@pytest.mark.parametrize("text, words", WRONG.values(), ids=WRONG)
def test_wrong_file_is_named_with_its_line(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        of(CLASSES, hierarchy=path)
    assert str(error.value).startswith(f"--hierarchy={path}: ")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00animals", None], ids=["no text", "no file"])
def test_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        of(CLASSES, hierarchy=str(path))


def test_known_ones_are_of_the_names_that_the_data_sets_have():
    names = [name.split(" - ")[0] for name in FashionMNIST.classes]
    found = of(names, "FashionMNIST")
    groups = {
        top: np.flatnonzero(found.super_labels == i) for i, top in enumerate(found.super_classes)
    }
    assert groups["shoes"].tolist() == [5, 7, 9]
    assert of(smallnorb.CLASSES, "smallNORB").super_labels.tolist() == [0, 0, 1, 1, 1]


def test_folder_of_images_is_known_by_its_class_names():
    found = of(sorted(ANIMALS + VEHICLES))
    assert found.name == "CIFAR10"
    for name, top in zip(found.classes, found.super_labels, strict=True):
        assert found.super_classes[top] == ("animals" if name in ANIMALS else "vehicles")
    assert of(["cat", "dog", "ship"]).super_labels.tolist() == [0, 0, 1]
    assert of(ANIMALS) is None
    assert of(["cat", "dog", "unicorn"]) is None
    assert of([str(i) for i in range(10)], "digits") is None


def test_cifar100_has_twenty_super_classes_of_five():
    fine = "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    fine += "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
    fine += "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
    fine += "house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
    fine += "motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    fine += "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road "
    fine += "rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel "
    fine += "streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    fine += "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    found = of(fine.split(), "CIFAR100")
    assert len(found.classes) == 100
    assert np.bincount(found.super_labels).tolist() == [5] * 20
