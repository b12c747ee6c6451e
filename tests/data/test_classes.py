import pytest
import torch

from agglomerator.data.classes import ClassMap, match
from agglomerator.data.images import ImageSet


@pytest.mark.parametrize(
    "known, found, expected",
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
        (["cat", "dog", "owl"], ["owl", "cat"], [2, 0]),
        (["T-shirt/top", "Ankle boot"], ["Ankle_boot", "t_shirt_top"], [1, 0]),
        (["a-b", "ab"], ["ab", "a-b"], [1, 0]),
        (["a-b", "ab"], ["a_b", "ab"], None),
        (["cat", "dog"], ["0", "1"], [0, 1]),
        (["cat", "dog"], ["01", "00"], [1, 0]),
        (["7", "8"], ["8", "7"], [1, 0]),
        (
            ["0", "1", "10", *"23456789"],
            [f"{i:02}" for i in range(11)],
            [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2],
        ),
        (["cat", "dog"], ["1", "2"], None),
        (["cat", "dog", "owl"], ["0", "1"], None),
        (["cat", "dog"], ["cat", "cow"], None),
        (["cat", "dog"], ["cat", "dog", "owl"], None),
        (["鳥", "魚"], ["魚", "鳥"], [1, 0]),
        (["+", "-"], ["-", "+"], [1, 0]),
        ([], ["cat"], None),
    ],
)
def test_classes_are_found_by_name(known, found, expected):
    assert match(known, found) == expected


def test_a_data_set_takes_the_labels_of_the_run():
    images = ImageSet(torch.arange(3).view(3, 1, 1, 1), [0, 1, 1], ["dog", "cat"])
    found = ClassMap(("cat", "dog"), (1, 0)).apply(images)
    assert found.labels.tolist() == [1, 0, 0] and found.classes == ["cat", "dog"]
    assert found.images is images.images
    assert images.labels.tolist() == [0, 1, 1] and images.classes == ["dog", "cat"]
