"""The identities of one installation: who may come to the bus and the store, in a folder that only its owner sees.

`identities.json` is what is known of them, with the store's keys; of the bus only public keys. From it are written
`users.conf` for nats-server and `s3.json` for SeaweedFS, and once, when its keys are made, `NAME.env` for the process
that has the identity; of that only the bucket is written anew.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pydantic

from vidgen import credentials, errors, permissions, topology
from vidgen.permissions import Role

PUBLISHER, ADMIN = "publisher", "admin"
KINDS = (*permissions.ROLES, PUBLISHER, ADMIN)
NAME = re.compile(rf"(?P<kind>{'|'.join(KINDS)})(\.(?P<label>[a-z0-9][a-z0-9-]{{0,31}}))?")
ACCOUNT = "VIDGEN"
OWNER = "owner"  # of a stack on one machine
BOOK, USERS, STORE = "identities.json", "users.conf", "s3.json"
BUCKET_VARIABLE = "VIDGEN_S3_BUCKET="
BUCKET = "vidgen"  # of whoever names none, in the settings, too


class StoreKey(pydantic.BaseModel):
    """A pair of keys of the store."""

    access_key: str
    secret_key: str


class Identity(pydantic.BaseModel):
    """One who comes to the bus, to the store, or to both; the newest of its keys is the first."""

    name: str
    nkeys: tuple[str, ...] = ()
    store_keys: tuple[StoreKey, ...] = ()

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tenant(self) -> str:
        """Whose requests a publisher publishes."""
        return self.name.partition(".")[2] or "default"

    @property
    def role(self) -> Role | None:
        """What it may do, of those whose rights `permissions` knows; publishers and admins are not among them."""
        return next((role for role in permissions.ROLES if role == self.kind), None)


class _Book(pydantic.BaseModel):
    bucket: str = BUCKET
    identities: dict[str, Identity] = {}


class DamagedError(errors.VidgenError):
    """What is known of the identities cannot be read."""

    code = "identities_damaged"


class NoIdentitiesError(errors.NotFoundError):
    """There are no identities in a folder."""

    code = "identities_missing"


class UnknownIdentityError(errors.NotFoundError):
    """There is no such identity."""

    code = "identity_unknown"


def require(folder: Path) -> None:
    """Raise NoIdentitiesError where there is no book: a name that was mistyped is not to become another folder."""
    if not (folder / BOOK).exists():
        raise NoIdentitiesError(f"there are no identities in {folder}: `vidgen identities init {folder}` makes them")


def _read(path: Path) -> _Book:
    try:
        return _Book.model_validate_json(path.read_bytes()) if path.exists() else _Book()
    except pydantic.ValidationError:  # its words show what it read, keys of the store among it
        remedy = "restore it from a backup, or delete it and have all identities made anew"
        raise DamagedError(f"{path} is damaged: {remedy}") from None


class Identities:
    """The identities in a folder; each change writes what the servers read.

    A `bucket` that is named takes the place of the one for which the keys of the store were good before.
    """

    def __init__(self, folder: Path, bucket: str | None = None) -> None:
        self._folder = folder
        known = _read(folder / BOOK)
        self._bucket_before = known.bucket
        self._book = known.model_copy(update={"bucket": bucket}) if bucket else known

    def __iter__(self) -> Iterator[Identity]:
        return iter(self._book.identities.values())

    def complete(self) -> list[str]:
        """Add each role's identity that is missing, and write what servers read anew; the names of those added."""
        missing = [role for role in permissions.ROLES if role not in self._book.identities]
        for role in missing:
            self._renew(role)
        self._write()
        self._name_bucket()
        return list(missing)

    def add(self, name: str) -> None:
        """Add an identity: a role's second one (`worker.acme`), a tenant's `publisher.acme`, or `admin`.

        Raises RejectedError for a name that is none, ConflictError for one that is there.
        """
        found = NAME.fullmatch(name)
        if found is None or (found["kind"] == PUBLISHER and not found["label"]):
            kinds = ", ".join(permissions.ROLES)
            raise errors.RejectedError(
                f"{name!r} is no name of an identity: use {kinds} or admin, with .LABEL for a second one, or "
                "publisher.TENANT",
                code="bad_name",
            )
        if name in self._book.identities:
            raise errors.ConflictError(f"there is an identity {name}: rotate its keys instead")
        self._renew(name)
        self._write()

    def rotate(self, name: str) -> None:
        """Give an identity new keys beside those that it has; those stay good until `retire`."""
        self._known(name)
        self._renew(name)
        self._write()

    def retire(self, name: str) -> int:
        """Forget all keys of an identity but the newest; how many were forgotten."""
        known = self._known(name)
        self._keep(known.model_copy(update={"nkeys": known.nkeys[:1], "store_keys": known.store_keys[:1]}))
        self._write()
        return max(len(known.nkeys), len(known.store_keys)) - 1

    def remove(self, name: str) -> None:
        """Shut an identity out."""
        del self._book.identities[self._known(name).name]
        self.env_file(name).unlink(missing_ok=True)
        self._write()

    def env_file(self, name: str) -> Path:
        """Where the variables are that a process of this identity is given."""
        return self._folder / f"{name}.env"

    def environment(self, name: str) -> dict[str, str]:
        """Those variables."""
        lines = self.env_file(name).read_text("utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    def _known(self, name: str) -> Identity:
        try:
            return self._book.identities[name]
        except KeyError:
            raise UnknownIdentityError(f"there is no identity {name}") from None

    def _keep(self, identity: Identity) -> None:
        self._book.identities[identity.name] = identity

    def _renew(self, name: str) -> None:
        known = self._book.identities.get(name) or Identity(name=name)
        seed = credentials.make_seed()
        lines = [f"# {name}: for the process that has this identity, and nobody else.", f"{credentials.VARIABLE}{seed}"]
        known = known.model_copy(update={"nkeys": (credentials.public_key(seed), *known.nkeys)})
        if _actions(known, self._book.bucket):
            pair = StoreKey(access_key=secrets.token_hex(10), secret_key=secrets.token_hex(24))
            lines += [f"VIDGEN_S3_ACCESS_KEY={pair.access_key}", f"VIDGEN_S3_SECRET_KEY={pair.secret_key}"]
            lines += _bucket_line(self._book.bucket)
            known = known.model_copy(update={"store_keys": (pair, *known.store_keys)})
        self._make_folder()
        write_private(self.env_file(name), "\n".join([*lines, ""]))
        self._keep(known)

    def _name_bucket(self) -> None:
        """Have the files of all who have keys of the store name its bucket; a line that is not ours stays."""
        ours = _bucket_line(self._bucket_before)
        for path in (self.env_file(one.name) for one in self if one.store_keys):
            if not path.exists():
                continue
            lines = path.read_text("utf-8").splitlines()
            fresh = [line for line in lines if line not in ours]
            if not any(line.startswith(BUCKET_VARIABLE) for line in fresh):
                fresh += _bucket_line(self._book.bucket)
            if fresh != lines:
                write_private(path, "\n".join([*fresh, ""]))

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)

    def _write(self) -> None:
        self._make_folder()
        write_private(self._folder / BOOK, self._book.model_dump_json(indent=2))
        known = tuple(self)
        for name, text in ((USERS, users_conf(known)), (STORE, s3_json(known, self._book.bucket))):
            path = self._folder / name
            # In place, for a container has this very file mounted, and readable, for servers there are other users;
            # to everybody else the folder is closed.
            path.write_text(text, "utf-8")
            path.chmod(0o644)


