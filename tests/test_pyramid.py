"""The pyramid's features: each sees details of one size, in one cell."""

import pytest
import torch

from ral_gym.metrics import PyramidFeatures, extract


def stripes(period: int, side: int = 32) -> torch.Tensor:
    """Vertical stripes (1, 1, S, S) of this period in pixels, in the upper left quarter of a grey image."""
    image = torch.full((1, 1, side, side), 128, dtype=torch.uint8)
    columns = torch.arange(side // 2) % period < period // 2
    image[:, :, : side // 2, : side // 2] = torch.where(columns, 228, 28).to(torch.uint8)
    return image


@pytest.mark.parametrize(("period", "band"), [(2, 0), (4, 1), (8, 2)])
def test_details_are_seen_by_the_band_of_their_size_where_they_are(period: int, band: int) -> None:
    features = PyramidFeatures()(stripes(period)).reshape(3, 4)  # bands, cells
    assert int(features[:, 0].argmax()) == band
    assert (features[:, 0] > 5 * features[:, 3]).all()  # little reaches the opposite corner
    assert features[band, 0] > 0.2


def test_a_flat_image_has_no_detail_and_brightness_is_not_seen() -> None:
    image = stripes(4)
    flat = torch.full_like(image, 200)
    assert (PyramidFeatures()(flat) == 0).all()
    torch.testing.assert_close(PyramidFeatures()(image - 20), PyramidFeatures()(image), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("height", [1, 4, 8, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_fewer_rows_have_as_many_features(height: int, channels: int) -> None:
    extractor = PyramidFeatures(levels=3, cells=2)
    images = torch.randint(256, (5, channels, height, 32), generator=torch.Generator().manual_seed(0))
    features = extract(extractor, images.to(torch.uint8), batch_size=2)
    assert features.shape == (5, extractor.num_features) == (5, 12) and features.dtype == torch.float32
    assert features.isfinite().all() and (features.std(0) > 0).all()


def test_grey_in_three_channels_is_grey() -> None:
    image = stripes(4)
    torch.testing.assert_close(PyramidFeatures()(image.expand(-1, 3, -1, -1)), PyramidFeatures()(image))
