"""The miniature world: how it is drawn, trained and shipped (docs/miniworld.md)."""

from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
"""What ships of it."""
