from __future__ import annotations

import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import structlog
import torch
from torch import nn

from vidgen.accel import blocks, speed
from vidgen.errors import FatalError

CPU = torch.device("cpu")


class Model(nn.Module):
    """Remembers the attention backend that it is told."""

    backend = ""

    def set_attention_backend(self, name: str) -> None:
        self.backend = name


def test_the_kernels_that_are_asked_for_are_set_in_every_transformer() -> None:
    models = [Model(), Model()]
    assert speed.choose_attention(models, "cudnn", CPU) == "cudnn"
    assert [model.backend for model in models] == ["_native_cudnn"] * 2


def test_kernels_that_are_not_installed_are_refused_by_the_name_of_their_package() -> None:
    with pytest.raises(FatalError, match="VIDGEN_ATTENTION=flash3 needs the package flash_attn_interface") as caught:
        speed.choose_attention([Model()], "flash3", CPU)
    assert caught.value.code == "settings"


def installed(monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]) -> None:
    """A FlashAttention 3 that was built with these flags."""
    for name in ("flash_attn_interface", "flash_attn_config"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["flash_attn_config"].CONFIG = {"build_flags": flags}  # type: ignore[attr-defined]


@pytest.mark.parametrize("ours", [True, False])
def test_attention_in_8_bits_needs_the_flash_attention_that_is_built_for_it(
    monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    installed(monkeypatch, {"VIDGEN_INT8_SCORES": True} if ours else {})
    model = Model()
    if ours:
        assert speed.choose_attention([model], "flash3-8bit", CPU) == "flash3-8bit"
        assert model.backend == "_flash_3"
    else:
        with pytest.raises(FatalError, match="needs the FlashAttention 3 that deploy") as caught:
            speed.choose_attention([model], "flash3-8bit", CPU)
        assert caught.value.code == "settings"


def test_another_choice_takes_attention_in_8_bits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.attention = nn.Module()
    model.attention.processor = blocks.SelfAttention()
    blocks.narrow_attention(model)
    speed.choose_attention([model], "torch", CPU)
    assert not model.attention.processor.narrow


def test_unknown_kernels_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(FatalError, match="use auto, torch, cudnn, flash3, flash3-8bit, sage"):
        speed.choose_attention([Model()], "xformers", CPU)


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "flash3"), ((8, 9), "torch"), ((10, 0), "torch")])
def test_flash_attention_3_is_chosen_on_a_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda package: object())
    assert speed.choose_attention([Model()], "auto", CPU) == name


@pytest.mark.parametrize("flags", [{}, {"FLASHATTENTION_DISABLE_FP16": True, "VIDGEN_INT8_SCORES": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_not_taken_for_numbers_that_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    """The one that we build has no kernels for float16, and by itself a worker chose it for that."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    installed(monkeypatch, flags)
    takes = dtype == torch.bfloat16 or (dtype == torch.float16 and not flags)
    assert speed.choose_attention([Model()], "auto", CPU, dtype) == ("flash3" if takes else "torch")
    for name in ("flash3", "flash3-8bit"):
        if takes and (name == "flash3" or flags):
            assert speed.choose_attention([Model()], name, CPU, dtype) == name
        elif not takes:
            with pytest.raises(FatalError, match=f"VIDGEN_ATTENTION={name} has no kernels for float") as caught:
                speed.choose_attention([Model()], name, CPU, dtype)
            assert caught.value.code == "settings"


def test_without_flash_attention_3_a_hopper_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda package: None)
    assert speed.choose_attention([Model()], "auto", CPU) == "torch"


def test_another_memory_format_leaves_a_convolution_as_it_is() -> None:
    torch.manual_seed(0)
    vae = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.Flatten(1, 2), nn.Conv2d(32, 4, 1)).requires_grad_(False)
    x = torch.randn(1, 4, 4, 6, 6)
    wanted = vae(x)
    speed.channels_last(vae)
    assert vae[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(vae(x), wanted)


def test_what_is_compiled_is_kept_where_the_setting_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/its/own")
    speed.keep_compiled(tmp_path)
    assert Path(cache_dir()) == tmp_path / "inductor"
    assert speed.os.environ["TRITON_CACHE_DIR"] == "/its/own"


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A volume that is mounted to be read was the end of the worker, in the middle of its warm-up."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("")
    with structlog.testing.capture_logs() as logs:
        speed.keep_compiled(tmp_path / "file" / "cache")
        monkeypatch.setattr(speed.os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
        speed.keep_compiled(tmp_path / "cache")
    assert [entry["_event"] for entry in logs] == ["compile_cache_unusable"] * 2
    assert "noexec" in logs[1]["event"]
    assert speed.os.environ.keys().isdisjoint(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))


def test_all_kernels_are_assembled_by_what_inductor_would_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one of two had made the next start made once more by the other: 13 kernels of a clip, in four seconds."""
    from torch._inductor.runtime import compile_tasks

    set_by_inductor = compile_tasks._set_triton_ptxas_path.__wrapped__
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    speed.take_torchs_assembler()
    assert "TRITON_PTXAS_PATH" not in os.environ  # a torch that brings none
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text("")
    ptxas.chmod(0o644)
    speed.take_torchs_assembler()
    assert "TRITON_PTXAS_PATH" not in os.environ
    ptxas.chmod(0o755)
    speed.take_torchs_assembler()
    set_by_inductor()
    assert os.environ["TRITON_PTXAS_PATH"] == str(ptxas)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/its/own")
    speed.take_torchs_assembler()
    assert os.environ["TRITON_PTXAS_PATH"] == "/its/own"
