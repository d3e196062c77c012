"""Which images are the same, or nearly: perceptual hashes choose the candidates, a detailed comparison decides."""

import logging
import math
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from luthier.cores import count_cores
from luthier.terminal import Tenths, plural

logger = logging.getLogger(__name__)

BORDERS = (0.0, 0.025, 0.05)  # share of each side that the first, second and third hash of an image leave out
BITS = 16 * 16  # of a hash
MAX_DISTANCE = 60  # bits between two hashes that are compared in detail: 98% of changed copies, 1 in 8,000 other pairs
SIDE = 64  # pixels of the thumbnail that is compared
# The bits of odd horizontal frequencies, which change their sign, and with it their bit, in the mirror.
MIRROR = np.packbits(np.arange(BITS) % 2 == 1)
COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(math.isqrt(BITS)), np.arange(SIDE) + 0.5))
MIN_SIMILARITY = 0.975  # of two aligned thumbnails that show the same image
CANDIDATES, MIN_NEAREST = 200_000, 8  # pairs that are compared in detail, but at least so many for each image
CELL, CELLS = 100, 256  # images in a cell of the index, and cells that are searched: all of them below 25,600 images
ALIGNING_STEPS = 8
QUERIES, PAIRS = 16_384, 64  # images that are searched for, and pairs that are compared, at a time
WAITING = 1000 * PAIRS  # pairs that wait for a thread: those of millions of images would fill the memory


