//! `lonas random`: a super-network without a training.

use super::process::{Server, lonas};
use crate::files::Folder;
use crate::golden;
use serde_json::{Value, json};
use std::process::Output;

/// With biases, so that every kind of tensor is there; 67 tokens.
const CONFIG: &str = "tiny-bias-headdim/base/config.json";

fn random(folder: &Folder, out: &str, more: &[&str]) -> Output {
    let space = json!({
        "rank": 4, "alpha": 8, "targets": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "groups": [{"kind": "width", "modules": ["gate_proj", "up_proj"], "choices": [50, 24]}]
    });
    folder.write("space.json", space.to_string());
    let mut command = lonas(&["random"]);
    command.arg("--config").arg(golden::path(CONFIG)).arg("--space").arg(folder.file("space.json"));
    command.arg("--out").arg(folder.file(out)).args(more).output().unwrap()
}

fn done(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_random_super_network_is_served_and_measured_as_any_other() {
    let folder = Folder::empty();
    done(&random(&folder, "model", &[]));
    let model = folder.file("model");
    let server = Server::start(&[model.to_str().unwrap()]);
    let request = json!({"model": "model:minimal", "prompt": "0123", "max_tokens": 5, "ignore_eos": true});
    let (head, body) = server.post("/v1/completions", &request);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}\n{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], 4, "a token for each byte: {answer}");

    let quick =
        ["bench", "--threads", "1", "--prompt", "9", "--output", "2", "--rounds", "1", "--streams", "1"];
    let bench = lonas(&quick).arg(&model).output().unwrap();
    done(&bench);
    let text = String::from_utf8_lossy(&bench.stdout);
    assert!(text.contains("minimal") && text.contains("uneven"), "{text}");
}

#[test]
fn weights_are_spread_as_a_fresh_models_and_follow_the_seed() {
    let folder = Folder::empty();
    for (out, seed) in [("a", "7"), ("b", "7"), ("c", "8")] {
        done(&random(&folder, out, &["--seed", seed]));
    }
    let read = |out: &str| folder.tensors(&format!("{out}/base/model.safetensors"));
    let [a, b, c] = ["a", "b", "c"].map(read);
    assert_eq!(a, b);
    let mut matrices = Vec::new();
    for (name, (_, shape, bytes)) in &a {
        let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        let values = bytes.chunks_exact(2).map(value).collect::<Vec<_>>();
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        if shape.len() == 1 {
            assert!(values.iter().all(|&v| v == 1.0), "{name}");
            continue;
        }
        assert_ne!(bytes, &c[name].2, "{name}");
        let deviation = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!((deviation - 0.02).abs() < 0.002, "{name}: {deviation}");
        matrices.push(bytes);
    }
    matrices.sort_unstable();
    let count = matrices.len();
    matrices.dedup();
    assert_eq!(matrices.len(), count, "no two are alike");
}

#[test]
fn what_is_there_stays_unless_it_is_to_be_replaced() {
    let folder = Folder::empty();
    done(&random(&folder, "model", &[]));
    let second = random(&folder, "model", &["--seed", "1"]);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("--overwrite"), "{said}");
    done(&random(&folder, "model", &["--seed", "1", "--overwrite"]));
    // Somebody's base, whose weights have the same names.
    std::fs::create_dir_all(folder.file("base/base")).unwrap();
    folder.write("base/base/model.safetensors", "hours of work");
    let refused = random(&folder, "base", &["--overwrite"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("no super-network"), "{said}");
    assert_eq!(std::fs::read(folder.file("base/base/model.safetensors")).unwrap(), b"hours of work");
    let colon = random(&folder, "a:b", &[]);
    assert!(String::from_utf8_lossy(&colon.stderr).contains("`a:b`"));
    assert!(!folder.file("a:b").exists());
}
