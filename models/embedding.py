"""How far a scan lies from those a network was trained on, in the network's own features.

The features before the last layer of many training scans span a cloud; its mean, main directions and spread travel with
the weights. A scan far outside the cloud is one the network was never shown, and its answer means nothing, however
certain it looks (Lee et al., NeurIPS 2018, use the same distance). Pure numpy.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

DIRECTIONS: Final = 24


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRange:
    """A cloud of features of D numbers.

    `mean` (D,); `basis` (k, D), orthonormal main directions; `spread` (k,), standard deviation along each; `rest` (1,),
    root mean square of what the directions leave. All float32.
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    spread: NDArray[np.float32]
    rest: NDArray[np.float32]


def fit(features: NDArray[np.float32]) -> EmbeddingRange:
    """The range of features (N, D) of training scans; `ValueError` for fewer than two scans."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}; needed are (N, D) of at least two scans")
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    count = min(DIRECTIONS, len(features) - 1, features.shape[1])
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    basis = directions[:count]
    along = centred @ basis.T
    left = np.linalg.norm(centred - along @ basis, axis=1)
    return EmbeddingRange(
        mean=mean.astype(np.float32),
        basis=basis.astype(np.float32),
        spread=np.maximum(along.std(axis=0), 1e-3).astype(np.float32),
        rest=np.array([max(float(np.sqrt((left**2).mean())), 1e-3)], np.float32),
    )


def distance(features: NDArray[np.float32], known: EmbeddingRange) -> float:
    """Of one scan's features (D,): about 1 in the cloud, growing without bound outside of it."""
    centred = features.astype(np.float64) - known.mean
    along = known.basis.astype(np.float64) @ centred
    left = float(np.linalg.norm(centred - along @ known.basis)) / float(known.rest[0])
    return float(np.sqrt((float(((along / known.spread) ** 2).mean()) + left**2) / 2))
