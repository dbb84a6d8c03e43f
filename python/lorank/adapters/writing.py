"""Writes an adapter: factors, settings and a card, all of them or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, cast, get_args

from lorank import _core
from lorank._internal.regular_files import read_bytes
from lorank._internal.staging import is_occupied, staged_folder
from lorank._internal.threads import thread_count
from lorank.adapters import binding, card, families, rounding
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.formats import padding
from lorank.adapters.formats.base import AdapterFormat, Place, WrittenTensor
from lorank.adapters.formats.registry import format_of
from lorank.adapters.metadata import CERTIFICATE_FILE, DIGEST_KEY, SPECTRAL_KEY
from lorank.adapters.profiles import PROFILES, WrittenRank
from lorank.adapters.written_tensors import written_tensors
from lorank.peft_format.names import CONFIG_FILE, PICKLED_WEIGHTS_FILE

# No program reads an adapter's folder without this file.
_HEADS = (CONFIG_FILE,)

# Larger cards are those of other programs.
_LARGEST_CARD = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """The result of writing an adapter.

    Attributes
    ----------
    path
        The file of the factors.
    address
        The path to read the adapter from.
    certificate
        The adapter's certificate, with the error that rounding the factors added.
    stored_parameters
        Number of parameters of the written factors, including the zeros of padded ranks.
    notes
        Remarks on files that were kept, on rounding without a certificate, and on the cost of padding.
    """

    path: Path
    address: Path
    certificate: Certificate | None
    stored_parameters: int
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Job:
    """An adapter to write, with the format and the place of its files."""

    adapter: AdapterContent
    format: AdapterFormat
    profile: Profile
    dtype: Dtype | None
    ranks: Mapping[str, WrittenRank]
    keys: Mapping[str, tuple[str, str]]
    place: Place
    threads: int

    @classmethod
    def of(
        cls, adapter: AdapterContent, target: Path, profile: Profile, dtype: Any, threads: int | None
    ) -> _Job:
        count = thread_count(threads)
        checked = _checked_dtype(dtype)
        form = format_of(adapter)
        ranks = form.written_ranks(adapter, profile)
        keys = form.keys(adapter, ranks)
        place = form.place(target)
        if place.is_alone and target.is_symlink():
            file = Path(os.path.realpath(target))
            place = replace(place, folder=file.parent, weights=file.name)
        return cls(adapter, form, profile, checked, ranks, keys, place, count)

    @property
    def weights(self) -> Path:
        return self.place.folder / self.place.weights

    @property
    def stale(self) -> Sequence[str]:
        """Files of an earlier adapter, which must not contradict this one."""
        return () if self.place.is_alone else (PICKLED_WEIGHTS_FILE, CERTIFICATE_FILE)

    @property
    def stored_parameters(self) -> int:
        return sum(entry.rank * self.adapter.modules[name].cost for name, entry in self.ranks.items())


def write_adapter(
    adapter: AdapterContent,
    target: Path,
    profile: Profile,
    dtype: Any,
    *,
    overwrite: bool,
    threads: int | None = None,
) -> Written:
    """Write an adapter; see `LoraAdapter.save`."""
    job = _Job.of(adapter, target.expanduser(), profile, dtype, threads)
    _check_target(job, overwrite)
    with staged_folder(job.place.folder, job.stale, _HEADS, replaces=overwrite) as staging:
        return _write(job, staging)


def write_family(
    members: Mapping[str, AdapterContent],
    folder: Path,
    profile: Profile,
    dtype: Any,
    *,
    overwrite: bool,
    threads: int | None = None,
) -> tuple[dict[str, Written], list[str]]:
    """Write several adapters into one folder, all of them or none.

    Parameters
    ----------
    members
        The adapters by name.
    folder
        The folder of the family.
    profile, dtype, overwrite, threads
        As in `write_adapter`.

    Returns
    -------
    tuple
        The results of writing by name, and notes on members of an earlier family that were kept.

    Raises
    ------
    FileExistsError
        If `overwrite` is false and files exist, or a member to replace was trained since it was written.
    """
    folder = folder.expanduser()
    jobs = {
        name: _Job.of(member, folder / format_of(member).member_name(name), profile, dtype, threads)
        for name, member in members.items()
    }
    for job in jobs.values():
        _check_target(job, overwrite)
    families.check_replaceable(folder, members)
    stale, notes = families.stale_members(folder, members)
    inner = {name: os.path.relpath(job.place.folder, folder) for name, job in jobs.items()}
    stale += [str(Path(inner[name], file)) for name, job in jobs.items() for file in job.stale]
    written = {}
    with staged_folder(folder, stale, _HEADS, replaces=overwrite) as staging:
        for name, job in jobs.items():
            (staging / inner[name]).mkdir(exist_ok=True)
            written[name] = _write(job, staging / inner[name])
    return written, notes


@contextmanager
def drafted(
    adapter: AdapterContent, target: Path, *, overwrite: bool
) -> Iterator[tuple[Callable[[Profile], Written], Path]]:
    """Yield a function that writes a draft of an adapter in a profile, and the path of the draft.

    The last draft appears at the target when the block ends without an error.
    """
    jobs = {profile: _Job.of(adapter, target.expanduser(), profile, None, None) for profile in PROFILES}
    job = jobs[PROFILES[0]]
    _check_target(job, overwrite)
    with staged_folder(job.place.folder, job.stale, _HEADS, replaces=overwrite) as staging:

        def write(profile: Profile) -> Written:
            for file in staging.iterdir():
                file.unlink()
            return _write(jobs[profile], staging)

        yield write, staging / job.place.weights if job.place.is_alone else staging


def _write(job: _Job, staging: Path) -> Written:
    """Write the files of an adapter into a staging folder."""
    _core.check_thread_memory()
    with ThreadPoolExecutor(1) as background:
        rounded = rounding.rounded_types(job.adapter, job.ranks, job.dtype)
        tensors = written_tensors(job.adapter, job.format, job.ranks, job.keys, job.dtype)
        # Another thread writes the texts while the core writes the factors. The texts begin after this
        # thread's own work in Python, which they would delay. The certificate is written when the digest of
        # the factors is known, and the card when the rounding error is known, if there is one.
        begin = Event()
        texts = background.submit(_write_texts, job, staging, begin, with_card=not rounded)
        draft = background.submit(_draft, job, job.adapter.certificate)
        begin.set()
        certificate, digest, notes = _write_weights(job, staging, tensors, rounded)
        notes += texts.result()
        if rounded:
            notes += _write_card(job, staging, certificate)
        drafted = draft.result() if certificate == job.adapter.certificate else _draft(job, certificate)
        if drafted is not None:
            (staging / CERTIFICATE_FILE).write_text(drafted.bound(digest), "utf-8")
    notes += _padding_note(job)
    return Written(job.weights, job.place.address, certificate, job.stored_parameters, notes)


def _checked_dtype(dtype: Any) -> Dtype | None:
    """Return the name of an element type that is given as a name or a torch dtype."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, not {dtype!r}")
    return cast("Dtype | None", name)


