"""What to install: commands in messages, for NVRTC and the CUDA bindings of a CUDA major version."""

from __future__ import annotations

#: Requirements by CUDA major version, as in the extras of pyproject.toml.
NVRTC = {12: "nvidia-cuda-nvrtc-cu12>=12.8,<13", 13: "nvidia-cuda-nvrtc>=13,<14"}
BINDINGS = {12: "cuda-python>=12.9,<13", 13: "cuda-python>=13.0.3,<14"}


def _command(wheels: dict[int, str], major: int | None) -> str:
    return f"pip install '{wheels[major if major in wheels else 12]}'"


def wheel_command(major: int | None) -> str:
    """How to get the NVRTC of a CUDA major version; of CUDA 12 where there is none of that version."""
    return _command(NVRTC, major)


def bindings_command(major: int | None) -> str:
    """The same for cuda-python."""
    return _command(BINDINGS, major)
