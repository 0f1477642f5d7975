"""Writes `glyphs/scans.npz` from scikit-learn. Run once by hand; nothing else in the room imports scikit-learn.

Source: `sklearn.datasets.load_digits`, the test part of "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49), licence CC BY 4.0.
Each scan counts the ink of 4x4 blocks of a 32x32 bitmap: 8x8 values, 0 to 16.
"""

from pathlib import Path

import numpy as np


def scans_from_sklearn(path: Path) -> None:
    """Stores `scans` uint8 [1797,8,8] and `digits` uint8 [1797], in the order scikit-learn gives."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    np.savez_compressed(path, scans=bunch.images.astype(np.uint8), digits=bunch.target.astype(np.uint8))


if __name__ == "__main__":
    scans_from_sklearn(Path(__file__).with_name("scans.npz"))
