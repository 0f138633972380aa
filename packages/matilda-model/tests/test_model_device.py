"""What the machine offers, and lacks."""

from __future__ import annotations

import getpass
import pwd

import pytest

from matilda_model.device import name_user


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    name = getpass.getuser()
    name_user()
    assert getpass.getuser() == name

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("USER", "")  # so that what is set here is undone
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    name_user()
    assert getpass.getuser().startswith("uid-")
