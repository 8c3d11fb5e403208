"""The CUDA extension: how it is built (no GPU needed) and its kernels against float64 torch (marked gpu).

The tests build the extension into a temporary folder from the kernels/ of this tree; objects are shared with the
ordinary build in build/kernels, so only what changed is compiled.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
VOCABS = [1, 2, 7, 31, 100, 1000, 4096, 50257, 151936]
DTYPES = [torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])


def nvcc_folders():
    """Folders of PATH and CUDA_HOME that hold an nvcc."""
    folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", *os.environ["PATH"].split(os.pathsep)]
    return {folder for folder in folders if shutil.which("nvcc", path=folder)}


def run_setup(*args, root=ROOT, **env):
    return subprocess.run(
        [sys.executable, "setup.py", *args], cwd=root, env=os.environ | env, text=True, capture_output=True, timeout=600
    )


def needs_nvcc(test):
    return pytest.mark.skipif(not nvcc_folders(), reason="no nvcc: the CUDA extension cannot be built")(test)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """minitrain.kernels, built from this tree."""
    if not nvcc_folders():
        return pytest.importorskip("minitrain.kernels", reason="no nvcc, and no CUDA extension installed")
    folder = tmp_path_factory.mktemp("kernels")
    done = run_setup("build_ext", "--build-lib", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.rglob("kernels*.so")
    spec = importlib.util.spec_from_file_location("minitrain.kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# How it is built


def test_it_imports_without_a_gpu_and_says_what_it_was_built_for(kernels):
    assert kernels.archs == os.environ.get("MINITRAIN_CUDA_ARCHS", "80;90a")


@needs_nvcc
def test_no_kernel_spills_registers(kernels):
    log = (ROOT / "build/kernels/ptxas.log").read_text()
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(memory) >= len(list((ROOT / "kernels").glob("*.cu")))
    assert set(memory) == {("0", "0", "0")}, log
    assert "C75" not in log, log  # ptxas C7508, C7510: it gave up an asynchronous instruction or a register count


@needs_nvcc
def test_a_second_build_compiles_nothing(kernels, tmp_path):
    done = run_setup("build_ext", "--build-lib", str(tmp_path))
    assert "no work to do" in done.stdout, done.stdout + done.stderr


def test_without_nvcc_setup_says_so_in_one_line_and_builds_nothing(tmp_path):
    path = os.pathsep.join(f for f in os.environ["PATH"].split(os.pathsep) if f not in nvcc_folders())
    done = run_setup("build_ext", "--build-lib", str(tmp_path / "lib"), PATH=path, CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line != "running build_ext"] == [
        "minitrain: nvcc not found, building without the CUDA extension; set CUDA_HOME or PATH to build it"
    ]
    assert not (tmp_path / "lib").exists()


@pytest.mark.slow
@needs_nvcc
def test_a_kernel_that_does_not_compile_fails_the_build_with_the_compilers_message(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copy(ROOT / "setup.py", tmp_path)
    for source in (tmp_path / "kernels").glob("*.c*"):  # the others would be waited for
        source.write_text("")
    (tmp_path / "kernels/cross_entropy.cu").write_text("int broken = no_such_name;\n")
    done = run_setup("build_ext", root=tmp_path)
    assert done.returncode != 0
    assert '"no_such_name" is undefined' in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@needs_nvcc
def test_an_unknown_architecture_is_an_error():
    done = run_setup("build_ext", MINITRAIN_CUDA_ARCHS="90a;12")
    assert done.returncode != 0
    assert "MINITRAIN_CUDA_ARCHS='90a;12': unknown ['12']" in done.stderr


# What it refuses


def test_arguments_no_kernel_takes_are_value_errors(kernels):
    for dtype, rows, vocab, message in [
        ("float16", 1, 8, "dtype='float16'"),
        ("float32", -1, 8, "rows=-1"),
        ("float32", 2**31, 8, "rows=2147483648"),
        ("float32", 1, 0, "vocab=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.softmax_cross_entropy_(0, dtype, 0, 0, rows, vocab, True, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_an_error_with_cudas_reason(kernels):
    with pytest.raises(RuntimeError, match="cudaGetDevice: cudaError"):
        kernels.softmax_cross_entropy_(0, "float32", 0, 0, 1, 8, True, 0, 0)


# Softmax cross-entropy


def cross_entropy_(kernels, logits, targets, write_grad=True):
    """-> loss (N,) fp32; logits (N, V) become their gradient."""
    assert logits.is_contiguous() and targets.dtype == torch.int64
    loss = torch.full((len(logits),), 7.0, device=logits.device)
    stream = torch.cuda.current_stream(logits.device).cuda_stream
    name, pointers = str(logits.dtype).removeprefix("torch."), (targets.data_ptr(), loss.data_ptr())
    kernels.softmax_cross_entropy_(
        logits.data_ptr(), name, *pointers, *logits.shape, write_grad, logits.device.index, stream
    )
    return loss


def make(N, V, dtype, scale=1.0, device="cuda"):
    """Random logits, and targets of which every fifth is -100."""
    generator = torch.Generator(device).manual_seed(N * 1_000_003 + V)
    logits = torch.randn(N, V, generator=generator, device=device).mul_(scale).to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device=device)
    targets[4::5] = -100
    return logits, targets


def assert_matches_float64(logits, targets, loss, grad):
    """`grad` is what `logits` became. Bounds: rounding to the dtype, and a few fp32 roundings of terms of size 1."""
    x, trained = logits.double(), targets != -100
    onehot = torch.zeros_like(x)
    onehot[trained] = F.one_hot(targets[trained], x.shape[1]).double()
    softmax = torch.where(trained[:, None], x.softmax(-1), 0)
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(x, targets, reduction="none"), rtol=1e-6, atol=1e-6, equal_nan=True
    )
    allowed = 1e-8 + 3e-7 * onehot + (softmax - onehot).abs() * (2**-8 if grad.dtype == torch.bfloat16 else 2e-5)
    assert ((grad.double() - (softmax - onehot)).abs() <= allowed).all()
    assert (grad[~trained] == 0).all() and (loss[~trained] == 0).all()


@gpu
@dtypes
@pytest.mark.parametrize("V", VOCABS)
@pytest.mark.parametrize("N", [1, 7, 64])
def test_loss_and_gradient_match_float64(kernels, N, V, dtype):
    logits, targets = make(N, V, dtype)
    grad = logits.clone()
    assert_matches_float64(logits, targets, cross_entropy_(kernels, grad, targets), grad)


@gpu
@dtypes
@pytest.mark.parametrize("V", [31, 4096, 50257])
def test_logits_a_hundred_times_larger_match_float64(kernels, V, dtype):
    logits, targets = make(64, V, dtype, scale=100)
    grad = logits.clone()
    assert_matches_float64(logits, targets, cross_entropy_(kernels, grad, targets), grad)


@gpu
@dtypes
@pytest.mark.parametrize("V", [8, 31, 4096, 50257])
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_logits_that_start_off_a_16_byte_border_match_and_their_neighbours_are_untouched(kernels, V, dtype, offset):
    logits, targets = make(7, V, dtype)
    buffer = torch.full((offset + logits.numel() + 16,), 5.0, dtype=dtype, device=logits.device)
    grad = buffer[offset : offset + logits.numel()].view_as(logits).copy_(logits)
    assert_matches_float64(logits, targets, cross_entropy_(kernels, grad, targets), grad)
    assert (buffer[:offset] == 5).all() and (buffer[offset + logits.numel() :] == 5).all()


@gpu
@dtypes
def test_a_row_of_minus_infinity_but_one_is_certain(kernels, dtype):
    logits, _ = make(3, 1000, dtype)
    logits[1] = -torch.inf
    logits[1, 777] = 3.0
    targets = torch.tensor([5, 777, 6], device=logits.device)
    grad = logits.clone()
    loss = cross_entropy_(kernels, grad, targets)
    assert_matches_float64(logits, targets, loss, grad)  # loss 0 and gradient 0 within fp32's rounding
    assert grad[1].count_nonzero() <= 1
    targets[1] = 776  # impossible: the loss is infinite, as torch's
    assert cross_entropy_(kernels, logits.clone(), targets)[1] == torch.inf


@gpu
@dtypes
@pytest.mark.parametrize("V", [7, 1000, 50257])
def test_a_bad_row_has_a_nan_loss_and_leaves_the_others_alone(kernels, V, dtype):
    logits, _ = make(9, V, dtype)
    targets = torch.arange(9, device=logits.device) % V
    expected_grad = logits.clone()
    expected = cross_entropy_(kernels, expected_grad, targets)
    logits[1, V // 2] = torch.nan
    logits[3, V - 1] = torch.inf
    logits[5] = -torch.inf
    targets[7] = V  # outside the vocabulary: never read, never written
    loss = cross_entropy_(kernels, logits, targets)
    assert loss[1::2].isnan()[:4].all()
    assert loss[::2].equal(expected[::2]) and logits[::2].equal(expected_grad[::2])


@gpu
@dtypes
def test_a_row_that_is_not_trained_on_may_hold_anything(kernels, dtype):
    logits, targets = make(10, 1000, dtype)
    logits[4::5] = torch.nan
    loss = cross_entropy_(kernels, logits, targets)
    assert (loss[4::5] == 0).all() and (logits[4::5] == 0).all() and loss.isfinite().all()


@gpu
@dtypes
def test_without_write_grad_the_loss_is_the_same_and_the_logits_stay(kernels, dtype):
    logits, targets = make(64, 50257, dtype)
    before = logits.clone()
    loss = cross_entropy_(kernels, logits, targets, write_grad=False)
    assert logits.equal(before)
    assert loss.equal(cross_entropy_(kernels, logits, targets))


@gpu
@dtypes
def test_two_runs_are_bitwise_equal(kernels, dtype):
    logits, targets = make(64, 151936, dtype)
    first, second = logits.clone(), logits.clone()
    assert cross_entropy_(kernels, first, targets).equal(cross_entropy_(kernels, second, targets))
    assert first.equal(second)


@gpu
def test_no_rows_is_nothing_to_do(kernels):
    logits, targets = make(0, 8, torch.bfloat16)
    assert cross_entropy_(kernels, logits, targets).shape == (0,)


@gpu
def test_offsets_beyond_2_31_elements(kernels):
    N, V = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.randint(V, (N,), device="cuda")
    some = torch.tensor([0, 1, 2**31 // V - 1, 2**31 // V, 2**31 // V + 1, N - 2, N - 1], device="cuda")
    before = logits[some]
    loss = cross_entropy_(kernels, logits, targets)
    assert_matches_float64(before, targets[some], loss[some], logits[some])


@gpu
def test_it_runs_on_the_stream_it_is_given(kernels):
    source, targets = make(64, 4096, torch.float32)
    logits = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles: a launch on another stream would see the zeros
        logits.copy_(source)
        loss = cross_entropy_(kernels, logits, targets)
    stream.synchronize()
    assert_matches_float64(source, targets, loss, logits)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_tensors_device_and_leaves_the_current_one(kernels):
    logits, targets = make(7, 1000, torch.bfloat16, device="cuda:1")
    grad = logits.clone()
    torch.cuda.set_device(0)
    loss = cross_entropy_(kernels, grad, targets)
    assert torch.cuda.current_device() == 0 and torch.empty(1, device="cuda").device.index == 0
    torch.cuda.synchronize("cuda:1")
    assert_matches_float64(logits, targets, loss, grad)
