"""Which pictures are the same, or nearly; apart from data.py, because the split and the audit both ask."""

from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BORDERS = (0.0, 0.04, 0.08)  # of each side: what the second and third hash of a picture leave out
DISTANCE = 12  # bits of 64, up to which two hashes are worth a closer look
SIDE = 32  # of the thumbnail that is looked at, in pixels
PROMISING = 0.6  # correlation of two thumbnails as they are, below which alignment cannot help
SIMILARITY = 0.985  # correlation of two aligned thumbnails from which on they show the same picture
MOST = 200_000  # pictures among which near-duplicates are looked for; the time grows with the square


class Fingerprint(NamedTuple):
    """What two pictures are compared by.

    Attributes:
        hashes: a perceptual hash (phash, 64 bits) of the picture and of its inside, less each of `BORDERS`.
        thumbnail: `SIDE` x `SIDE` grey levels.
    """

    hashes: bytes
    thumbnail: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB picture."""
    grey = image.convert("L").resize((128, 128), Image.Resampling.BOX, reducing_gap=2)
    inner = [grey.crop((b := round(128 * border), b, 128 - b, 128 - b)) for border in BORDERS]
    hashes = b"".join(np.packbits(imagehash.phash(part).hash).tobytes() for part in inner)
    return Fingerprint(hashes, grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes())


def near_duplicates(fingerprints: list[Fingerprint]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of pictures that are re-encoded, resized or slightly cropped copies.

    Hashes choose the candidates: of whole pictures, and of one's whole with the other's inside. They look at coarse
    structure alone, which all smiling faces share; so each pair is then aligned and compared as thumbnails.
    """
    if not 1 < len(fingerprints) <= MOST:
        return []
    hashes = np.frombuffer(b"".join(f.hashes for f in fingerprints), np.uint64).reshape(-1, len(BORDERS))
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(-1, SIDE, SIDE)
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)
    pairs = []
    for i, own in enumerate(hashes[:-1]):
        others = hashes[i + 1 :]
        distance = np.bitwise_count(own[0] ^ others).min(axis=1)
        np.minimum(distance, np.bitwise_count(own[1:, None] ^ others[:, 0]).min(axis=0), out=distance)
        alike = np.flatnonzero(distance <= DISTANCE) + i + 1
        promising = alike[flat[alike] @ flat[i] >= PROMISING]
        pairs += [(i, int(j)) for j in promising if similarity(thumbnails[i], thumbnails[j]) >= SIMILARITY]
    return pairs


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return how well two thumbnails [SIDE, SIDE] correlate, the inside of either aligned with the other."""
    a, b = (_standardised(picture.astype(np.float64)) for picture in (a, b))
    if not a.any() or not b.any():  # of one colour
        return 0.0
    return max(_aligned(a, b), _aligned(b, a))


def _aligned(whole: np.ndarray, part: np.ndarray, steps: int = 6) -> float:
    """Return the correlation of a picture with the box in another that fits it best.

    The box is found by Gauss-Newton from the whole on (Lucas and Kanade 1981).
    """
    gradients = np.gradient(whole)
    centre = (SIDE - 1) / 2
    unit = (np.arange(SIDE) - centre) / centre
    scale, shift = np.ones(2), np.zeros(2)  # of rows and columns, in halves of a side
    best = 0.0
    for step in range(steps + 1):
        rows, columns = ((scale[axis] * unit + shift[axis]) * centre + centre for axis in (0, 1))
        grid = np.meshgrid(rows, columns, indexing="ij")
        seen = map_coordinates(whole, grid, order=1, mode="nearest")
        spread = seen.std() or 1.0
        seen = (seen - seen.mean()) / spread
        best = max(best, float((seen * part).mean()))
        if step == steps:
            break
        down, across = (map_coordinates(g, grid, order=1, mode="nearest") * centre / spread for g in gradients)
        jacobian = np.stack([down * unit[:, None], across * unit[None], down, across], axis=-1).reshape(-1, 4)
        change = np.linalg.lstsq(jacobian, (part - seen).ravel(), rcond=None)[0]
        scale = np.clip(scale + change[:2], 0.75, 1.0)
        shift = np.clip(shift + change[2:], scale - 1, 1 - scale)
    return best


def _standardised(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.mean()) / (picture.std() or 1.0)


def group_pictures(n: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Return a group number for each of n pictures, int [n]: the same for those that pairs connect."""
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
