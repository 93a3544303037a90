"""Where the network's evidence for residual tissue lies, as a map over the native view.

The map is coarse: 7 x 7 places over the crop for ResNet-18, so it says "here", not "this outline". It shows what the
network used, not whether it was right.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.finding import Box


def native_activation(evidence: NDArray[np.float32], crop: Box, native_shape: tuple[int, int]) -> NDArray[np.float32]:
    """Evidence (h, w) in logits, over the crop -> (H, W), float32, 0 to 1, native pixels; 0 outside the crop.

    Evidence against tissue counts as 0; the strongest evidence for it is 1. All zeros where there is none.
    """
    positive = np.maximum(evidence, 0).astype(np.float32)
    spread = cv2.resize(positive, (crop.width, crop.height), interpolation=cv2.INTER_LINEAR)
    top = float(spread.max())
    result = np.zeros(native_shape, np.float32)
    if top > 0:
        result[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width] = spread / np.float32(top)
    return result
