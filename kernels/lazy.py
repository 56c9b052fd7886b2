#!/usr/bin/env python3
"""Static archives that stand in for CUDA's libraries when a program is linked.

    kernels/lazy.py DEST CUDARC      CUDARC is the folder of the crate cudarc, whose bindings name the functions

candle links CUDA's libraries by name, so a program with it would not even start where there are none. Each function in
these archives is a trampoline that looks for its library when it is first called: where there is none, it returns that
library's own code for "not there", and the program can say so. x86-64 Linux.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

# cudarc's module: archive, the library's file, what a function of it returns where it is missing.
LIBRARIES = {
    "driver": ("cuda", "libcuda.so.1", 34),  # CUDA_ERROR_STUB_LIBRARY
    "cublas": ("cublas", "libcublas.so.13", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublaslt": ("cublasLt", "libcublasLt.so.13", 1),
    "curand": ("curand", "libcurand.so.10", 101),  # CURAND_STATUS_NOT_INITIALIZED
    "nvrtc": ("nvrtc", "libnvrtc.so.13", 7),  # NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
}

# Arguments that a call may have in registers, which must survive the look-up.
INTEGERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"]
FLOATS = [f"xmm{i}" for i in range(8)]


def assembly(archive, names):
    """A jump for each function, through a table that `resolve` fills; what is on the stack stays where it is."""
    lines = [".text"]
    for index, name in enumerate(names):
        lines += [
            f".globl {name}",
            f".type {name},@function",
            f"{name}:",
            f" movl ${index},%eax",
            f" movq lazy_{archive}_table+{8 * index}(%rip),%r11",
            " testq %r11,%r11",
            f" jz lazy_{archive}_first_call",
            " jmp *%r11",
            f".size {name},.-{name}",
        ]
    slots = [("movq", register, 8 * i) for i, register in enumerate(INTEGERS)]
    slots += [("movups", register, 8 * len(INTEGERS) + 16 * i) for i, register in enumerate(FLOATS)]
    lines += [f"lazy_{archive}_first_call:", " pushq %rbp", " movq %rsp,%rbp", " subq $192,%rsp", " andq $-16,%rsp"]
    lines += [f" {move} %{register},{offset}(%rsp)" for move, register, offset in slots]
    lines += [" movl %eax,%edi", f" call lazy_{archive}_resolve", " movq %rax,%r11"]
    lines += [f" {move} {offset}(%rsp),%{register}" for move, register, offset in slots]
    lines += [" movq %rbp,%rsp", " popq %rbp", " jmp *%r11", '.section .note.GNU-stack,"",@progbits', ""]
    return "\n".join(lines)


def resolver(archive, file, missing, names):
    listed = ", ".join(f'"{name}"' for name in names)
    return f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static const char *const names[] = {{{listed}}};
__attribute__((visibility("hidden"))) void *lazy_{archive}_table[{len(names)}];

static int absent(void) {{ return {missing}; }}

/* Threads that come here at the same time find the same addresses. */
__attribute__((visibility("hidden"))) void *lazy_{archive}_resolve(int index) {{
    void *library = dlopen("{file}", RTLD_NOW | RTLD_GLOBAL);
    void *function = library ? dlsym(library, names[index]) : NULL;
    if (!function) return (void *)absent;
    __atomic_store_n(&lazy_{archive}_table[index], function, __ATOMIC_RELEASE);
    return function;
}}
"""


def main():
    destination, cudarc = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    destination.mkdir(parents=True, exist_ok=True)
    for module, (archive, file, missing) in LIBRARIES.items():
        bindings = (cudarc / "src" / module / "sys" / "mod.rs").read_text()
        names = sorted(set(re.findall(r'extern "C" \{\s*fn (\w+)\(', bindings)))
        if not names:
            sys.exit(f"{cudarc}: no functions of {module} found; cudarc's bindings look different than expected")
        with tempfile.TemporaryDirectory() as folder:
            sources = [pathlib.Path(folder) / "jumps.s", pathlib.Path(folder) / "resolve.c"]
            sources[0].write_text(assembly(archive, names))
            sources[1].write_text(resolver(archive, file, missing, names))
            objects = [str(source.with_suffix(".o")) for source in sources]
            for source, output in zip(sources, objects):
                subprocess.run(["cc", "-c", "-fPIC", "-O1", str(source), "-o", output], check=True)
            path = destination / f"lib{archive}.a"
            path.unlink(missing_ok=True)
            subprocess.run(["ar", "rcs", str(path), *objects], check=True)


main()
