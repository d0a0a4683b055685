"""What the values of command-line options are read by; each raises ArgumentTypeError or ValueError, which argparse
turns into one line."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def amount(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected zero or more, got {text}")
    return value


def seconds(text: str) -> float:
    """A time of one second and more."""
    value = amount(text)
    if value < 1.0:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 240:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 240, got {value}")
    return value


def size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, got {text}")
    return int(width), int(height)


def words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
