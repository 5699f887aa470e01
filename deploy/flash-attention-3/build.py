"""Builds FlashAttention 3 for Hopper as small as vidgen needs it: forward, head dimension 128, 16 and 8 bits.

    python build.py FLASH_ATTENTION CUTLASS TARGET

FLASH_ATTENTION is a checkout of Dao-AILab/flash-attention, CUTLASS one of NVIDIA/cutlass (its `include` is enough), and
TARGET the folder to install into, one that Python imports from. It needs nvcc 12.8 or later and the torch that will be
used: there is no wheel for it. Two minutes on a few cores, about a megabyte.

It is changed on the way, in a copy of the sources (`PATCHES`): upstream, the kernel that is told on the device how many
keys there are is the one for batches of differing lengths, which took 3 to 5 % longer for one picture on an H200; and
the kernel for 8 bits takes queries and keys in e4m3 with a scale a head, where ours takes int8 and a scale a query.
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
# What stands so many times in a source, and what stands there instead.
PATCHES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "seqlen.h": (
        (
            "        , seqlen_k_og(!Varlen\n                      ? seqlen_k_static\n",
            1,
            "        , seqlen_k_og(!Varlen\n                      ? (seqused_k ? seqused_k[bidb] : seqlen_k_static)\n",
        ),
    ),
    "flash_api_stable.cpp": (
        (
            "seqused_q_.has_value() || seqused_k_.has_value() || leftpad_k_.has_value();",
            1,
            "seqused_q_.has_value() || leftpad_k_.has_value();",
        ),
    ),
    "mainloop_fwd_sm90_tma_gmma_ws.hpp": (
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
            """Tensor tSrS = make_tensor<float>(
                partition_fragment_C(tiled_mma_qk, select<0, 1>(TileShape_MNK{})).layout());
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
    ),
    "flash_fwd_kernel_sm90.h": (
        (
            "float const q_descale = params.mainloop.ptr_q_descale == nullptr ? 1.0f : "
            "params.mainloop.ptr_q_descale[bidb * get<0>(params.mainloop.stride_q_descale) + "
            "bidh_kv * get<1>(params.mainloop.stride_q_descale)];\n",
            1,
            "\n",
        ),
        ("softmax_scale_log2 *= q_descale * k_descale;", 1, "softmax_scale_log2 *= k_descale;"),
        (
            "/*Max_offset=*/!Is_FP8 ? 0 : 8> softmax(softmax_scale_log2);\n",
            1,
            """/*Max_offset=*/!Is_FP8 ? 0 : 8> softmax(softmax_scale_log2);
                if constexpr (Is_FP8) {
                    // Each query has a scale; those of a head lie side by side.
                    int const thread = threadIdx.x - MmaThreadOffset;
                    int const row = get<0>(block_coord) * kBlockM + thread / 32 * 16 + thread % 32 / 4;
                    float const *q_descale = params.mainloop.ptr_q_descale
                        + bidb * get<0>(params.mainloop.stride_q_descale)
                        + get<1>(block_coord) * get<1>(params.mainloop.stride_q_descale);
                    static_assert(size(softmax.row_scale) == 2);
                    #pragma unroll
                    for (int mi = 0; mi < 2; ++mi) {
                        bool const here = row + 8 * mi < get<0>(params.mainloop.shape_Q);
                        softmax.row_scale(mi) = softmax_scale_log2 * (here ? q_descale[row + 8 * mi] : 1.f);
                    }
                }
""",
        ),
    ),
    "softmax.h": (
        ("typename Engine1, typename Layout1>\n__forceinline__ __device__ void scale_apply_exp2(", 1,
         "typename Engine1, typename Layout1, typename Scales>\n__forceinline__ __device__ void scale_apply_exp2("),
        ("Tensor<Engine1, Layout1> const &max, const float scale) {", 1,
         "Tensor<Engine1, Layout1> const &max, Scales const &scales) {"),
        ("        // If max is -inf, then all elements must have been -inf (possibly due to masking).\n", 1,
         "        const float scale = scales(mi);\n        // If max is -inf, then all elements must be (masking).\n"),
        (
            "    float const softmax_scale_log2;\n",
            1,
            """    float const softmax_scale_log2;
    TensorT row_scale;
    CUTLASS_DEVICE float scale(int mi) const { return Max_offset == 0 ? softmax_scale_log2 : row_scale(mi); }
""",
        ),
        ("scores_max_cur) * softmax_scale_log2)", 1, "scores_max_cur) * scale(mi))"),
        ("(scores, row_max, softmax_scale_log2);", 1, "(scores, row_max, [&](int mi) { return scale(mi); });"),
        ("(softmax_scale_log2 * float(M_LN2))", 1, "(scale(mi) * float(M_LN2))"),
    ),
}  # fmt: skip
PATCHED = ("VIDGEN_LENGTHS", "VIDGEN_INT8_SCORES")  # among the build's flags


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
    flags |= {f"FLASH_ATTENTION_DISABLE_{name}": True for name in DIFFERING} | dict.fromkeys(PATCHED, True)
    config = json.dumps({"build_flags": flags}).replace("true", "True").replace("false", "False")
    (target / "flash_attn_config.py").write_text(f"CONFIG = {config}\n")
    # diffusers looks for the distribution, not only for the module.
    info = target / f"flash_attn_3-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn_3\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")
    sys.stdout.write(f"FlashAttention 3 is in {target}\n")


def patch(hopper: Path) -> None:
    """Change the sources; exits where they are not those that the changes were made for.

    A number of e4m3 has four digits, whatever its size, and the largest scores are off by the most; of int8 all are off
    by as little. The matrix units are as fast with either. Their sums are of integers: begun with the bits of a large
    float instead of zero they are, read as floats, that float plus the sum, and no number has to be converted.
    """
    for name, patches in PATCHES.items():
        text = (hopper / name).read_text()
        for found, times, instead in patches:
            if text.count(found) != times:
                sys.exit(f"{hopper / name} is of another version: it does not have {times} times {found!r}")
            text = text.replace(found, instead)
        (hopper / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
