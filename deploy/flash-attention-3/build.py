"""Builds FlashAttention 3 for Hopper as small as vidgen needs it: forward, head dimension 128, bfloat16 and e4m3.

    python build.py FLASH_ATTENTION CUTLASS TARGET

FLASH_ATTENTION is a checkout of Dao-AILab/flash-attention, CUTLASS one of NVIDIA/cutlass (its `include` is enough), and
TARGET the folder to install into, one that Python imports from. It needs nvcc 12.8 or later and the torch that will be
used: there is no wheel for it. Two minutes on a few cores, about a megabyte.

It is changed on the way, in a copy of the sources (`PATCHES`): upstream, the kernel that is told on the device how many
keys there are is the one for batches of differing lengths, which took 3 to 5 % longer for one picture on an H200.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VERSION = "3.0.0"
SOURCES = ("flash_api_stable.cpp", "instantiations/flash_fwd_hdim128_bf16_sm90.cu",
           "instantiations/flash_fwd_hdim128_e4m3_sm90.cu", "flash_prepare_scheduler.cu")  # fmt: skip
DISABLED = (
    "BACKWARD", "PAGEDKV", "SPLIT", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "VARLEN", "HDIM64",
    "HDIM96", "HDIM192", "HDIM256", "SM8x",
)  # fmt: skip
DIFFERING = ("HDIMDIFF64", "HDIMDIFF192")
ENABLED = ("CLUSTER", "HDIM128", "FP8")
# What stands once in a source, and what stands there instead.
PATCHES = {
    "seqlen.h": (
        "        , seqlen_k_og(!Varlen\n                      ? seqlen_k_static\n",
        "        , seqlen_k_og(!Varlen\n                      ? (seqused_k ? seqused_k[bidb] : seqlen_k_static)\n",
    ),
    "flash_api_stable.cpp": (
        "seqused_q_.has_value() || seqused_k_.has_value() || leftpad_k_.has_value();",
        "seqused_q_.has_value() || leftpad_k_.has_value();",
    ),
}
PATCHED = "VIDGEN_LENGTHS"  # among the build's flags


def main(flash: Path, cutlass: Path, target: Path) -> None:
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    if CUDA_HOME is None:
        sys.exit("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME")
    switches = [f"-DFLASHATTENTION_DISABLE_{name}" for name in DISABLED]
    switches += [f"-DFLASHATTENTION_DISABLE_{name}" for name in DIFFERING]
    includes = [f"-I{path}" for path in (cutlass / "include", sysconfig.get_path("include"))]
    includes += [f"-I{path}" for path in include_paths("cuda")]
    common = [
        "-O3", "-std=c++17", "-DPy_LIMITED_API=0x03090000", "-DTORCH_TARGET_VERSION=0x0209000000000000", "-DUSE_CUDA",
        "-DTORCH_EXTENSION_NAME=_C", *switches, *includes,
    ]  # fmt: skip
    cuda = [
        "-gencode", "arch=compute_90a,code=sm_90a", "--use_fast_math", "--expt-relaxed-constexpr",
        "--expt-extended-lambda", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-DCUTLASS_ENABLE_GDC_FOR_SM90",
        "-DCUTLASS_DEBUG_TRACE_LEVEL=0", "-DNDEBUG", "-Xcompiler", "-fPIC",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        hopper = Path(shutil.copytree(flash / "hopper", Path(name, "hopper")))
        patch(hopper)

        def compiled(source: str) -> str:
            made = str(Path(name, Path(source).stem + ".o"))
            tool = (
                [f"{CUDA_HOME}/bin/nvcc", *cuda] if source.endswith(".cu") else [os.environ.get("CXX", "g++"), "-fPIC"]
            )
            subprocess.run([*tool, *common, f"-I{hopper}", "-c", str(hopper / source), "-o", made], check=True)
            return made

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, SOURCES))
        package = target / "flash_attn_3"
        package.mkdir(parents=True, exist_ok=True)
        libraries = [flag for path in library_paths("cuda") for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-shared", "-s", *objects, *libraries, "-lc10", "-ltorch", "-ltorch_cpu",
             "-lcudart", "-lc10_cuda", "-ltorch_cuda", "-lcuda", "-o", str(package / "_C.abi3.so")],
            check=True,
        )  # fmt: skip
    (package / "__init__.py").write_text(f'__version__ = "{VERSION}"\n')
    shutil.copy(flash / "hopper" / "flash_attn_interface.py", target)
    flags = {f"FLASHATTENTION_DISABLE_{name}": True for name in DISABLED} | {
        f"FLASHATTENTION_DISABLE_{name}": False for name in ENABLED
    }
    flags |= {f"FLASH_ATTENTION_DISABLE_{name}": True for name in DIFFERING} | {PATCHED: True}
    config = json.dumps({"build_flags": flags}).replace("true", "True").replace("false", "False")
    (target / "flash_attn_config.py").write_text(f"CONFIG = {config}\n")
    # diffusers looks for the distribution, not only for the module.
    info = target / f"flash_attn_3-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn_3\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")
    sys.stdout.write(f"FlashAttention 3 is in {target}\n")


def patch(hopper: Path) -> None:
    """Change the sources; exits where they are not those that the changes were made for."""
    for name, (found, instead) in PATCHES.items():
        text = (hopper / name).read_text()
        if text.count(found) != 1:
            sys.exit(f"{hopper / name} is of another version: it does not have once {found!r}")
        (hopper / name).write_text(text.replace(found, instead))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
