import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandAugment, RandomErasing
from torchvision.transforms import functional as tvf

from agglomerator.data import augment, transforms

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(count=32, channels=3, height=32, width=32, low=0.0, high=255.0):
    """Blobs of different contrast, so that every operation has something to change."""
    small = torch.rand(count, channels, 5, 5, generator=seeded(1))
    big = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    strength = torch.linspace(0.2, 1, count).view(-1, 1, 1, 1)
    return (low + (high - low) * big.clamp(0, 1) * strength).to(torch.uint8)


def torchvision_operation(image, name, value):
    """What torchvision does for one operation of its RandAugment on one image (C, H, W)."""
    slope = math.degrees(math.atan(value))
    corner = {"center": [0, 0]}
    return {
        "Identity": lambda: image,
        "ShearX": lambda: tvf.affine(image, 0.0, [0, 0], 1.0, [slope, 0.0], **corner),
        "ShearY": lambda: tvf.affine(image, 0.0, [0, 0], 1.0, [0.0, slope], **corner),
        "TranslateX": lambda: tvf.affine(image, 0.0, [int(value), 0], 1.0, [0.0, 0.0]),
        "TranslateY": lambda: tvf.affine(image, 0.0, [0, int(value)], 1.0, [0.0, 0.0]),
        "Rotate": lambda: tvf.rotate(image, value),
        "Brightness": lambda: tvf.adjust_brightness(image, 1 + value),
        "Color": lambda: tvf.adjust_saturation(image, 1 + value),
        "Contrast": lambda: tvf.adjust_contrast(image, 1 + value),
        "Sharpness": lambda: tvf.adjust_sharpness(image, 1 + value),
        "Posterize": lambda: tvf.posterize(image, int(value)),
        "Solarize": lambda: tvf.solarize(image, value),
        "AutoContrast": lambda: tvf.autocontrast(image),
        "Equalize": lambda: tvf.equalize(image),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 4, 9, 17, 30])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_operation_equals_torchvisions(name, magnitude, channels):
    images = smooth_images(8, channels, 28, 33)
    images[0] = 77  # flat: nothing to stretch or equalize
    images[1] = torch.randint(256, images[1].shape, generator=seeded(2))
    space = RandAugment()._augmentation_space(augment.NUM_MAGNITUDES, (28, 33))
    assert list(space) == list(augment.OPERATIONS)
    magnitudes, signed = space[name]
    assert signed == (name in augment.SIGNED)
    value = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
    kind = torch.full((8,), augment.OPERATIONS.index(name))
    for negative in (0, 1):
        ours = augment.apply_operations(images, kind, torch.full((8,), negative), magnitude)
        signed_value = -value if negative and signed else value
        theirs = [torchvision_operation(image, name, signed_value) for image in images]
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=0)


def test_a_mixed_batch_is_each_image_on_its_own():
    images = smooth_images(64)
    operations = torch.randint(14, (64,), generator=seeded())
    negative = torch.randint(2, (64,), generator=seeded(1))
    together = augment.apply_operations(images, operations, negative)
    for i in range(64):
        alone = augment.apply_operations(
            images[i : i + 1], operations[i : i + 1], negative[i : i + 1]
        )
        assert torch.equal(together[i], alone[0])


def test_views_and_images_draw_their_own_parameters():
    images = smooth_images(1).expand(100, -1, -1, -1)
    before = images.clone()
    generator = seeded()
    first = augment.rand_augment(images, generator)
    second = augment.rand_augment(images, generator)
    assert torch.equal(images, before)
    assert (first != second).flatten(1).any(1).float().mean() > 0.9
    # 14 operations, 9 of them with a sign, make 23 outcomes of one draw and hundreds of two.
    assert len(first.unique(dim=0)) > 60


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    seen = []

    def record(images, operations, negative, magnitude):
        seen.append((operations, negative))
        return images

    monkeypatch.setattr(augment, "apply_operations", record)
    augment.rand_augment(torch.zeros(140_000, 1, 1, 1, dtype=torch.uint8), seeded())
    assert len(seen) == 2
    for operations, negative in seen:
        counts = operations.bincount(minlength=14)
        # Binomial: 10,000 expected, standard deviation 96.
        assert (counts - 10_000).abs().max() < 500
        for operation in range(14):
            assert abs(negative[operations == operation].float().mean() - 0.5) < 0.03
    same = (seen[0][0] == seen[1][0]).float().mean()
    assert abs(same - 1 / 14) < 0.005


