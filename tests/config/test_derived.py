import pytest

from agglomerator.config import Settings
from agglomerator.config.derived import IMAGES, derive


def derived(**flags):
    """Settings of which the user gave these."""
    return Settings(**derive(vars(Settings()) | flags, set(flags)))


def test_nothing_given_is_the_published_default():
    assert derived() == Settings()


@pytest.mark.parametrize("dataset", IMAGES)
def test_size_channels_and_grid_follow_from_the_data_set(dataset):
    settings = derived(dataset=dataset, patch_dim=8)
    assert (settings.image_size, settings.n_channels) == IMAGES[dataset]
    assert settings.tokenizer_stride == 4


def test_what_is_given_stays():
    settings = derived(dataset="MNIST", image_size=32, n_channels=1)
    assert (settings.image_size, settings.n_channels, settings.conv_image_size) == (32, 1, 8)
    assert derived(dataset="MNIST", conv_image_size=14).image_size == 28
    assert derived(image_size=48).conv_image_size == 12


def test_the_schedule_is_as_long_as_the_training():
    assert derived(max_epochs=7).lr_speed == 7
    assert derived(max_epochs=7, lr_speed=9).lr_speed == 9
    assert derived(lr_speed=9).max_epochs == 10000
