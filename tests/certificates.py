"""Certificates, made by openssl for one test: nobody else knows their authorities."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """A certificate that is its own authority."""

    file: Path
    key: Path


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in a folder; skips at home where there is none."""
    program = shutil.which("openssl")
    if program is None:
        assert "CI" not in os.environ, "openssl is missing: apt-get install openssl"
        pytest.skip("openssl, which makes the certificates, is missing here")
    subprocess.run([program, *arguments], cwd=folder, check=True, capture_output=True)


def signed_by_itself(folder: Path, names: str = "IP:127.0.0.1") -> Certificate:
    """A certificate for these names, by default for the loopback interface."""
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    openssl(
        folder, "req", "-x509", *NEW_KEY, "-days", "2", "-subj", "/CN=vidgen-test",
        "-addext", f"subjectAltName={names}", "-out", str(made.file), "-keyout", str(made.key),
    )  # fmt: skip
    return made
