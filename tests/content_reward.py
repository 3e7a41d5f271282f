"""A reward that differs from text to text, so that every step moves the weights."""

from typing import Any


def content(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) % 97 / 97 for ids in completion_ids]
