"""Adapters as small, versioned, verified folders, and the digests that tie them to a base."""

from onebase.store.bases import base_folder, remember_base
from onebase.store.card import render_card
from onebase.store.difference import Difference
from onebase.store.fingerprint import digest_config, digest_tokenizer, fingerprint_model
from onebase.store.garbage import Garbage
from onebase.store.schema import AdapterConfig
from onebase.store.store import Store
from onebase.store.stored import Stored, Version

__all__ = [
    "AdapterConfig",
    "Difference",
    "Garbage",
    "Store",
    "Stored",
    "Version",
    "base_folder",
    "digest_config",
    "digest_tokenizer",
    "fingerprint_model",
    "remember_base",
    "render_card",
]
