"""Names of the entries and files that lorank adds to an adapter."""

SPECTRAL_KEY = "lorank.spectral"
"""Metadata of a file whose factors are in balanced spectral form."""

RANKS_KEY = "lorank.ranks"
"""Metadata of a file with padded ranks: the true rank of every module, as JSON."""

CERTIFICATE_KEY = "lorank.certificate"
"""Metadata of an image adapter's file: the certificate, as JSON."""

CERTIFICATE_FILE = "lorank.json"
"""The file with the certificate, in the folder of a PEFT adapter."""
