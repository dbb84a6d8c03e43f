"""The runtimes that serve adapters: what each does with one, and the profile that suits them."""

from lorank.runtimes.rules import RUNTIMES
from lorank.runtimes.verdicts import Verdict, check, right_profile

__all__ = ["RUNTIMES", "Verdict", "check", "right_profile"]
