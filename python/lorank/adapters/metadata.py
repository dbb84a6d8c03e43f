"""Names of the entries and files that lorank adds to an adapter."""

SPECTRAL_KEY = "lorank.spectral"
"""Metadata key of a file whose factors are in balanced spectral form."""

RANKS_KEY = "lorank.ranks"
"""Metadata key of the true rank of every module, as JSON, in a file with padded ranks."""

DIGEST_KEY = "lorank.digest"
"""Metadata key of the digest of a file's tensors, ranks, scalings and other entries of lorank."""

CERTIFICATE_KEY = "lorank.certificate"
"""Metadata key of the certificate, as JSON, in an image adapter's file."""

CERTIFICATE_FILE = "lorank.json"
"""Name of the file with the certificate in a PEFT adapter's folder."""