def _bucket_line(bucket: str) -> list[str]:
    # Without --bucket a deployment may name it for all: on Kubernetes this line would win over that one.
    return [] if bucket == BUCKET else [f"{BUCKET_VARIABLE}{bucket}"]


# ── nats-server ──────────────────────────────────────────────────────────────────────────────────────────────────


def users_conf(identities: Sequence[Identity]) -> str:
    """Who may come to the bus, for nats-server; stands beside the folder `roles`.

    A tenant's publisher is in an account of its own: where it asks to be answered on a subject that it may not publish
    on, the server would, in its own account, put the answer there for it.
    """
    publishers = [one for one in identities if one.kind == PUBLISHER]
    inside = [one for one in identities if one.kind != PUBLISHER]
    lines = ["# Written by `vidgen identities`. Public keys; the seeds are with those who have them.", "accounts {"]
    lines += [f"  {ACCOUNT}: {{", "    jetstream: enabled", "    users: ["]
    lines += [f"      {_user(one, key)}" for one in inside for key in one.nkeys] + ["    ]", "    exports: ["]
    for one in publishers:
        subject = topology.subject_of_requests(one.tenant)
        lines.append(f'      {{ service: "{subject}", accounts: ["{_account(one)}"] }}')
    lines += ["    ]", "  }"]
    for one in publishers:
        lines += _tenants_account(one)
    return "\n".join([*lines, "}", ""])