@pytest.mark.parametrize("pil", [False, True])
def test_pixel_statistics_agree_with_torchvisions_pipeline(pil):
    images = smooth_images(50)
    torch.manual_seed(0)
    transform = RandAugment()
    repeats = 40
    theirs = []
    for image in images.repeat(repeats, 1, 1, 1):
        if pil:
            theirs.append(tvf.pil_to_tensor(transform(tvf.to_pil_image(image))))
        else:
            theirs.append(transform(image))
    theirs = torch.stack(theirs).float()
    ours = augment.rand_augment(images.repeat(4 * repeats, 1, 1, 1), seeded()).float()
    # 2000 views of standard deviation around 40 in their mean: standard error about 1.
    assert abs(ours.mean() - theirs.mean()) < 4
    assert abs(ours.std() - theirs.std()) < 4
    assert abs((ours == 0).float().mean() - (theirs == 0).float().mean()) < 0.02
    changes = (ours - ours.roll(1, -1)).abs().mean(), (theirs - theirs.roll(1, -1)).abs().mean()
    assert changes[0] / changes[1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "function",
    [
        augment.rand_augment,
        augment.random_erasing,
        augment.random_horizontal_flip,
        lambda images, generator: augment.random_crop(images, 24, generator, padding=2),
    ],
)
def test_the_generator_decides(function):
    images = smooth_images(64)
    before = images.clone()
    global_state = torch.get_rng_state()
    first = function(images, seeded(3))
    assert torch.equal(first, function(images, seeded(3)))
    assert not torch.equal(first, function(images, seeded(4)))
    assert torch.equal(images, before)
    assert torch.equal(global_state, torch.get_rng_state())
    assert function(images[:0], seeded()).shape[0] == 0
    # The draws do not depend on what the images are like.
    small, large = seeded(), seeded()
    function(smooth_images(16, 1, 28, 28), small)
    function(smooth_images(16, 3, 40, 36), large)
    assert torch.equal(small.get_state(), large.get_state())


def test_random_crop_places_windows_evenly():
    rows = torch.arange(6).view(6, 1) * 10 + torch.arange(7) + 1
    images = rows.to(torch.uint8).expand(30_000, 1, 6, 7)
    crops = augment.random_crop(images, (4, 5), seeded())
    assert crops.shape == (30_000, 1, 4, 5)
    corners = crops[:, 0, 0, 0].bincount()
    corners = corners[corners > 0]
    assert len(corners) == 9 and (corners - 30_000 / 9).abs().max() < 300
    first = rows[:4, :5].to(torch.uint8)
    for crop in crops[:20, 0]:
        assert torch.equal(crop - crop[0, 0], first - first[0, 0])


def test_random_crop_pads_with_zeros():
    images = torch.full((500, 3, 8, 8), 9, dtype=torch.uint8)
    crops = augment.random_crop(images, 8, seeded(), padding=2)
    kept = (crops[:, 0] == 9).sum((1, 2)).unique().tolist()
    assert crops.shape == images.shape and set(kept) == {36, 42, 48, 49, 56, 64}


def test_crops_refuse_windows_larger_than_the_image():
    images = smooth_images(2, 1, 16, 16)
    with pytest.raises(ValueError, match="17x17.*16x16"):
        augment.random_crop(images, 17, seeded())
    with pytest.raises(ValueError, match="20x16.*16x16"):
        transforms.center_crop(images, (20, 16))


@pytest.mark.parametrize("size", [32, 5, (4, 27), 1])
def test_center_crop_equals_torchvisions(size):
    images = smooth_images(3, 3, 32, 37)
    assert torch.equal(transforms.center_crop(images, size), tvf.center_crop(images, size))


