"""Luthier: the rooms that the commands call; see CONTRIBUTING.md for what lives where."""
