"""Secrets, signatures and the back-off of webhooks: what any library of Standard Webhooks expects."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen import errors, webhooks
from vidgen.webhooks import Secret

MASTER = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="


def test_the_specifications_own_example_is_signed_as_it_says() -> None:
    # From the specification's reference libraries.
    secret = Secret.parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = secret.sign(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", datetime.fromtimestamp(1614265330, UTC), b'{"test": 2432232314}'
    )

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@given(st.binary(max_size=200), st.text("abc:123-_", min_size=1), st.integers(0, 4_000_000_000))
def test_a_signature_is_good_for_its_very_id_time_and_body(body: bytes, key: str, seconds: int) -> None:
    secret = Secret.parse(MASTER).of_tenant("acme")
    at = datetime.fromtimestamp(seconds, UTC)
    signed = secret.sign(key, at, body)["webhook-signature"]

    raw = base64.b64decode(secret.reveal().removeprefix("whsec_"))
    expected = hmac.new(raw, f"{key}.{seconds}.".encode() + body, hashlib.sha256).digest()
    assert signed == "v1," + base64.b64encode(expected).decode()
    for other in (
        secret.sign(key + "x", at, body), secret.sign(key, datetime.fromtimestamp(seconds + 1, UTC), body),
        secret.sign(key, at, body + b"x"), Secret.parse(MASTER).of_tenant("other").sign(key, at, body),
    ):  # fmt: skip
        assert other["webhook-signature"] != signed


def test_each_tenant_has_a_secret_of_its_own_that_is_always_the_same() -> None:
    found = [Secret.parse(MASTER).of_tenant(tenant).reveal() for tenant in ("a", "b", "default", "a")]

    assert len(set(found)) == 3
    assert found[0] == found[3]
    assert MASTER not in found
    assert all(Secret.parse(one).reveal() == one for one in found)


@pytest.mark.parametrize(
    "given_", ["", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64!", MASTER[6:], "whsec_" + "A" * 400]
)
def test_a_secret_that_is_none_is_refused_without_being_shown(given_: str) -> None:
    with pytest.raises(errors.FatalError, match="VIDGEN_WEBHOOK_SECRET") as caught:
        Secret.parse(given_)

    assert caught.value.code == "settings"
    assert not given_.removeprefix("whsec_") or given_.removeprefix("whsec_") not in str(caught.value)


def test_a_secret_does_not_show_in_what_is_printed_of_it() -> None:
    assert MASTER[6:] not in repr(Secret.parse(MASTER))


@given(st.floats(0, 10**7), st.floats(0.001, 5 * 86400))
def test_whatever_its_age_a_delivery_is_tried_again_before_it_is_given_up_and_never_at_once(
    age: float, give_up_after: float
) -> None:
    wait = webhooks.next_try(age, give_up_after)

    if age >= give_up_after:
        assert wait is None
    else:
        assert wait is not None
        assert 0 < wait <= give_up_after - age


@given(st.floats(0, 86400), st.floats(0, 86400))
def test_the_older_it_is_the_later_it_is_tried(one: float, other: float) -> None:
    younger, older = sorted((one, other))
    soon, late = webhooks.next_try(younger, 86400), webhooks.next_try(older, 86400)

    assert late is None or (soon is not None and younger + soon <= older + late + 1e-6)


def test_a_receiver_that_is_away_for_a_day_is_asked_ten_times() -> None:
    age, tries = 0.0, 1
    while (wait := webhooks.next_try(age, 86400.0)) is not None:
        age, tries = age + wait, tries + 1

    assert (tries, age) == (10, 86400.0)
