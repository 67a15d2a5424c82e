"""The demo: reviews that ship with the package, four adapters on one frozen base, and one mixed batch."""

from onebase.demo.run import NAMES, REVIEWS, run_demo

__all__ = ["NAMES", "REVIEWS", "run_demo"]