def _check_target(job: _Job, overwrite: bool) -> None:
    folder, is_alone = job.place.folder, job.place.is_alone
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file, not a folder")
    if is_alone and job.weights.exists() and not job.weights.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(job.weights))
    if overwrite or not folder.exists():
        return
    if is_alone and job.weights.exists():
        raise FileExistsError(f"{job.weights}: exists (overwrite replaces it)")
    if not is_alone and is_occupied(folder):
        raise FileExistsError(f"{folder}: is not empty (overwrite replaces the adapter in it)")


def _write_weights(
    job: _Job, staging: Path, tensors: list[WrittenTensor], rounded: Mapping[str, str]
) -> tuple[Certificate | None, str, list[str]]:
    """Write the factors; return the certificate with the rounding error, the digest, and notes."""
    file = staging / job.place.weights
    before = job.adapter.certificate
    digest = _sealed(job, file, tensors, before)
    added = rounding.added(job.adapter, job.format, job.ranks, job.keys, file, rounded)
    if added is None:
        return before, digest, []
    if before is None:
        return None, digest, [rounding.note(job.adapter, added)] if added else []
    certificate = before.with_rounding(added)
    if job.format.rewrites_certificate:
        digest = _sealed(job, file, tensors, certificate)
    return certificate, digest, []