class Fingerprint(NamedTuple):
    """What two images are compared by.

    Attributes:
        hashes: a perceptual hash of the image and of its inside, less each of `BORDERS`: a bit for each of the `BITS`
            lowest frequencies of the cosine transform, set where it is above their median (Zauner 2010).
        thumbnail: `SIDE` x `SIDE` grey levels.
    """

    hashes: bytes
    thumbnail: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB image."""
    grey = image.convert("L").resize((128, 128), Image.Resampling.BOX, reducing_gap=2)
    inner = [grey.crop((b := round(128 * border), b, 128 - b, 128 - b)) for border in BORDERS]
    pixels = np.stack([np.asarray(part.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64) for part in inner])
    # Rounded, because many frequencies of a symmetric image are zero, and must not be told apart by rounding errors.
    frequencies = (COSINES @ pixels @ COSINES.T).reshape(len(BORDERS), BITS).round(6)
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    return Fingerprint(np.packbits(bits, axis=1).tobytes(), grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes())


def near_duplicates(hashes: np.ndarray, thumbnails: Any) -> np.ndarray:
    """Return the pairs of images (i, j), i < j, of which one is a re-encoded, resized or slightly cropped copy.

    Hashes choose the candidates, see `find_candidates`. They see coarse structure alone, which all violins on white
    share, so each candidate pair is aligned and compared in detail.

    Args:
        hashes: uint8 [N, `len(BORDERS)`, `BITS` / 8], of each image's `Fingerprint`.
        thumbnails: uint8 [N, `SIDE`, `SIDE`]; anything that gives some of them by an array of their numbers.

    Returns int64 [P, 3]: i, j, and 1 for a copy in the mirror (of left and right), or else 0. A pair of symmetric
    images is there twice.
    """
    if sys.platform in ("darwin", "win32"):  # faiss and torch bring an OpenMP each there, and crash in one process
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pairs = pool.submit(find_candidates, hashes).result()
    else:
        pairs = find_candidates(hashes)
    found, progress = [np.empty((0, 3), np.int64)], Tenths("compare", len(pairs), "pairs", quiet_seconds=10)

    def compare(begin: int) -> np.ndarray:
        block = pairs[begin : begin + PAIRS]
        first, second = (thumbnails[block[:, column]] for column in (0, 1))
        mirrored = block[:, 2, None, None] == 1
        return block[similarity(first, np.where(mirrored, second[:, :, ::-1], second)) >= MIN_SIMILARITY]

    with ThreadPoolExecutor(count_cores()) as pool:  # numpy and scipy release the interpreter
        for begin in range(0, len(pairs), WAITING):
            end = min(begin + WAITING, len(pairs))
            found.append(np.concatenate([*pool.map(compare, range(begin, end, PAIRS))]))
            progress.reach(end)
    return np.concatenate(found)


def find_candidates(hashes: np.ndarray) -> np.ndarray:
    """Return the pairs of images whose hashes are at most `MAX_DISTANCE` bits apart, as `near_duplicates` does.

    The whole of one image is compared with the whole and the inside of the other, and with the mirror image of its
    whole. The mirror image is not hashed: the image's own hash gives one that is at most 30 bits off. Each image has
    no more than its nearest ones: there are sets in which thousands of images look alike, and the number of pairs must
    not grow with the square of the images. For the same reason an index divides many images into cells by the nearest
    of randomly chosen hashes, and searches those cells alone whose hashes are nearest.

    Args:
        hashes: as there.
    """
    images = len(hashes)
    if images < 2:
        return np.empty((0, 3), np.int64)
    nearest = min(images, max(MIN_NEAREST, CANDIDATES // images) + 1)  # an image is the nearest to itself
    index = _build_index(np.ascontiguousarray(hashes[:, 0]))
    copies = _search(index, np.moveaxis(hashes, 1, 0), nearest)
    mirrored = _search(index, hashes[None, :, 0] ^ MIRROR, nearest)
    crowded = int((np.bincount(copies[:, 0]) == nearest - 1).sum())
    if crowded and nearest < images:
        logger.warning(
            f"{plural(crowded, 'image looks', 'images look')} like {nearest - 1} or more others at first sight. "
            "Near-duplicates are searched among the nearest of these"
        )
    # A pair as one number: numpy sorts rows much more slowly, and in copies.
    both = [np.sort(pairs, axis=1) for pairs in (copies, mirrored)]
    numbers = [2 * (images * pairs[:, 0] + pairs[:, 1]) + kind for kind, pairs in enumerate(both)]
    pairs, kinds = np.divmod(np.unique(np.concatenate(numbers)), 2)
    return np.stack([pairs // images, pairs % images, kinds], axis=1)


def _search(index: Any, queries: np.ndarray, nearest: int) -> np.ndarray:
    """Return each image and its nearest others within the distance by any of its queries, int64 [P, 2].

    Args:
        index: of `_build_index`.
        queries: one or several hashes of each image, uint8 [K, N, `BITS` / 8].
        nearest: how many images are asked for; one of them may be the image itself.
    """
    found = []
    for begin in range(0, queries.shape[1], QUERIES):
        edges = []
        for part in queries[:, begin : begin + QUERIES]:
            distances, others = index.search(np.ascontiguousarray(part), nearest)
            own = np.repeat(np.arange(begin, begin + len(part)), nearest)
            edge = np.stack([own, others.ravel(), distances.ravel()], axis=1, dtype=np.int64)
            edges.append(edge[(edge[:, 2] <= MAX_DISTANCE) & (edge[:, 1] >= 0) & (edge[:, 0] != edge[:, 1])])
        found.append(_nearest_of_each(np.concatenate(edges), nearest - 1))
    return np.concatenate(found)


def _build_index(hashes: np.ndarray) -> Any:
    """Return a faiss index of hashes, uint8 [N, `BITS` / 8]."""
    import faiss  # see `near_duplicates`

    index: Any = faiss.IndexBinaryFlat(BITS)
    cells = len(hashes) // CELL
    if cells > CELLS:
        index.add(hashes[np.random.default_rng(0).choice(len(hashes), cells, replace=False)])
        index.use_heap = False  # finds so many cells by counting, in a quarter of the time
        index = faiss.IndexBinaryIVF(index, BITS, cells)
        index.nprobe = CELLS
    index.add(hashes)
    return index


def _nearest_of_each(edges: np.ndarray, nearest: int) -> np.ndarray:
    """Return the nearest others of each image, int64 [P, 2], from rows of image, other and distance."""
    edges = edges[np.lexsort((edges[:, 2], edges[:, 1], edges[:, 0]))]
    first = np.ones(len(edges), dtype=bool)  # of several distances between two images the least
    first[1:] = (edges[1:, :2] != edges[:-1, :2]).any(axis=1)
    edges = edges[first]
    edges = edges[np.lexsort((edges[:, 2], edges[:, 0]))]
    begins = np.searchsorted(edges[:, 0], edges[:, 0])
    return edges[np.arange(len(edges)) - begins < nearest, :2]


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how alike pairs of thumbnails [P, SIDE, SIDE] are, [P], up to 1, the inside of either aligned.

    It is the correlation of their details: of what is left of both without their coarse structure.
    """
    a, b = (gaussian_filter(thumbnails.astype(np.float32), (0, 1.5, 1.5)) for thumbnails in (a, b))
    return np.maximum(_correlation(_aligned(a, b), b), _correlation(_aligned(b, a), a))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # Without the edge, where an aligned thumbnail may lack what the other has.
    a, b = ((images - gaussian_filter(images, (0, SIDE / 16, SIDE / 16)))[:, 2:-2, 2:-2] for images in (a, b))
    size = np.sqrt(np.square(a).sum(axis=(1, 2)) * np.square(b).sum(axis=(1, 2)))
    return np.where(size > 1e-6, (a * b).sum(axis=(1, 2)) / np.maximum(size, 1e-6), 0)  # one colour has no details


