"""Builds minitrain/kernels.<abi>.so from kernels/: nvcc compiles *.cu, the C++ compiler bindings.cpp, ninja runs both.

    kernels/*.cu          ->  sm_80 and PTX, which the driver compiles for any newer GPU
    kernels/*_sm90.cu     ->  sm_90a (H100, H200)
    kernels/bindings.cpp  ->  the Python module; never sees CUDA's or torch's headers, so one build serves every torch

Objects and ptxas.log stay in build/kernels, and ninja rebuilds what changed. Without nvcc (CUDA_HOME/bin or PATH) the
install goes on without the extension. MINITRAIN_CUDA_ARCHS="90a" (or "80") builds for one architecture only, portable
kernels included. CUDA's runtime is linked in statically and libcuda not at all: the module imports without a GPU.
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/kernels")  # relative to ROOT, as every path in build.ninja but those of the compilers
GENCODE = {  # "a" code runs on that architecture only and has no PTX
    "80": "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80",
    "90a": "-gencode arch=compute_90a,code=sm_90a",
}


def find_nvcc():
    """-> path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def archs():
    """-> the architectures asked for, portable first. Raises ValueError for one that is not in GENCODE."""
    asked = os.environ.get("MINITRAIN_CUDA_ARCHS") or ";".join(GENCODE)
    if unknown := set(asked.split(";")) - set(GENCODE):
        raise ValueError(f"MINITRAIN_CUDA_ARCHS={asked!r}: unknown {sorted(unknown)}; use {';'.join(GENCODE)!r} or one")
    return [arch for arch in GENCODE if arch in asked.split(";")]


def build_ninja(nvcc):
    """-> the text of build.ninja. What nvcc says is printed if it fails, else kept for ptxas.log."""
    import pybind11

    built = archs()
    includes = shlex.join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    hopper = int("90a" in built)  # 0: no *_sm90.cu in this build, and bindings.cpp is told so
    lines = f"""
builddir = {BUILD}
nvcc = {shlex.quote(nvcc)} -O3 -std=c++17 -Xcompiler -fPIC -Xptxas -v -lineinfo
cxx = c++ -O2 -std=c++17 -fPIC -fvisibility=hidden -Wall {includes}
rule nvcc
  command = $nvcc $arch -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; false; }}
  depfile = $out.d
  deps = gcc
rule cxx
  command = $cxx -DMINITRAIN_ARCHS='"{";".join(built)}"' -DMINITRAIN_SM90={hopper} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {shlex.quote(nvcc)} -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out
rule join
  command = cat $in > $out
build {BUILD}/bindings.o: cxx kernels/bindings.cpp""".splitlines()
    objects = [f"{BUILD}/bindings.o"]
    for source in sorted(ROOT.glob("kernels/*.cu")):
        arch = "90a" if source.stem.endswith("_sm90") else built[0]
        if arch in built:
            obj = f"{BUILD}/{source.stem}.o"
            lines += [f"build {obj} | {obj}.log: nvcc kernels/{source.name}", f"  arch = {GENCODE[arch]}"]
            objects.append(obj)
    logs = [f"{obj}.log" for obj in objects[1:]]
    lines += [f"build {BUILD}/kernels.so: link {' '.join(objects)}", f"build {BUILD}/ptxas.log: join {' '.join(logs)}"]
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            self.extensions = []

    def run(self):
        if self.nvcc is None:
            print("minitrain: nvcc not found, building without the CUDA extension; set CUDA_HOME or PATH to build it")
        super().run()

    def build_extension(self, ext):
        start = time.monotonic()
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        with open(ROOT / BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard against a second build in the same folder
            (ROOT / BUILD / "build.ninja").write_text(build_ninja(self.nvcc))
            if subprocess.call([sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja"], cwd=ROOT):
                raise SystemExit("minitrain: the CUDA extension did not compile; the compiler's message is above")
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a running process keeps the file that it has mapped
            shutil.copy2(ROOT / BUILD / "kernels.so", target)
        print(f"minitrain: built {target.name} for {';'.join(archs())} in {time.monotonic() - start:.1f} s")


sources = sorted(f"kernels/{path.name}" for path in ROOT.glob("kernels/*") if path.is_file())
setup(ext_modules=[Extension("minitrain.kernels", sources=sources)], cmdclass={"build_ext": BuildKernels})
