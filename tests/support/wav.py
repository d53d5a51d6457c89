"""Write test recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io.wavfile


def write_wav(path: Path, samples_T: np.ndarray, *, sample_rate_hz: int) -> None:
    """Write mono float32 WAV; equal samples give equal bytes."""
    scipy.io.wavfile.write(path, sample_rate_hz, np.asarray(samples_T, np.float32))
