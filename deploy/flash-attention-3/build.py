"""Builds FlashAttention 3 for Hopper as small as vidgen needs it: forward, head dimension 128, bfloat16 and e4m3.

    python build.py FLASH_ATTENTION CUTLASS TARGET

FLASH_ATTENTION is a checkout of Dao-AILab/flash-attention, CUTLASS one of NVIDIA/cutlass (its `include` is enough), and
TARGET the folder to install into, one that Python imports from. It needs nvcc 12.8 or later and the torch that will be
used: there is no wheel for it. Two minutes on a few cores, about a megabyte.
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
# What is found so many times in the kernel's main loop, and what stands there instead.
PATCHES = (
    (
        "    static constexpr bool Is_causal = Is_causal_;\n",
        1,
        """    using ElementQK = std::conditional_t<Is_FP8, int8_t, Element>;
    using ElementAccumQK = std::conditional_t<Is_FP8, int32_t, ElementAccum>;
    // 1.5 * 2^23: a float's last digit is then one, and the largest sum, 128 * 127 * 127, has room on both sides.
    static constexpr float IntAsFloat = 12582912.f;
    static constexpr bool Is_causal = Is_causal_;
""",
    ),
    (
        "cute::GMMA::ss_op_selector<Element, Element, ElementAccum, TileShape_MNK>()",
        1,
        "cute::GMMA::ss_op_selector<ElementQK, ElementQK, ElementAccumQK, TileShape_MNK>()",
    ),
    (
        "Tensor tSrS = partition_fragment_C(tiled_mma_qk, select<0, 1>(TileShape_MNK{}));\n",
        3,
        """Tensor tSrS = make_tensor<float>(partition_fragment_C(tiled_mma_qk, select<0, 1>(TileShape_MNK{})).layout());
            if constexpr (Is_FP8) { cute::fill(tSrS, float(IntAsFloat)); }
""",
    ),
    (
        "flash::gemm</*zero_init=*/true, /*wg_wait=*/-1>(tiled_mma_qk,",
        3,
        "flash::gemm</*zero_init=*/!Is_FP8, /*wg_wait=*/-1>(tiled_mma_qk,",
    ),
    (
        "scoremod_premask_fn(tSrS);\n",
        3,
        """if constexpr (Is_FP8) {
                #pragma unroll
                for (int i = 0; i < size(tSrS); ++i) { tSrS(i) -= IntAsFloat; }
            }
            scoremod_premask_fn(tSrS);
""",
    ),
)  # fmt: skip


def main(flash: Path, cutlass: Path, target: Path) -> None:
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    if CUDA_HOME is None:
        sys.exit("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME")
    hopper = Path(tempfile.mkdtemp(), "hopper")
    shutil.copytree(flash / "hopper", hopper)
    with_int8_scores(hopper / "mainloop_fwd_sm90_tma_gmma_ws.hpp")
    switches = [f"-DFLASHATTENTION_DISABLE_{name}" for name in DISABLED]
    switches += [f"-DFLASHATTENTION_DISABLE_{name}" for name in DIFFERING]
    includes = [f"-I{path}" for path in (hopper, cutlass / "include", sysconfig.get_path("include"))]
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

        def compiled(source: str) -> str:
            made = str(Path(name, Path(source).stem + ".o"))
            tool = (
                [f"{CUDA_HOME}/bin/nvcc", *cuda] if source.endswith(".cu") else [os.environ.get("CXX", "g++"), "-fPIC"]
            )
            subprocess.run([*tool, *common, "-c", str(hopper / source), "-o", made], check=True)
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
    shutil.copy(hopper / "flash_attn_interface.py", target)
    flags = {f"FLASHATTENTION_DISABLE_{name}": True for name in DISABLED} | {
        f"FLASHATTENTION_DISABLE_{name}": False for name in ENABLED
    }
    flags |= {f"FLASH_ATTENTION_DISABLE_{name}": True for name in DIFFERING}
    flags["VIDGEN_INT8_SCORES"] = True
    config = json.dumps({"build_flags": flags}).replace("true", "True").replace("false", "False")
    (target / "flash_attn_config.py").write_text(f"CONFIG = {config}\n")
    # diffusers looks for the distribution, not only for the module.
    info = target / f"flash_attn_3-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn_3\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")
    shutil.rmtree(hopper.parent)
    sys.stdout.write(f"FlashAttention 3 is in {target}\n")


def with_int8_scores(header: Path) -> None:
    """Have the kernel for 8 bits read queries and keys as int8, in tensors that are still called e4m3.

    A number of e4m3 has four digits, whatever its size, and the largest scores are off by the most; of int8 all are off
    by as little. The matrix units are as fast with either. Their sums are of integers: begun with the bits of a large
    float instead of zero they are, read as floats, that float plus the sum, and no number has to be converted.
    """
    text = header.read_text()
    for found, times, put in PATCHES:
        if text.count(found) != times:
            sys.exit(f"{header.name} is not as it was: it has {text.count(found)} times, not {times}, {found!r}")
        text = text.replace(found, put)
    header.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
