//! Compiles `kernels/*.cu` where the feature `cuda` is on: into one fatbin with machine code for sm_80 and sm_90a, and PTX
//! that a driver can compile for every later architecture. `kernels/train.cu`, which `cuda-train`
//! uses, becomes PTX.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let has = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if !has("CUDA") && !has("CUDA_TRAIN") {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    // nvcc's own: `-lineinfo` there lets compute-sanitizer name source lines, in a fatbin three times as large.
    println!("cargo:rerun-if-env-changed=NVCC_APPEND_FLAGS");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let all = || if has("CUDA") { compile_all(&out.join("kernels.fatbin")) } else { Ok(()) };
    if let Err(message) = all().and_then(|()| compile_train(&out.join("train.ptx"))) {
        println!("cargo:error={message}");
        std::process::exit(1);
    }
}

/// One translation unit of all kernels, so that there is one fatbin to embed.
fn compile_all(out: &Path) -> Result<(), String> {
    let source = out.with_extension("cu");
    // Each source in a namespace of its own, as it is a file of its own for the emulator: what they share comes before.
    let include = |name: &str| format!("#include \"{name}\"\n");
    let part = |stem: &str| format!("namespace {stem} {{\n{}}}\n", include(&format!("{stem}.cu")));
    let parts = [
        "rows",
        "few_rows",
        "few_narrow",
        "shrink_many",
        "many_rows",
        "many_rows_wgmma",
        "store",
        "attend_few",
        "attend_many",
        "sample",
        "limits",
    ]
    .map(part);
    let shared = ["formats.cuh", "mma.cuh", "attention.cuh", "many_rows.cuh", "wgmma.cuh", "few_tiles.cuh"]
        .map(include);
    let text = format!("{}{}", shared.concat(), parts.concat());
    std::fs::write(&source, text).map_err(|error| format!("{}: {error}", source.display()))?;
    let architectures = [
        "-fatbin",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ];
    compile(&source, out, &architectures)
}

/// For candle, which loads PTX; with `cuda` alone for tests.
fn compile_train(out: &Path) -> Result<(), String> {
    compile(Path::new("kernels/train.cu"), out, &["-ptx", "-arch=compute_80"])
}

fn compile(source: &Path, out: &Path, options: &[&str]) -> Result<(), String> {
    let nvcc = nvcc();
    let mut command = Command::new(&nvcc);
    command.args(["-O3", "-std=c++17", "-I", "kernels"]).args(options).arg("-o").arg(out).arg(source);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} failed: {status}", nvcc.display())),
        Err(error) => Err(format!(
            "kernels need nvcc ({}: {error}); kernels/toolkit.sh gets one, or set NVCC or CUDA_HOME",
            nvcc.display()
        )),
    }
}

fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    env::var_os("NVCC").map(PathBuf::from).or_else(home).unwrap_or_else(|| "nvcc".into())
}
