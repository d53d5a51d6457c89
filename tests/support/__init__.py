"""What several tests use: stand-in sounds and separators, servers, and clusters."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root."""
