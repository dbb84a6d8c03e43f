"""Digests that bind a certificate, and the flag of spectral form, to the factors beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lorank._internal.threads import thread_count
from lorank.adapters.metadata import CERTIFICATE_KEY, DIGEST_KEY, RANKS_KEY, SPECTRAL_KEY
from lorank.adapters.tensors import Tensors

DIGEST_FIELD = "digest"
"""The field of `lorank.json` that binds the certificate to the factors."""


def seed(metadata: Mapping[str, str], modules: Iterable[tuple[str, int, float]]) -> bytes:
    """Return the bytes that the digest of a file covers in addition to its tensors.

    Parameters
    ----------
    metadata
        The metadata of the file.
    modules
        Name, stored rank and scaling of every module.
    """
    entries = {key: metadata[key] for key in (SPECTRAL_KEY, RANKS_KEY, CERTIFICATE_KEY) if key in metadata}
    # A scaling that is read may differ in the last bit from the scaling that was written.
    rows = sorted((name, rank, f"{scaling:.9g}") for name, rank, scaling in modules)
    return json.dumps([entries, rows], sort_keys=True).encode()


def fits(tensors: Tensors, seed: bytes) -> bool | None:
    """Return True if a file's tensors have the digest in its metadata; None if it has no digest."""
    stated = tensors.metadata.get(DIGEST_KEY)
    return None if stated is None else tensors.digest(seed, thread_count(None)) == stated


def canonical(content: Mapping[str, Any]) -> str:
    """Return a certificate's JSON values as text that does not depend on their order or layout."""
    return json.dumps({key: value for key, value in content.items() if key != DIGEST_FIELD}, sort_keys=True)


def certificate_digest(canonical: str, file_digest: str) -> str:
    """Return the digest of a certificate's canonical text and of the file of factors that it belongs to."""
    return hashlib.blake2b((canonical + file_digest).encode(), digest_size=16).hexdigest()


def is_bound(content: Mapping[str, Any], file_digest: str) -> bool:
    """Return True if a certificate's JSON values belong to the file of factors with a digest."""
    return content.get(DIGEST_FIELD) == certificate_digest(canonical(content), file_digest)
