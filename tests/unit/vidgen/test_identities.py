"""Identities in a folder, what a process of one shows the bus, and what is said of names and files that are no good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vidgen import credentials, errors, permissions, topology
from vidgen.cli import app
from vidgen.contracts import LANES, STAGES
from vidgen.identities import Identities
from vidgen.settings import Settings, WorkerSettings, read


def run(*arguments: str) -> list[dict[str, object]]:
    """What `vidgen identities` says, as values."""
    done = CliRunner().invoke(app, ["identities", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.output.splitlines()]


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_role_gets_an_identity_once_and_keeps_its_keys(tmp_path: Path) -> None:
    first = run("init", str(tmp_path / "safe"), "--tenant", "acme")
    assert [line["name"] for line in first] == [*permissions.ROLES, "publisher.acme"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "safe").iterdir()}

    assert run("init", str(tmp_path / "safe"), "--tenant", "acme") == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "safe").iterdir()} == files
    assert (tmp_path / "safe").stat().st_mode & 0o777 == 0o700


def test_an_upgrade_writes_what_servers_read_anew(tmp_path: Path) -> None:
    identities = Identities(tmp_path)
    identities.complete()
    written = (tmp_path / "users.conf").read_text()
    (tmp_path / "users.conf").write_text("of another version")

    Identities(tmp_path).complete()

    assert (tmp_path / "users.conf").read_text() == written


def test_another_bucket_is_that_of_all_keys_and_stays_so_where_none_is_named(tmp_path: Path) -> None:
    """The second name was passed over without a word, and the services were denied everything in their bucket."""
    run("init", str(tmp_path))
    run("init", str(tmp_path), "--bucket", "frames")
    run("init", str(tmp_path))

    actions = [one["actions"] for one in json.loads((tmp_path / "s3.json").read_text())["identities"]]
    assert all(":frames" in action for several in actions for action in several)


def test_who_has_keys_of_the_store_is_told_their_bucket(tmp_path: Path) -> None:
    """A rented pod with the file of its identity and no other word of the bucket worked on that of the default."""
    run("init", str(tmp_path), "--bucket", "my-videos")
    run("add", str(tmp_path), "edit-service.acme")
    run("rotate", str(tmp_path), "worker")
    identities = Identities(tmp_path)
    told = {one.name: identities.environment(one.name).get("VIDGEN_S3_BUCKET") for one in identities}
    assert told == {one.name: "my-videos" if one.store_keys else None for one in identities}
    assert told["edit-service.acme"] == "my-videos"


def test_another_bucket_is_told_to_those_who_are_there_and_a_line_of_ones_own_stays(tmp_path: Path) -> None:
    run("init", str(tmp_path))
    identities = Identities(tmp_path)
    given = identities.environment("worker")
    assert "VIDGEN_S3_BUCKET" not in given  # where the settings of a deployment name it
    assert Settings.model_fields["s3_bucket"].default == "vidgen"
    with (tmp_path / "gateway.env").open("a") as file:
        file.write("VIDGEN_S3_BUCKET=mine\n")

    for bucket, told in (("frames", {"VIDGEN_S3_BUCKET": "frames"}), ("vidgen", {})):
        run("init", str(tmp_path), "--bucket", bucket)
        assert identities.environment("worker") == given | told
        assert identities.environment("gateway")["VIDGEN_S3_BUCKET"] == "mine"
    assert (tmp_path / "worker.env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", [("list",), ("add", "admin"), ("rotate", "x"), ("retire", "x"), ("remove", "x")])
def test_a_folder_without_identities_is_named_and_none_is_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A mistyped folder was an empty table, or a new folder with one identity in it that no server read."""
    folder = tmp_path / "identites"
    done = CliRunner().invoke(app, ["identities", command[0], str(folder), *command[1:]])
    assert done.exit_code == 1
    assert f"there are no identities in {folder}: `vidgen identities init {folder}` makes them" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("bucket", ["A*B", "vidgen/jobs", "127.0.0.1", "ab", "x\ny-z"])
