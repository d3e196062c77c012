"""Which images are the same, or nearly: perceptual hashes choose the candidates, a detailed comparison decides."""

import logging
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

logger = logging.getLogger(__name__)

BORDERS = (0.0, 0.025, 0.05)  # share of each side that the first, second and third hash of an image leave out
BITS = 16 * 16  # of a hash
MAX_DISTANCE = 60  # bits between two hashes that are compared in detail: 98% of changed copies, 1 in 8,000 other pairs
SIDE = 64  # pixels of the thumbnail that is compared
MIN_SIMILARITY = 0.975  # of two aligned thumbnails that show the same image
MAX_CANDIDATES = 200_000  # pairs that are compared in detail: some minutes
MAX_IMAGES = 50_000  # among which near-duplicates are searched; the time grows with the square


class Fingerprint(NamedTuple):
    """What two images are compared by.

    Attributes:
        hashes: a perceptual hash (phash, `BITS` bits) of the image and of its inside, less each of `BORDERS`.
        thumbnail: `SIDE` x `SIDE` grey levels.
    """

    hashes: bytes
    thumbnail: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB image."""
    grey = image.convert("L").resize((128, 128), Image.Resampling.BOX, reducing_gap=2)
    inner = [grey.crop((b := round(128 * border), b, 128 - b, 128 - b)) for border in BORDERS]
    hashes = b"".join(np.packbits(imagehash.phash(part, hash_size=16).hash).tobytes() for part in inner)
    return Fingerprint(hashes, grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes())


def near_duplicates(fingerprints: list[Fingerprint]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of images of which one is a re-encoded, resized or slightly cropped copy.

    Hashes choose the candidates: whole image against whole image, and the whole of one against the inside of the
    other. Hashes see coarse structure alone, which all violins on white share, so each candidate pair is aligned and
    compared in detail.
    """
    if len(fingerprints) < 2:
        return []
    hashes = np.frombuffer(b"".join(f.hashes for f in fingerprints), np.uint64).reshape(-1, len(BORDERS), BITS // 64)
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(-1, SIDE, SIDE)
    pairs, compared = [], 0
    for i, own in enumerate(hashes[:-1]):
        others = hashes[i + 1 :]
        distance = np.bitwise_count(own[0] ^ others).sum(axis=-1).min(axis=1)
        reverse = np.bitwise_count(own[1:, None] ^ others[:, 0]).sum(axis=-1).min(axis=0)
        candidates = np.flatnonzero(np.minimum(distance, reverse) <= MAX_DISTANCE) + i + 1
        compared += len(candidates)
        if compared > MAX_CANDIDATES:
            logger.warning("The images are so alike that near-duplicates are searched among the first of them only")
            break
        for j in candidates:
            if similarity(thumbnails[i], thumbnails[j]) >= MIN_SIMILARITY:
                pairs.append((i, int(j)))
    return pairs


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return how alike two thumbnails [SIDE, SIDE] are, up to 1, the inside of either aligned with the other.

    It is the correlation of their details: of what is left of both without their coarse structure.
    """
    a, b = (gaussian_filter(thumbnail.astype(np.float64), 1.5) for thumbnail in (a, b))
    return max(_correlation(_aligned(a, b), b), _correlation(_aligned(b, a), a))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    # Without the edge, where an aligned thumbnail may lack what the other has.
    a, b = ((thumbnail - gaussian_filter(thumbnail, SIDE / 16))[2:-2, 2:-2] for thumbnail in (a, b))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 1e-6 else 0.0  # a single colour has no details


def _aligned(whole: np.ndarray, part: np.ndarray, steps: int = 8) -> np.ndarray:
    """Return the box of `whole` that fits `part` best, at its size, by Gauss-Newton (Lucas and Kanade 1981)."""
    part = _standardised(part)
    centre = (SIDE - 1) / 2
    unit = (np.arange(SIDE) - centre) / centre
    down, across = np.gradient(whole)
    scale, shift = np.ones(2), np.zeros(2)  # of rows and columns, in halves of a side
    best, least = whole, np.inf
    for _ in range(steps):
        rows, columns = (_interpolation((scale[axis] * unit + shift[axis]) * centre + centre) for axis in (0, 1))
        box = rows @ whole @ columns.T
        difference = part - _standardised(box)
        if (error := np.square(difference).mean()) < least:
            best, least = box, error
        slopes = [rows @ gradient @ columns.T * centre / (box.std() or 1) for gradient in (down, across)]
        jacobian = np.stack([slopes[0] * unit[:, None], slopes[1] * unit, *slopes]).reshape(4, -1)
        change = np.linalg.lstsq(jacobian @ jacobian.T, jacobian @ difference.ravel(), rcond=None)[0]
        scale = np.clip(scale + change[:2], 0.75, 1.0)
        shift = np.clip(shift + change[2:], scale - 1, 1 - scale)
    return best


def _interpolation(positions: np.ndarray) -> np.ndarray:
    """Return the matrix [SIDE, SIDE] that interpolates a line of pixels at these positions."""
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(SIDE)))


def _standardised(thumbnail: np.ndarray) -> np.ndarray:
    return (thumbnail - thumbnail.mean()) / (thumbnail.std() or 1.0)


def connected_groups(n: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Return a group number for each of n images, int [n]: the same for those that pairs connect."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
