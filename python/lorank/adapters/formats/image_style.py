"""The spelling of an image adapter's keys and metadata, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorank.adapters.formats.diffusers_settings import PartSettings


@dataclass(frozen=True, slots=True)
class ImageStyle:
    """The spelling of an image adapter's keys and metadata.

    Attributes
    ----------
    keys
        The keys of B and A by module.
    metadata
        The text entries of the file's header.
    settings
        PEFT's settings in the metadata, as diffusers writes them.
    has_alphas
        True if modules have alphas, under the usual key ``<module>.alpha``.
    """

    keys: Mapping[str, tuple[str, str]] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    settings: PartSettings
    has_alphas: bool
