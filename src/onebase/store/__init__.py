"""Adapters as small, versioned, verified folders, and the digests that tie them to a base."""

from onebase.store.card import render_card
from onebase.store.fingerprint import digest_config, digest_tokenizer, fingerprint_model
from onebase.store.schema import AdapterConfig
from onebase.store.store import Store
from onebase.store.stored import Stored, Version

__all__ = [
    "AdapterConfig",
    "Store",
    "Stored",
    "Version",
    "digest_config",
    "digest_tokenizer",
    "fingerprint_model",
    "render_card",
]
