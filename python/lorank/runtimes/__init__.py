"""The runtimes that load adapters: their rules, verdicts about adapters, and the profile that suits them."""

from lorank.runtimes.mending import Mended, bad, mend
from lorank.runtimes.rules import RUNTIMES
from lorank.runtimes.verdicts import Verdict, check, right_profile

__all__ = ["RUNTIMES", "Mended", "Verdict", "bad", "check", "mend", "right_profile"]
