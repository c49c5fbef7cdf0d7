"""How loud a piece of sound is."""

import numpy as np


def rms(pcm: bytes) -> float:
    """Return the root mean square of mono PCM16, of 32767; 0.0 where there is none."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.float64)
    return float(np.sqrt(np.mean(samples**2))) if samples.size else 0.0
