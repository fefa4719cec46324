"""The Triton programs: interpreted on the CPU they equal their plain twins, they compile for a GPU, and on a GPU they equal the twins again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae.triton_kernels import COLUMNS, CUT_BLOCK, DIGIT_BLOCK, ENTRIES, PIECE, TILE, TILES, is_available

TWINS = Path(__file__).with_name("triton_twins.py")
ROOT = Path(__file__).parents[2]
SHARED_MEMORY_BYTES = 48 << 10
"""Of a program, at most: what every CUDA device grants without being asked."""
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton for this system")


def run_twins(**environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(TWINS)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_every_function_equals_its_plain_twin_in_the_interpreter():
    said = run_twins(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert " passed" in said and "skipped" not in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_function_equals_its_plain_twin_on_the_gpu():
    assert is_available()
    assert " passed" in run_twins(TRITON_INTERPRET="0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_available():
    assert not is_available()


def test_the_module_can_be_imported_where_there_is_no_triton():
    code = "import sys; sys.modules['triton'] = None; from sae.triton_kernels import is_available; print(is_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


CODES = {"start": "*i32", "latent": "*i32", "value": "*fp32"}
TILES_OF_ROW = {"row_stride": "i32", "d_sae": "i32", "threshold": "*fp32", "counts": "*i32"}
BY_LATENT = {"start": "*i32", "row": "*i32", "factor": "*fp32", "matrix": "*fp32", "bounds": "*i32", "first_piece": "*i32"}
CUT = {"state": "*i32", "larger": "*i32", "equal": "*i32"}
ROWS = {"COLUMNS": COLUMNS, "ENTRIES": ENTRIES}
SIGNATURES = {
    # program: (types of its arguments, values of those that are known when it is compiled)
    "count_above": ({"pre": "*bf16"} | TILES_OF_ROW | {"n_tiles": "i32"}, {"PER_ROW": False, "PER_LATENT": True, "TILE": TILE, "TILES": TILES}),
    "write_above": (
        {"pre": "*fp32"} | TILES_OF_ROW | {"ends": "*i32", "n_tiles": "i32", "latent": "*i32", "value": "*fp32"},
        {"PER_ROW": True, "PER_LATENT": False, "TILE": TILE, "TILES": TILES},
    ),
    "count_digits": (
        {"x": "*fp32", "row_stride": "i32", "n_columns": "i32", "state": "*i32", "counts": "*i32"},
        {"SHIFT": 20, "WIDTH": 11, "BLOCK": DIGIT_BLOCK},
    ),
    "choose_digit": ({"counts": "*i32", "state": "*i32"}, {"WIDTH": 11}),
    "count_at_cut": ({"value": "*fp32", "nnz": "i32"} | CUT, {"BLOCK": CUT_BLOCK}),
    "write_to_cut": (
        {"latent": "*i32", "value": "*fp32", "nnz": "i32"}
        | CUT
        | {"larger_ends": "*i32", "equal_ends": "*i32", "new_latent": "*i32", "new_value": "*fp32", "before": "*i32"},
        {"BLOCK": CUT_BLOCK},
    ),
    "forward_error": (
        CODES
        | dict.fromkeys(("W_dec", "b_dec", "y", "weights", "square_error", "e_last", "E", "d_value"), "*fp32")
        | {"bounds": "*i32"}
        | dict.fromkeys(("n_rows", "d_out", "nnz", "n_groups", "n_parts"), "i32"),
        {"GROUPS": 4} | ROWS,
    ),
    "sum_pieces": (
        BY_LATENT | {"latent_of_piece": "*i32", "pieces": "*fp32", "n_rows": "i32", "d": "i32", "d_sae": "i32", "n_groups": "i32"},
        {"GROUPS": 4, "PIECE": PIECE} | ROWS,
    ),
    "sum_latents": (
        BY_LATENT | {"pieces": "*fp32", "out": "*fp32", "factor_sums": "*fp32", "n_rows": "i32", "d": "i32", "n_groups": "i32", "scale": "fp32"},
        {"FACTOR_SUMS": True, "GROUPS": 1, "PIECE": PIECE} | ROWS,
    ),
    "square_norms": ({"gradient": "*fp32", "parameter": "*fp32", "norms": "*fp32", "d": "i32"}, {"TANGENT": True, "BLOCK": 512}),
    "adam_rows": (
        dict.fromkeys(("parameter", "gradient", "exp_avg", "exp_avg_sq", "gradient_scale"), "*fp32")
        | {"n": "i32", "d": "i32"}
        | dict.fromkeys(("step_size", "root_correction", "beta1", "beta2", "eps"), "fp32"),
        {"TANGENT": True, "UNIT": True, "BLOCK": 512},
    ),
}
VARIANTS = [(name, ()) for name in SIGNATURES] + [
    # Triton compiles anew for integers that are 1.
    ("count_digits", ("row_stride",)),
    ("forward_error", ("n_groups", "n_parts")),
    ("forward_error", ("n_rows", "nnz", "n_groups")),
    ("sum_pieces", ("n_groups", "n_rows")),
    ("sum_latents", ("n_groups", "n_rows")),
]
NUM_WARPS = {"forward_error": 1, "sum_pieces": 1, "sum_latents": 1, "square_norms": 1, "adam_rows": 1}


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("name", "ones"), VARIANTS)
def test_every_program_compiles_for_compute_capability_9(name, ones, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does. No GPU is needed for this."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sae import triton_programs

    program = getattr(triton_programs, name)
    types, known = SIGNATURES[name]
    assert set(types) | set(known) == set(program.arg_names)
    types = {argument: of_argument for argument, of_argument in types.items() if argument not in ones}
    known = known | dict.fromkeys(ones, 1)
    signature = {argument: types.get(argument, "constexpr") for argument in program.arg_names}
    compiled = triton.compile(ASTSource(program, signature, known), GPUTarget("cuda", 90, 32), {"num_warps": NUM_WARPS.get(name, 4)})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES


@needs_triton
def test_every_program_is_compiled():
    import triton

    from sae import triton_programs

    programs = {name for name, value in vars(triton_programs).items() if isinstance(value, triton.runtime.JITFunction)}
    assert {name for name in programs if not name.startswith("_")} == set(SIGNATURES)
