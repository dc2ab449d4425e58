"""Certificates in files, and their checker, which shares nothing with what bounds networks elsewhere.

In: a file that `verify(..., certificate=path)` wrote, and the network. Out: what is proved, or the first leaf that
fails. `files` is the format, `layers` and `reading` what a network is here, `bounding` the arithmetic. It imports
`Property`, `Model` and `Box`, and nothing of `graph`, `relaxations`, `driver` or `methods`.
"""

from jaxbound.certificates.proofs.checking import Proof, check_certificate
from jaxbound.certificates.proofs.files import Certificate, save
from jaxbound.certificates.proofs.reading import read

__all__ = ["Certificate", "Proof", "check_certificate", "read", "save"]