def _aligned(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the box of each `whole` [P, SIDE, SIDE] that fits `part` best, at its size.

    By Gauss-Newton (Lucas and Kanade 1981), for scale and shift of rows and columns.
    """
    part = _standardised(part)
    centre = (SIDE - 1) / 2
    unit = ((np.arange(SIDE) - centre) / centre).astype(np.float32)
    layers = np.stack([whole, *np.gradient(whole, axis=(1, 2))], axis=1)
    scale, shift = np.ones((len(whole), 2)), np.zeros((len(whole), 2))  # of rows and columns, in halves of a side
    best, least = whole.copy(), np.full(len(whole), np.inf)
    for _ in range(ALIGNING_STEPS):
        rows, columns = (
            _interpolation((scale[:, axis, None] * unit + shift[:, axis, None]) * centre + centre) for axis in (0, 1)
        )
        box, down, across = np.moveaxis(rows[:, None] @ layers @ columns.transpose(0, 2, 1)[:, None], 1, 0)
        difference = part - _standardised(box)
        error = np.square(difference).mean(axis=(1, 2))
        better = error < least
        best[better], least[better] = box[better], error[better]
        slopes = np.stack([down, across], axis=1) * (centre / _spread(box))[:, None]
        stretches = slopes * np.stack([np.broadcast_to(unit[:, None], (SIDE, SIDE)), np.tile(unit, (SIDE, 1))])
        jacobian = np.concatenate([stretches, slopes], axis=1).reshape(len(whole), 4, -1)
        normal = jacobian @ jacobian.transpose(0, 2, 1)
        moments = jacobian @ difference.reshape(len(whole), -1, 1)
        change = (np.linalg.pinv(normal.astype(np.float64), rcond=1e-6, hermitian=True) @ moments)[..., 0]
        scale = np.clip(scale + change[:, :2], 0.75, 1.0)
        shift = np.clip(shift + change[:, 2:], scale - 1, 1 - scale)
    return best


def _interpolation(positions: np.ndarray) -> np.ndarray:
    """Return the matrices [P, SIDE, SIDE] that interpolate lines of pixels at positions [P, SIDE]."""
    return np.maximum(0, 1 - np.abs(positions[..., None] - np.arange(SIDE))).astype(np.float32)


def _spread(thumbnails: np.ndarray) -> np.ndarray:
    spread = thumbnails.std(axis=(1, 2), keepdims=True)
    return np.where(spread > 0, spread, 1)


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    return (thumbnails - thumbnails.mean(axis=(1, 2), keepdims=True)) / _spread(thumbnails)


def connected_groups(n: int, pairs: np.ndarray) -> np.ndarray:
    """Return a group number for each of n images, int [n]: the same for those that pairs [P, 2] connect."""
    rows, columns = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
