"""The network of the built-in separator, and the Fourier transforms of all separators."""

from engine.separators.network.network import MaskNetwork, NetworkConfig, band_edges

__all__ = ["MaskNetwork", "NetworkConfig", "band_edges"]
