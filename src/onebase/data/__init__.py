"""Data: read it, check it, split it; and cut documents into passages."""

from onebase.data.kinds import KINDS, ROLES
from onebase.data.load import load
from onebase.data.passages import Passage, split_passages
from onebase.data.rows import Data, Rows
from onebase.data.values import Answer, Marked

__all__ = ["load", "Data", "Rows", "Answer", "Marked", "KINDS", "ROLES", "split_passages", "Passage"]
