"""Statements of a file about its own factors, which are verified when they are first used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from lorank._core import FormatError
from lorank.adapters import binding
from lorank.adapters.certificate import Certificate
from lorank.adapters.metadata import DIGEST_KEY, SPECTRAL_KEY
from lorank.adapters.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Verified:
    """The statements of a file that its digest confirms.

    Attributes
    ----------
    certificate
        The certificate; None if there is none, or it does not belong to the factors.
    is_spectral
        True if the factors are as lorank wrote them, in balanced spectral form.
    notes
        Remarks on the adapter, including the reason why a statement was ignored.
    """

    certificate: Certificate | None
    is_spectral: bool
    notes: Sequence[str]


@dataclass(slots=True)
class Claims:
    """The certificate and the flag of spectral form, as a file states them.

    Attributes
    ----------
    tensors
        The tensors of the file.
    seed
        The bytes that the file's digest covers in addition to the tensors.
    notes
        Remarks on the adapter that do not depend on the certificate.
    certificate
        The certificate, which fits the adapter's ranks; None if there is none.
    content
        The certificate's JSON values.
    place
        The name of the file or of the metadata entry that holds the certificate.
    is_in_file
        True if the certificate is an entry of the file's metadata, so that the file's digest covers it.
    """

    tensors: Tensors
    seed: bytes
    notes: Sequence[str]
    certificate: Certificate | None
    content: Any
    place: str
    is_in_file: bool
    _lock: Lock = field(default_factory=Lock)
    _verified: Verified | None = None

    def verified(self) -> Verified:
        """Compare the digest with the factors, once; return what it confirms."""
        with self._lock:
            if self._verified is None:
                self._verified = self._compared()
            return self._verified

    def _compared(self) -> Verified:
        reason = self._mismatch()
        if reason is None and self.certificate is not None and not self._is_bound():
            note = f"{self.place} was ignored: it belongs to other factors"
            return Verified(None, True, [*self.notes, note])
        if reason is None:
            return Verified(self.certificate, True, list(dict.fromkeys([*self._own_notes(), *self.notes])))
        what = self.place if self.certificate is not None else f"metadata {SPECTRAL_KEY}"
        return Verified(None, False, [*self.notes, f"{what} was ignored: {reason}"])

    def _mismatch(self) -> str | None:
        """Return the reason why the factors are not as lorank wrote them; None if they are."""
        try:
            fits = binding.fits(self.tensors, self.seed)
        except (FormatError, OSError) as error:
            return f"the factors cannot be compared with it: {error}"
        if fits is None:
            return f"the metadata have no {DIGEST_KEY} that binds it to the factors"
        return None if fits else "the factors or their scales changed since it was written"

    def _is_bound(self) -> bool:
        return self.is_in_file or binding.is_bound(self.content, self.tensors.metadata[DIGEST_KEY])

    def _own_notes(self) -> list[str]:
        """Return the notes that the certificate holds."""
        found = self.content.get("notes") if self.certificate is not None else None
        return [note for note in found if isinstance(note, str)] if isinstance(found, list) else []