def test_a_bucket_that_is_none_is_refused(tmp_path: Path, bucket: str) -> None:
    """`*` was taken into the patterns of s3.json: each key was good for other buckets, too."""
    done = CliRunner().invoke(app, ["identities", "init", str(tmp_path / "safe"), "--bucket", bucket])
    assert done.exit_code == 2
    assert "--bucket: a bucket's name has" in done.stderr
    assert not (tmp_path / "safe").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bucket": 1}'])
def test_a_book_that_cannot_be_read_is_named_and_nothing_in_it_is_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "identities.json").write_text(text)
    done = CliRunner().invoke(app, ["identities", "init", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"vidgen: {tmp_path / 'identities.json'} is damaged: ")
    assert (tmp_path / "identities.json").read_text() == text


@pytest.mark.parametrize(
    "name", ["worker.acme", "edit-service.spot-1", "publisher.acme", "publisher.default", "admin", "operator.night"]
)
def test_one_more_is_added_with_the_rights_of_its_kind(tmp_path: Path, name: str) -> None:
    run("init", str(tmp_path))
    run("add", str(tmp_path), name)
    found = {str(line["name"]): line for line in run("list", str(tmp_path))}
    assert found[name]["nkeys"] != found["worker"]["nkeys"]
    assert bool(found[name]["access_keys"]) == name.startswith(("worker", "edit", "admin"))
    assert (tmp_path / f"{name}.env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "name",
    ["", "root", "publisher", "publisher.", "publisher.Acme", "worker/../x", "worker.a b", "gateway.", "admin.x\n"],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    identities = Identities(tmp_path)
    with pytest.raises(errors.RejectedError) as caught:
        identities.add(name)
    assert caught.value.code == "bad_name"
    assert list(identities) == []


def test_a_wrong_name_and_what_is_no_folder_are_wrong_usage(tmp_path: Path) -> None:
    """They were exit code 1: of a file for a folder only `File exists` was said."""
    (tmp_path / "file").touch()
    run("init", str(tmp_path / "safe"))
    for command, field in (
        (["add", str(tmp_path / "safe"), "foo"], "NAME"), (["init", str(tmp_path / "file")], "FOLDER"),
        (["init", str(tmp_path / "file" / "new")], "FOLDER"), (["list", str(tmp_path / "file")], "FOLDER"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["identities", *command])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"vidgen: {field}: ")


def test_what_is_there_is_not_made_again_and_what_is_not_there_is_not_changed(tmp_path: Path) -> None:
    identities = Identities(tmp_path)
    identities.complete()
    with pytest.raises(errors.ConflictError):
        identities.add("worker")
    for change in (identities.rotate, identities.retire, identities.remove):
        with pytest.raises(errors.NotFoundError):
            change("worker.acme")


def test_new_keys_stand_beside_the_old_ones_until_those_are_retired(tmp_path: Path) -> None:
    run("init", str(tmp_path))
    old = (tmp_path / "worker.env").read_text()

    run("rotate", str(tmp_path), "worker")
    (both,) = (one for one in Identities(tmp_path) if one.name == "worker")
    text, store = (tmp_path / "users.conf").read_text(), json.loads((tmp_path / "s3.json").read_text())
    assert (len(both.nkeys), len(both.store_keys)) == (2, 2)
    assert all(key in text for key in both.nkeys)
    assert [len(one["credentials"]) for one in store["identities"] if one["name"] == "worker"] == [2]
    assert (tmp_path / "worker.env").read_text() != old

    run("retire", str(tmp_path), "worker")
    (one,) = (one for one in Identities(tmp_path) if one.name == "worker")
    assert one.nkeys == both.nkeys[:1]
    assert both.nkeys[1] not in (tmp_path / "users.conf").read_text()
    assert credentials.nkey(str(tmp_path / "worker.env"))["nkeys_seed_str"] in (tmp_path / "worker.env").read_text()

    run("remove", str(tmp_path), "worker")
    assert both.nkeys[0] not in (tmp_path / "users.conf").read_text()
    assert not (tmp_path / "worker.env").exists()


# ── what a process shows ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_is_given_as_it_is_or_as_a_file(tmp_path: Path) -> None:
    seed = credentials.make_seed()
    (tmp_path / "seed").write_text(f"{seed}\n")
    (tmp_path / "worker.env").write_text(f"# worker\nVIDGEN_NATS_NKEY_SEED={seed}\nVIDGEN_S3_ACCESS_KEY=a\n")
    inbox = f"_INBOX_{credentials.public_key(seed)}".encode()
    for told in (seed, f" {seed}\n", str(tmp_path / "seed"), str(tmp_path / "worker.env")):
        own = WorkerSettings.model_validate({"nats_nkey_seed": told, "nats_user": "ignored"})
        assert own.nats_options() == {"nkeys_seed_str": seed, "inbox_prefix": inbox}
        assert seed not in repr(own)


def test_an_inbox_can_be_named_for_users_of_another_kind() -> None:
    own = Settings.model_validate({"nats_user": "me", "nats_inbox_prefix": "_INBOX_me"})
    assert own.nats_options() == {"user": "me", "password": "", "inbox_prefix": b"_INBOX_me"}
    seed = credentials.make_seed()
    named = Settings.model_validate({"nats_nkey_seed": seed, "nats_inbox_prefix": "_INBOX.mine"})
    assert named.nats_options()["inbox_prefix"] == b"_INBOX.mine"


@pytest.mark.parametrize(
    "prefix", ["mine", "_inbox_me", "my._INBOX", "_INBOX.>", "_INBOX_me.", "_INBOX_me\n", "_INBOX me"]
)
def test_an_inbox_where_no_worker_answers_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked from there was never told "at it", and took tasks from workers who were well."""
    monkeypatch.setenv("VIDGEN_NATS_INBOX_PREFIX", prefix)
    with pytest.raises(errors.FatalError, match="VIDGEN_NATS_INBOX_PREFIX: it begins with _INBOX"):
        read(Settings)


@pytest.mark.parametrize("text", [None, "", "no seed", "SUAAAA", "VIDGEN_NATS_NKEY_SEED=\n", "UAAAA"])
def test_a_file_without_a_seed_is_said_to_be_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "seed"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.FatalError, match="VIDGEN_NATS_NKEY_SEED") as caught:
        Settings.model_validate({"nats_nkey_seed": str(path)}).nats_options()
    assert caught.value.code == "settings"


# ── the rights follow from the topology ──────────────────────────────────────────────────────────────────────────


def test_a_stream_or_consumer_that_is_new_is_the_gateways_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    parcels = topology.Stream("VIDGEN_PARCELS", ("vidgen.parcels.*",), "workqueue")
    monkeypatch.setattr(topology, "STREAMS", (*topology.STREAMS, parcels))
    monkeypatch.setattr(topology, "CONSUMERS", (*topology.CONSUMERS, topology.Consumer("VIDGEN_PARCELS", "gateway")))
    monkeypatch.setattr(topology, "BUCKETS", (*topology.BUCKETS, topology.Bucket("vidgen_keys", ttl=0)))
    may = {role: set(permissions.rights_of(role).publish) for role in permissions.ROLES}

    assert {
        "vidgen.parcels.*", "$JS.API.STREAM.CREATE.VIDGEN_PARCELS", "$JS.ACK.VIDGEN_PARCELS.gateway.>",
        "$JS.API.CONSUMER.MSG.NEXT.VIDGEN_PARCELS.gateway", "$KV.vidgen_keys.>",
    } <= may["gateway"]  # fmt: skip
    assert "$KV.vidgen_keys.>" in may["operator"]
    for role in set(permissions.ROLES) - {"gateway", "operator"}:
        assert not [subject for subject in may[role] if "PARCELS" in subject.upper() or "vidgen_keys" in subject]


@pytest.mark.parametrize(
    ("role", "stages"), [("edit-service", {"edit"}), ("i2v-service", {"i2v"}), ("worker", {"edit", "i2v"})]
)
def test_a_worker_takes_the_tasks_of_its_stages_alone(role: permissions.Role, stages: set[str]) -> None:
    may = permissions.rights_of(role).publish
    for stage in STAGES:
        pulls = [f"$JS.API.CONSUMER.MSG.NEXT.{topology.TASKS}.{stage}-{lane}" in may for lane in LANES]
        assert pulls == [stage in stages] * len(LANES)