def test_half_of_the_images_are_mirrored():
    images = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).expand(10_000, 3, 2, 3)
    views = augment.random_horizontal_flip(images, seeded())
    mirrored = (views == images.flip(-1)).flatten(1).all(1)
    assert ((views == images).flatten(1).all(1) ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 0.02
    assert torch.equal(augment.random_horizontal_flip(images, seeded(), p=0.0), images)


def erased_boxes(views):
    """Height, width and centre of the zeros of each view (B, 1, H, W), asserted to be a box."""
    empty = views[:, 0] == 0
    empty = empty[empty.flatten(1).any(1)]
    rows, columns = empty.any(2), empty.any(1)
    assert torch.equal(empty, rows.unsqueeze(2) & columns.unsqueeze(1))
    places = torch.arange(views.shape[-1])
    heights, widths = rows.sum(1), columns.sum(1)
    return torch.stack(
        (
            heights,
            widths,
            (rows * places).sum(1) / heights,
            (columns * places).sum(1) / widths,
        )
    ).float()


def test_random_erasing_has_torchvisions_distribution():
    images = torch.full((4000, 1, 32, 32), 5, dtype=torch.uint8)
    views = augment.random_erasing(images, seeded())
    ours = erased_boxes(views)
    torch.manual_seed(0)
    theirs = erased_boxes(torch.stack([RandomErasing(p=1.0)(image) for image in images]))
    assert ours.shape[1] / len(images) == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(ours.mean(1), theirs.mean(1), rtol=0, atol=0.8)
    torch.testing.assert_close(ours.std(1), theirs.std(1), rtol=0, atol=0.5)
    areas = [(boxes[0] * boxes[1]).mean().item() / 1024 for boxes in (ours, theirs)]
    assert areas[0] == pytest.approx(areas[1], abs=0.01)


def test_random_erasing_writes_the_value_of_each_channel():
    images = torch.rand(50, 3, 16, 16, generator=seeded())
    value = (-1.0, 0.0, 2.0)
    views = augment.random_erasing(images, seeded(), p=1.0, value=value)
    changed = (views != images).any(1, keepdim=True)
    written = torch.tensor(value).view(3, 1, 1).expand_as(views)
    assert changed.flatten(1).any(1).all()
    assert torch.equal(views, torch.where(changed, written, images))
    assert torch.equal(augment.random_erasing(images, seeded(), p=0.0), images)


def test_normalize_equals_torchvisions():
    images = smooth_images(4)
    ours = transforms.normalize(images, MEAN, STD)
    theirs = tvf.normalize(tvf.convert_image_dtype(images, torch.float32), MEAN, STD)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    gray = transforms.normalize(images[:, :1], 0.5, 0.5)
    torch.testing.assert_close(gray, images[:, :1] / 127.5 - 1, rtol=0, atol=1e-6)


def test_to_channels():
    images = smooth_images(4)
    gray = transforms.to_channels(images, 1)
    for image, ours in zip(images, gray, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
        assert np.array_equal(ours[0].numpy(), np.asarray(pillow))
    repeated = transforms.to_channels(gray, 3)
    assert repeated.shape == images.shape and (repeated == gray).all()
    assert transforms.to_channels(images, 3) is images
    with pytest.raises(ValueError, match="not 2"):
        transforms.to_channels(images, 2)


def test_wrong_input_is_named():
    images = smooth_images(2)
    with pytest.raises(TypeError, match="uint8, not torch.float32"):
        augment.rand_augment(images.float(), seeded())
    with pytest.raises(TypeError, match="uint8"):
        transforms.normalize(images.float(), 0.5, 0.5)
    with pytest.raises(ValueError, match=r"\(2, 2, 32, 32\)"):
        augment.rand_augment(images[:, :2], seeded())
    with pytest.raises(ValueError, match="0 to 30, not 31"):
        augment.rand_augment(images, seeded(), magnitude=31)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_result_on_cuda():
    images = smooth_images(256)
    ours = augment.rand_augment(images.cuda(), seeded()).cpu()
    differ = (ours != augment.rand_augment(images, seeded())).float().mean()
    assert differ < 1e-3