def _sealed(job: _Job, file: Path, tensors: list[WrittenTensor], certificate: Certificate | None) -> str:
    """Write the file of factors with a digest in its metadata; return the digest."""
    metadata = _metadata(job, certificate)
    # The scaling in the file undoes the factor of B.
    modules = job.adapter.modules
    rows = [(name, entry.rank, entry.scaling(modules[name])) for name, entry in job.ranks.items()]
    seal = (DIGEST_KEY, binding.seed(metadata, rows))
    return job.format.write(file, tensors, metadata, job.threads, seal)


def _metadata(job: _Job, certificate: Certificate | None) -> dict[str, str]:
    metadata = {"format": job.format.library} | padding.metadata(job.adapter, job.ranks)
    metadata |= {SPECTRAL_KEY: "1"} if job.adapter.is_spectral else {}
    return metadata | job.format.metadata(job.adapter, job.ranks, certificate)


def _write_texts(job: _Job, staging: Path, begin: Event, *, with_card: bool) -> list[str]:
    """Write the files that do not depend on the rounding of factors; return notes."""
    begin.wait(timeout=1.0)  # An interrupt may come before the event is set.
    for name, text in job.format.settings_files(job.adapter, job.profile).items():
        (staging / name).write_text(text, "utf-8")
    return _write_card(job, staging, job.adapter.certificate) if with_card else []


def _write_card(job: _Job, staging: Path, certificate: Certificate | None) -> list[str]:
    """Write the card, unless another program wrote the present one; return notes."""
    if job.place.is_alone:
        return []
    file = job.place.folder / "README.md"
    if os.path.lexists(file) and not _is_our_card(file):
        return [f"{file} was kept, because lorank did not write it"]
    text = card.text(job.adapter, job.format, job.profile, certificate, job.stored_parameters)
    (staging / "README.md").write_text(text, "utf-8")
    return []


def _is_our_card(file: Path) -> bool:
    """Return True for a card that lorank wrote; pipes, devices and large files belong to other programs."""
    with suppress(OSError):
        return card.is_ours(read_bytes(file, _LARGEST_CARD).decode("utf-8", errors="replace"))
    return False


@dataclass(frozen=True, slots=True)
class _Draft:
    """The text of a certificate, and the text that its digest covers."""

    text: str
    canonical: str

    def bound(self, file_digest: str) -> str:
        """Return the text with a digest that binds the certificate to the written factors."""
        digest = binding.certificate_digest(self.canonical, file_digest)
        return self.text.replace(_entry(_NO_DIGEST), _entry(digest), 1)


_NO_DIGEST = "?"


def _entry(digest: str) -> str:
    return f'"{binding.DIGEST_FIELD}": "{digest}"'


def _draft(job: _Job, certificate: Certificate | None) -> _Draft | None:
    """Return the text of the certificate's file; None if no such file is written."""
    if job.place.is_alone or certificate is None:
        return None
    notes = list(job.adapter.notes)
    text = certificate.to_text(notes, **{binding.DIGEST_FIELD: _NO_DIGEST})
    return _Draft(text, binding.canonical({**certificate.to_json(), "notes": notes}))


def _padding_note(job: _Job) -> list[str]:
    """Return a note with the number of stored parameters, if ranks are padded."""
    adapter, stored = job.adapter, job.stored_parameters
    if stored == adapter.num_parameters:
        return []
    largest = max(entry.rank for entry in job.ranks.values())
    note = f"{job.profile}: {stored:,} parameters are stored, because ranks are padded with zeros"
    before = adapter.certificate.parameters_before if adapter.certificate else adapter.num_parameters
    if job.profile == "portable" and stored >= before:
        note += f" to {largest}; this saves nothing: bound the largest rank by max_rank"
    return [note]
