"""The embedded corpus: small documents in which a shallow and a general rule compete."""

from research.data.microworld.config import FAMILIES, MicroworldConfig
from research.data.microworld.source import MicroworldSource
from research.data.microworld.words import WORDS
from research.data.microworld.world import World

__all__ = ['FAMILIES', 'MicroworldConfig', 'MicroworldSource', 'WORDS', 'World']
