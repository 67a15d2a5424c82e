"""Data: read it, check it, split it; and cut documents into passages."""

from onebase.data.load import load
from onebase.data.passages import Passage, split_passages
from onebase.data.rows import Data, Rows

__all__ = ["load", "Data", "Rows", "split_passages", "Passage"]
