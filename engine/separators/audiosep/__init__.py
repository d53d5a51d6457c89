"""AudioSep: separation of any sound by text, from the weights that its authors released."""

from engine.separators.audiosep.layout import from_original, recognises
from engine.separators.audiosep.network import AudioSepConfig
from engine.separators.audiosep.separator import AudioSep

__all__ = ["AudioSep", "AudioSepConfig", "from_original", "recognises"]
