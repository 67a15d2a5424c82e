"""Where things are in a base: family rows, the anatomy they resolve to, and the attention function."""

from onebase.anatomy.anatomy import Anatomy, dissect
from onebase.anatomy.families import FAMILIES

__all__ = ["FAMILIES", "Anatomy", "dissect"]
