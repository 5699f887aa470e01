"""Settings: what is wrong is said by the name of its variable, before anything is loaded."""

from __future__ import annotations

import pytest

from vidgen.errors import FatalError
from vidgen.settings import GatewaySettings, WorkerSettings, read


@pytest.fixture(autouse=True)
def only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE", "DTYPE", "ATTENTION", "I2V_GUIDANCE_DEVICE", "GRACE_S", "WORK_DIR", "EDIT_REVISION"):
        monkeypatch.delenv(f"VIDGEN_{name}", raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRACE_S", "inf"), ("GRACE_S", "nan"), ("CHECKPOINT_OVER_S", "inf"), ("HANG_FACTOR", "inf"),
        ("HEARTBEAT_S", "inf"), ("STEP_CACHE", "0"), ("STEP_CACHE", "6"), ("DTYPE", "float64"),
        ("PROFILE", "resident-int4"), ("COMPILE", "on"), ("CUDA_GRAPHS", "on"), ("VAE", "tiny"),
        ("SLEEP_IN", "cloud"), ("DEVICE", "gpu"), ("DEVICE", "cuda:"), ("DEVICE", "cuda:1,2"), ("DEVICE", "mps"),
        ("I2V_GUIDANCE_DEVICE", "auto"), ("I2V_GUIDANCE_DEVICE", "gpu:1"), ("EDIT_REFERENCE_AREA", "100"),
        ("CHECKPOINT", "on"), ("ENGINE", "qwen"), ("VERIFY_WEIGHTS", "all"), ("S3_BUCKET", "a b"),
        ("S3_BUCKET", "ab"), ("S3_BUCKET", "a..b"), ("S3_BUCKET", "10.0.0.1"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"VIDGEN_{name}", value)
    with pytest.raises(FatalError, match=f"VIDGEN_{name}: ") as caught:
        read(WorkerSettings)
    assert caught.value.code == "settings"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"DEVICE": "auto", "I2V_GUIDANCE_DEVICE": "cuda:0"}, "VIDGEN_I2V_GUIDANCE_DEVICE: .*VIDGEN_DEVICE=auto"),
        ({"DEVICE": "cuda:1", "I2V_GUIDANCE_DEVICE": "cuda:1"}, "VIDGEN_I2V_GUIDANCE_DEVICE: .*cuda:1 is the first"),
        ({"DEVICE": "cuda:0", "I2V_GUIDANCE_DEVICE": "cuda"}, "VIDGEN_I2V_GUIDANCE_DEVICE: "),
        ({"DTYPE": "float32", "ATTENTION": "flash3"}, "VIDGEN_ATTENTION: .*takes no float32"),
        ({"DTYPE": "float32", "ATTENTION": "flash3-8bit"}, "VIDGEN_ATTENTION: "),
        ({"DTYPE": "float32", "ATTENTION": "sage"}, "VIDGEN_ATTENTION: "),
    ],
)
def test_two_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"VIDGEN_{name}", value)
    with pytest.raises(FatalError, match=says):
        read(WorkerSettings)


@pytest.mark.parametrize(
    "given",
    [
        {"DEVICE": "cuda:1", "I2V_GUIDANCE_DEVICE": "cuda:0"}, {"I2V_GUIDANCE_DEVICE": "cuda:1"},
        {"DEVICE": "cpu", "I2V_GUIDANCE_DEVICE": "cpu"}, {"DTYPE": "float32", "ATTENTION": "torch"},
        {"DTYPE": "bfloat16", "ATTENTION": "flash3"},
    ],
)  # fmt: skip
def test_what_goes_together_is_taken(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"VIDGEN_{name}", value)
    assert read(WorkerSettings).device == given.get("DEVICE", "auto")


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder was the working directory then, a LoRA one without a file, and a port no number."""
    for name in ("WORK_DIR", "COMPILE_CACHE", "EDIT_LORA", "EDIT_REVISION", "METRICS_PORT", "EDIT_MODEL", "KEEP_JOBS"):
        monkeypatch.setenv(f"VIDGEN_{name}", "")
    found = read(WorkerSettings)
    assert (found.work_dir, found.compile_cache, found.edit_lora, found.edit_revision) == (None,) * 4
    assert (found.metrics_port, found.edit_model) == (0, "Qwen/Qwen-Image-Edit-2511")
    assert read(GatewaySettings).keep_jobs == 30


@pytest.mark.parametrize("value", ["OFF", "0.5", "a week"])
@pytest.mark.parametrize("name", ["KEEP_UPLOADS", "KEEP_CHECKPOINTS", "KEEP_ARTIFACTS"])
def test_what_takes_days_or_off_says_both_at_once(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Two variables were named that do not exist: VIDGEN_KEEP_UPLOADS_CONSTRAINED-FLOAT and …_LITERAL['OFF']."""
    monkeypatch.setenv(f"VIDGEN_{name}", value)
    with pytest.raises(FatalError) as caught:
        read(GatewaySettings)
    assert caught.value.message == f"the settings are wrong: VIDGEN_{name}: write a number of days, 1 or more, or off"


def test_each_wrong_variable_is_named_once_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {name for name in GatewaySettings.model_fields if name.startswith(("keep_", "tenant_", "webhook_time"))}
    for name in wrong:
        monkeypatch.setenv(f"VIDGEN_{name.upper()}", "x")
    with pytest.raises(FatalError) as caught:
        read(GatewaySettings)
    named = caught.value.message.removeprefix("the settings are wrong: ").split("; ")
    assert sorted(one.split(": ")[0] for one in named) == sorted(f"VIDGEN_{name.upper()}" for name in wrong)
