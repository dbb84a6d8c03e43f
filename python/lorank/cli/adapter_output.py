"""The files and tables of a command that writes an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.profiles import PROFILES
from lorank.adapters.writing import write_adapter
from lorank.cli.checks import check_choice, check_new, check_output_folder
from lorank.cli.output import console, print_json, print_message
from lorank.cli.spelling import as_options
from lorank.cli.tables import adapters as tables
from lorank.cli.tables.ranks import rank_map


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """The options that select how an adapter is written and shown.

    Attributes
    ----------
    path
        Folder or ``.safetensors`` file to write.
    profile
        Form of the files.
    dtype
        Type of the factors; None to keep their types.
    overwrite
        True to replace existing files.
    threads
        Largest number of threads; None for all processors.
    as_json
        True to print JSON instead of tables.
    modules
        True to show a row for each module.
    """

    path: Path
    profile: str
    dtype: str | None
    overwrite: bool
    threads: int | None
    as_json: bool
    modules: bool

    def check(self) -> None:
        """Check the options before any work.

        Raises
        ------
        UsageError
            If an option is wrong, or files exist that must not be replaced.
        OSError
            If the folder cannot be written to.
        """
        check_form(self.profile, self.dtype)
        check_output(self.path, self.overwrite)

    def write(self, adapter: AdapterContent) -> None:
        """Write an adapter with a certificate, and print its ranks and errors."""
        written = write_adapter(
            adapter,
            self.path,
            cast(Profile, self.profile),
            self.dtype,
            overwrite=self.overwrite,
            threads=self.threads,
        )
        certificate = written.certificate
        assert certificate is not None
        if self.as_json:
            content = adapter_json(adapter.with_certificate(certificate), self.dtype)
            print_json({**content, "profile": self.profile, "stored_parameters": written.stored_parameters})
            return
        terminal = console()
        terminal.print(rank_map(adapter.ranks, "ranks", terminal.width))
        if self.modules:
            terminal.print(tables.kept_table(certificate))
        terminal.print(tables.certificate_table(certificate))
        for note in adapter.notes:
            terminal.print(as_options(note), style="dim", soft_wrap=True)
        print_notes(written.notes)
        print_message(f"saved to {written.path}")


def check_form(profile: str, dtype: str | None) -> None:
    """Raise UsageError for an unknown profile or type."""
    check_choice("--profile", profile, PROFILES)
    if dtype is not None:
        check_choice("--dtype", dtype, get_args(Dtype))


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UsageError if an adapter exists at a path and must not be replaced."""
    if path.suffix in (".safetensors", ".gguf"):
        check_new(path, overwrite)
    else:
        check_output_folder(path, overwrite)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes of the library to standard error."""
    for note in notes:
        print_message(as_options(note))


def adapter_json(adapter: AdapterContent, dtype: str | None = None) -> dict[str, Any]:
    """Return an adapter without its factors as JSON values.

    Parameters
    ----------
    adapter
        The adapter.
    dtype
        Type of the written factors; None to keep their types.
    """
    return {
        "label": adapter.label,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "num_parameters": adapter.num_parameters,
        "notes": list(adapter.notes),
        "modules": [
            {
                "name": module.name,
                "kind": module.kind,
                "shape": list(module.shape),
                "rank": module.rank,
                "scaling": module.scaling,
                "dtype": dtype or module.dtype,
                "copies": module.copies,
            }
            for module in adapter.modules.values()
        ],
        "certificate": adapter.certificate.to_json() if adapter.certificate else None,
    }
