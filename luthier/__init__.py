"""Luthier: the rooms that the commands call; see CONTRIBUTING.md for what lives where."""

import os

# ONNX Runtime from 1.32 on tells Microsoft what it runs on, under a lasting number of the machine. It looks here when
# it is imported. A user who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