def local_users_conf(identities: Sequence[Identity], password: str) -> str:
    """Who may come to a bus of one machine: the services, and its owner by a password, who may do everything."""
    users = [f"    {_user(one, key)}" for one in identities for key in one.nkeys]
    owner = f'    {{ user: "{OWNER}", password: "{password}", permissions: {{ publish: [">"], subscribe: [">"] }} }}'
    return "\n".join(["authorization {", "  users: [", *users, owner, "  ]", "}", ""])


def _account(publisher: Identity) -> str:
    return f"TENANT_{publisher.tenant}"


def _tenants_account(publisher: Identity) -> list[str]:
    subject = topology.subject_of_requests(publisher.tenant)
    may = f'publish: ["{subject}"]'
    users = [f'      {{ nkey: "{key}", permissions: {{ {may}, {_hears(key)} }} }}' for key in publisher.nkeys]
    return [
        f"  {_account(publisher)}: {{", "    users: [", *users, "    ]",
        f'    imports: [ {{ service: {{ account: {ACCOUNT}, subject: "{subject}" }} }} ]', "  }",
    ]  # fmt: skip


def _user(identity: Identity, key: str) -> str:
    if identity.role is None:
        return f'{{ nkey: "{key}", permissions: {{ publish: [">"], subscribe: [">"] }} }}  # {identity.name}'
    heard = permissions.rights_of(identity.role).hear
    role = f'include "roles/{identity.role}.conf"'
    # A line of its own for `include`: it ends with the line. And only where it begins one, the reloader of NATS' chart
    # sees that there is a file to watch.
    return f'{{ nkey: "{key}", permissions: {{\n        {role}\n        {_hears(key, heard)} }} }}  # {identity.name}'


def _hears(key: str, heard: Sequence[str] = ()) -> str:
    subjects = ", ".join(f'"{subject}"' for subject in (f"{permissions.inbox_of(key)}.>", *heard))
    return f"subscribe: {{ allow: [{subjects}] }}"


# ── SeaweedFS ────────────────────────────────────────────────────────────────────────────────────────────────────


def s3_json(identities: Sequence[Identity], bucket: str) -> str:
    """Who may come to the store, for SeaweedFS."""
    return json.dumps({"identities": store_identities(identities, bucket)}, indent=2) + "\n"


def store_identities(identities: Iterable[Identity], bucket: str) -> list[dict[str, object]]:
    """The same as values."""
    return [
        {
            "name": one.name,
            "credentials": [{"accessKey": key.access_key, "secretKey": key.secret_key} for key in one.store_keys],
            "actions": _actions(one, bucket),
        }
        for one in identities if one.store_keys
    ]  # fmt: skip


def _actions(identity: Identity, bucket: str) -> list[str]:
    if identity.kind == ADMIN:
        return ["Admin", "Read", "Write", "List", "Tagging"]
    keys = permissions.keys_of(identity.role) if identity.role is not None else None
    return permissions.seaweedfs_actions(keys, bucket) if keys is not None else []


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)
