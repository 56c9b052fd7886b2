//! Compiles `kernels/*.cu` where the feature `cuda` is on: into one fatbin with machine code for sm_80 and sm_90a, and PTX
//! that a driver can compile for every later architecture.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    // nvcc's own: `-lineinfo` there lets compute-sanitizer name source lines, in a fatbin three times as large.
    println!("cargo:rerun-if-env-changed=NVCC_APPEND_FLAGS");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("kernels.fatbin");
    if let Err(message) = compile(&out) {
        println!("cargo:error={message}");
        std::process::exit(1);
    }
}

/// One translation unit of all kernels, so that there is one fatbin to embed.
fn compile(out: &Path) -> Result<(), String> {
    let nvcc = nvcc();
    let source = out.with_extension("cu");
    let folder = env::current_dir().map_err(|error| error.to_string())?.join("kernels");
    // Each source in a namespace of its own, as it is a file of its own for the emulator: what they share comes before.
    let include = |name: &str| format!("#include \"{name}\"\n");
    let part = |stem: &str| format!("namespace {stem} {{\n{}}}\n", include(&format!("{stem}.cu")));
    let parts = [
        "rows",
        "few_rows",
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
    let shared = ["formats.cuh", "mma.cuh", "attention.cuh", "many_rows.cuh", "wgmma.cuh"].map(include);
    let text = format!("{}{}", shared.concat(), parts.concat());
    std::fs::write(&source, text).map_err(|error| format!("{}: {error}", source.display()))?;
    let status = Command::new(&nvcc)
        .args(["-O3", "-std=c++17", "-fatbin"])
        .args(["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"])
        .arg("-gencode=arch=compute_80,code=compute_80")
        .arg("-I")
        .arg(folder)
        .arg("-o")
        .arg(out)
        .arg(&source)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} failed: {status}", nvcc.display())),
        Err(error) => Err(format!(
            "the feature `cuda` needs nvcc ({}: {error}); kernels/toolkit.sh gets one, or set NVCC or CUDA_HOME",
            nvcc.display()
        )),
    }
}

fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    env::var_os("NVCC").map(PathBuf::from).or_else(home).unwrap_or_else(|| "nvcc".into())
}
