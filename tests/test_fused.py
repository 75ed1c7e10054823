"""The kernels that apply local updates on a GPU: in Triton's interpreter, compiled without a GPU, and on one."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from lowcal import rules

TESTS = Path(__file__).parent


def test_the_kernels_in_the_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]  # of old releases, when imported
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / "fused_cases.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_and_read_16_bytes_at_a_time(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowcal import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def ptx(kernel, types, options):
        types = {**types, **dict.fromkeys(options, "constexpr")}
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in options.items()},
            {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("partials", "skipped")},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]

    for relative, update in product((False, True), (tl.float32, tl.bfloat16)):
        options = {"WEIGHT": tl.float32, "UPDATE": update, "RELATIVE": relative, "ALIGNED": True}
        options |= {"PARTS": fused.PARTS, "BLOCK": fused.BLOCK, "LAYERS": fused.LAYERS}
        types = dict.fromkeys(["weight_at", "update_at", "sizes"], ("i64",) * fused.LAYERS)
        types |= {"partials": "*fp32", "skipped": "*i64"}
        assert "ld.global.v4.b32" in ptx(fused._sum_squares, types, options)
        types["eta"] = "fp32"
        code = ptx(fused._add, {**types, "steps": "*fp64"}, {**options, "EACH": relative})
        assert "st.global.v4.b32" in code
        assert ptx(fused._add, types, {**options, "EACH": False, "steps": None})


def test_the_cpu_has_no_kernels():
    assert rules._kernels(torch.device("cpu")) is None


def test_a_gpu_on_which_triton_does_not_run_is_named_once(monkeypatch):
    fused = pytest.importorskip("lowcal.fused", reason="Triton is not installed")

    def check(device):
        raise RuntimeError("no C compiler\nmore lines")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "check", check)
    with pytest.warns(UserWarning, match="Triton does not run on cuda: no C compiler$"):
        assert rules._kernels.__wrapped__(torch.device("cuda")) is None
    monkeypatch.setattr(fused, "check", lambda device: None)
    assert rules._kernels.__wrapped__(torch.device("cuda")) is fused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert rules._kernels.__wrapped__(torch.device("cuda")) is None


def test_without_triton_operators_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delitem(sys.modules, "lowcal.fused", raising=False)
    monkeypatch.delattr("lowcal.fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert rules._kernels.__wrapped__(torch.device("cuda")) is None


def test_importing_lowcal_does_not_import_triton():
    code = "import sys, torch; sys.modules['triton'] = None; import lowcal; lowcal.LoCal; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "lowcal.rules" in result.stdout.split()
    assert "lowcal.fused" not in result.stdout.split()


def test_what_the_kernels_do_not_take_goes_to_the_operators(monkeypatch):
    calls = []

    class Kernels:
        @staticmethod
        def takes(weight, update):
            return weight.dtype == torch.float32

        @staticmethod
        def apply_updates(weights, updates, step, relative):
            calls.append((len(weights), step.tolist(), relative))
            return rules._apply_by_operators(weights, updates, step, relative)

    monkeypatch.setattr(rules, "_kernels", lambda device: Kernels)
    types = [torch.float32, torch.float64, torch.float32, torch.float64, torch.float32]
    weights = [torch.randn(3, 2, dtype=dtype) for dtype in types]
    updates = [torch.randn_like(weight) for weight in weights]
    updates[2].zero_()
    updates[3].zero_()
    steps = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    expected = [w + s * u / u.norm().clamp_min(1e-9) for w, s, u in zip(weights, steps, updates, strict=True)]
    skipped = rules.apply_updates(weights, updates, steps)
    assert calls == [(3, [1.0, 3.0, 5.0], False)]
    assert int(skipped) == 2
    torch.testing.assert_close(weights, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_eager_and_recorded(dtype, relative):
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (512, 512, 3, 3), (7, 5), (10,)]
    weights = [torch.randn(shape, device="cuda") for shape in shapes]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    sources = [torch.randn_like(weight, dtype=dtype) for weight in weights]
    sources[3].zero_()
    expected = [weight.clone() for weight in weights]
    step, skipped = torch.tensor(0.5, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")

    def body():
        return rules.apply_updates(weights, [source * 2 for source in sources], step, relative=relative)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        skipped += body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        skipped += body()
    for value in (0.25, -0.125):
        step.fill_(value)
        for source in sources:
            source.mul_(-2.0)
        graph.replay()
    assert int(skipped) == 3
    sign = 1.0
    for value in (0.5, 0.25, -0.125):
        directions = [sign * source for source in sources]
        rules._apply_by_operators(expected, directions, value, relative)
        sign = -sign
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
