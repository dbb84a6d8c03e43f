"""Adapters, certificates and families as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from lorank._internal.printable import printable_name
from lorank._internal.short_text import counted, spanned
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent
from lorank.cli.tables.layout import titled_table


def module_table(adapter: AdapterContent) -> Table:
    """Return a table with a row for each module."""
    table = titled_table(f"{adapter.label}: {counted(len(adapter.modules), 'module')}")
    table.add_column("module", overflow="fold")
    for heading in ("kind", "shape", "rank", "scaling", "type"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in adapter.modules.values():
        copies = f"{module.copies} x " if module.copies > 1 else ""
        shape = f"{copies}{module.shape[0]}x{module.shape[1]}"
        table.add_row(
            printable_name(module.name),
            module.kind,
            shape,
            str(module.rank),
            f"{module.scaling:.4g}",
            module.dtype,
        )
    return table


def summary(adapter: AdapterContent) -> list[str]:
    """Return lines with the ranks, scalings, parameters, base model and notes of an adapter."""
    ranks = [module.rank for module in adapter.adapted]
    scalings = sorted({module.scaling for module in adapter.adapted})
    span = f"{scalings[0]:.4g}" + (f" to {scalings[-1]:.4g}" if len(scalings) > 1 else "")
    dtypes = ", ".join(sorted({module.dtype for module in adapter.adapted}))
    lines = [
        f"{counted(len(ranks), 'module')}, {spanned(ranks, 'rank')}, "
        f"average {sum(ranks) / len(ranks):.2f}, scalings {span}: "
        f"{counted(adapter.num_parameters, 'parameter')} in {dtypes}",
    ]
    if adapter.base_model:
        lines.append(f"base model: {adapter.base_model}")
    if adapter.is_spectral:
        lines.append(
            "elastic: the adapter is in spectral form, and can be cut to any budget without a decomposition"
        )
    return [*lines, *adapter.notes]


def certificate_table(certificate: Certificate) -> Table:
    """Return a table with the parameters before and after, the energy retained, and the errors."""
    table = titled_table(certificate.action, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    before, after = certificate.parameters_before, certificate.parameters_after
    table.add_row("parameters before", f"{before:,}")
    table.add_row("parameters after", f"{after:,} ({100 * after / before if before else 0:.3g} %)")
    table.add_row("energy retained", f"{100 * certificate.retained_energy:.4f} %")
    table.add_row("error, Frobenius norm", f"{certificate.error:.6g} of {certificate.norm:.6g}")
    table.add_row("error, spectral norm", f"{certificate.spectral_error:.6g}")
    if certificate.rounding_error is not None:
        table.add_row("added by rounding, Frobenius norm", f"{certificate.rounding_error:.6g}")
    return table


def kept_table(certificate: Certificate) -> Table:
    """Return a table with the rank, parameters, energy and error of each module."""
    table = titled_table(f"{counted(len(certificate.modules), 'module')}, before -> after")
    table.add_column("module", overflow="fold")
    for heading in ("rank", "parameters", "energy retained", "error, Frobenius norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in certificate.modules:
        table.add_row(
            printable_name(entry.name),
            f"{entry.rank_before} -> {entry.rank_after}",
            f"{entry.parameters_before:,} -> {entry.parameters_after:,}",
            f"{100 * entry.retained_energy:.4f} %",
            f"{entry.error:.4g}",
        )
    return table


def family_table(members: Mapping[str, AdapterContent]) -> Table:
    """Return a table with a row for each member of a family."""
    table = titled_table("family")
    table.add_column("member")
    for heading in ("modules", "parameters", "energy retained", "relative error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, member in members.items():
        certificate = member.certificate
        assert certificate is not None
        table.add_row(
            printable_name(name),
            str(len(member.adapted)),
            f"{member.num_parameters:,}",
            f"{100 * certificate.retained_energy:.4f} %",
            f"{certificate.relative_error:.4g}",
        )
    return table
