"""The documentation, and the command that generates a part of it."""
