"""Which pictures are the same, or nearly; apart from data.py, because the split and the audit both ask."""

import logging
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

logger = logging.getLogger(__name__)

BORDERS = (0.0, 0.025, 0.05)  # of each side: what the second and third hash of a picture leave out
BITS = 16 * 16  # of a hash
DISTANCE = 60  # bits, up to which two hashes are worth a closer look: 98% of changed copies, 1 in 8,000 of other pairs
SIDE = 64  # of the thumbnail that is looked at, in pixels
SIMILARITY = 0.975  # of two aligned thumbnails, from which on they show the same picture
CANDIDATES = 200_000  # pairs that are looked at: some minutes
MOST = 50_000  # pictures among which near-duplicates are looked for; the time grows with the square


class Fingerprint(NamedTuple):
    """What two pictures are compared by.

    Attributes:
        hashes: a perceptual hash (phash, `BITS` bits) of the picture and of its inside, less each of `BORDERS`.
        thumbnail: `SIDE` x `SIDE` grey levels.
    """

    hashes: bytes
    thumbnail: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB picture."""
    grey = image.convert("L").resize((128, 128), Image.Resampling.BOX, reducing_gap=2)
    inner = [grey.crop((b := round(128 * border), b, 128 - b, 128 - b)) for border in BORDERS]
    hashes = b"".join(np.packbits(imagehash.phash(part, hash_size=16).hash).tobytes() for part in inner)
    return Fingerprint(hashes, grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes())


def near_duplicates(fingerprints: list[Fingerprint]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of pictures that are re-encoded, resized or slightly cropped copies.

    Hashes choose the candidates: of whole pictures, and of one's whole with the other's inside. They look at coarse
    structure alone, which all violins on white share; so each pair is then aligned and compared in detail.
    """
    if len(fingerprints) < 2:
        return []
    hashes = np.frombuffer(b"".join(f.hashes for f in fingerprints), np.uint64).reshape(-1, len(BORDERS), BITS // 64)
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(-1, SIDE, SIDE)
    pairs, seen = [], 0
    for i, own in enumerate(hashes[:-1]):
        others = hashes[i + 1 :]
        distance = np.bitwise_count(own[0] ^ others).sum(axis=-1).min(axis=1)
        reverse = np.bitwise_count(own[1:, None] ^ others[:, 0]).sum(axis=-1).min(axis=0)
        candidates = np.flatnonzero(np.minimum(distance, reverse) <= DISTANCE) + i + 1
        seen += len(candidates)
        if seen > CANDIDATES:
            logger.warning(
                "The pictures are so alike that near-duplicates are looked for among the first of them alone"
            )
            break
        for j in candidates:
            if similarity(thumbnails[i], thumbnails[j]) >= SIMILARITY:
                pairs.append((i, int(j)))
    return pairs


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return how much alike two thumbnails [SIDE, SIDE] are, up to 1, the inside of either aligned with the other.

    It is the correlation of their details: of what is left of both without their coarse structure.
    """
    a, b = (gaussian_filter(picture.astype(np.float64), 1.5) for picture in (a, b))
    return max(_correlation(_aligned(a, b), b), _correlation(_aligned(b, a), a))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    # Without the edge, where an aligned picture may lack what the other has.
    a, b = ((picture - gaussian_filter(picture, SIDE / 16))[2:-2, 2:-2] for picture in (a, b))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 1e-6 else 0.0  # of one colour


def _aligned(whole: np.ndarray, part: np.ndarray, steps: int = 8) -> np.ndarray:
    """Return the box in a picture that fits another best, in its size, by Gauss-Newton (Lucas and Kanade 1981)."""
    part = _standardised(part)
    centre = (SIDE - 1) / 2
    unit = (np.arange(SIDE) - centre) / centre
    down, across = np.gradient(whole)
    scale, shift = np.ones(2), np.zeros(2)  # of rows and columns, in halves of a side
    best, least = whole, np.inf
    for _ in range(steps):
        rows, columns = (_sampling((scale[axis] * unit + shift[axis]) * centre + centre) for axis in (0, 1))
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


def _sampling(places: np.ndarray) -> np.ndarray:
    """Return the matrix [SIDE, SIDE] that interpolates a line of pixels at these places."""
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(SIDE)))


def _standardised(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.mean()) / (picture.std() or 1.0)


def group_pictures(n: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Return a group number for each of n pictures, int [n]: the same for those that pairs connect."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
